"""Milliseconds by stage, on the device in use: median of several runs with the 10th and 90th percentile.

    preprocessing       an image to views, on the host
    vision_encoder      views to features, reduced
    fusion              the projector, or the image's part of a generator; a part of:
    prefill             features to the first token's logits
    first_token         pixels to the first token's logits: encoder and prefill in one run
    decode              one more token, on the cache
    end_to_end_N        pixels to N tokens
    floor_...           the same with the bare language model on the text alone

All in one process, one after the other; the floor is what fusion at no cost would leave. Random weights serve: time
does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from PIL import Image

from lavi.efficiency.point import Point
from lavi.model import VisionLanguageModel


@dataclass(frozen=True)
class Milliseconds:
    """Median, 10th and 90th percentile of one stage."""

    median: float
    p10: float
    p90: float


def stage_times(
    model: VisionLanguageModel,
    point: Point,
    *,
    device: torch.device,
    runs: int = 20,
    warmup: int = 3,
    outputs: Sequence[int] = (),
) -> dict[str, Milliseconds]:
    """Time every stage.

    Args:
        outputs: lengths of answers to time from end to end.
    """
    batch, features = point.inputs(model, device)
    pixels = point.pixels(model, device)
    hf, token = model.language.hf, torch.ones(point.batch, 1, dtype=torch.long, device=device)

    def encoded() -> Any:
        return model.features(pixels) if len(pixels) else None

    def bare() -> Any:
        return hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=True, logits_to_keep=1)

    def decode(cache: Any, vision: Any) -> Any:
        hf(input_ids=token, past_key_values=cache, use_cache=True, vision=vision)
        cache.crop(-1)  # so that every run decodes at the same length

    def first_token() -> Any:
        encoded()
        return model.prefill(batch, features)

    def floor_first_token() -> Any:
        encoded()
        return bare(), None

    with torch.no_grad():
        out, vision = model.prefill(batch, features)
        stages: dict[str, Callable[[], Any]] = {
            "fusion": lambda: model.fusion(batch, features, model.language),
            "prefill": lambda: model.prefill(batch, features),
            "first_token": first_token,
            "decode": lambda: decode(out.past_key_values, vision),
            "floor_prefill": bare,
            "floor_first_token": floor_first_token,
        }
        alone = bare().past_key_values
        stages["floor_decode"] = lambda: decode(alone, None)
        if len(pixels):
            stages["vision_encoder"] = encoded
        if point.layout and point.layout.size != (0, 0):
            image = Image.new("RGB", point.layout.size[::-1])
            stages["preprocessing"] = lambda: model.tiling.views(image, model.vision)
        times = {name: summary(_times(run, device, runs=runs, warmup=warmup)) for name, run in stages.items()}
        if outputs:
            for floor, start in (("", first_token), ("floor_", floor_first_token)):
                answers = [_answer(hf, start, device, outputs) for _ in range(warmup + max(2, runs))][warmup:]
                for length, some in zip(sorted(outputs), zip(*answers, strict=True), strict=True):
                    times[f"{floor}end_to_end_{length}"] = summary(some)
    return times


def summary(elapsed: Sequence[float]) -> Milliseconds:
    """Of at least two runs."""
    deciles = quantiles(elapsed, n=10, method="inclusive")
    return Milliseconds(median=quantiles(elapsed, n=2)[0], p10=deciles[0], p90=deciles[8])


def _times(run: Callable[[], Any], device: torch.device, *, runs: int, warmup: int) -> list[float]:
    for _ in range(warmup):
        run()
    elapsed = []
    for _ in range(max(2, runs)):  # quantiles want two
        clock = _Clock(device)
        run()
        clock.mark()
        elapsed += clock.marks()
    return elapsed


def _answer(hf: Any, start: Callable[[], Any], device: torch.device, outputs: Sequence[int]) -> list[float]:
    """One greedy answer of the longest length; milliseconds to each of the lengths."""
    clock = _Clock(device)
    out, vision = start()
    for length in range(1, max(outputs) + 1):
        if length > 1:
            token = out.logits[:, -1:].argmax(-1)
            out = hf(input_ids=token, past_key_values=out.past_key_values, use_cache=True, vision=vision)
        if length in outputs:
            clock.mark()
    return clock.marks()


class _Clock:
    """Milliseconds from its making to each mark: by device events on a GPU, by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.times: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())

    def marks(self) -> list[float]:
        begin, *rest = self.times
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [float(begin.elapsed_time(event)) for event in rest]
        return [(moment - begin) * 1e3 for moment in rest]

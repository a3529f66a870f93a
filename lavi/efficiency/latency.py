"""Milliseconds by stage, on the device in use: median of several runs with the 10th and 90th percentile.

Stages: ``vision_encoder``; ``prefill`` (projector or generator, and the decoder up to the first token's logits);
``decode`` (one more token, on the cache); ``floor_prefill`` and ``floor_decode`` (the bare language model on the text
alone), measured in the same run. Random weights serve: time does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch

from lavi.efficiency.flops import probe_inputs
from lavi.model import VisionLanguageModel


@dataclass(frozen=True)
class Milliseconds:
    """Median, 10th and 90th percentile of one stage."""

    median: float
    p10: float
    p90: float


def stage_times(
    model: VisionLanguageModel,
    *,
    text: int,
    visual: int,
    views: int,
    device: torch.device,
    runs: int = 20,
    warmup: int = 3,
) -> dict[str, Milliseconds]:
    """Time every stage for one row of ``text`` tokens and ``visual`` visual tokens out of ``views`` views."""
    batch, features = probe_inputs(model, text=text, visual=visual, device=device)
    pixels = torch.zeros(max(views, 1), *model.vision.pixel_shape, device=device)
    hf, token = model.language.hf, torch.ones(1, 1, dtype=torch.long, device=device)

    def floor_prefill() -> Any:
        return hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=True, logits_to_keep=1)

    def decode(cache: Any, vision: Any) -> Any:
        hf(input_ids=token, past_key_values=cache, use_cache=True, vision=vision)
        cache.crop(-1)  # so that every run decodes at the same length

    with torch.no_grad():
        out, vision = model.prefill(batch, features)
        stages: dict[str, Callable[[], Any]] = {
            "prefill": lambda: model.prefill(batch, features),
            "decode": lambda: decode(out.past_key_values, vision),
            "floor_prefill": floor_prefill,
        }
        bare = floor_prefill().past_key_values
        stages["floor_decode"] = lambda: decode(bare, None)
        if views:
            stages["vision_encoder"] = lambda: model.vision(pixels)
        return {name: _time(run, device, runs=runs, warmup=warmup) for name, run in stages.items()}


def _time(run: Callable[[], Any], device: torch.device, *, runs: int, warmup: int) -> Milliseconds:
    for _ in range(warmup):
        run()
    elapsed = [_once(run, device) for _ in range(max(2, runs))]  # quantiles want two
    deciles = quantiles(elapsed, n=10, method="inclusive")
    return Milliseconds(median=quantiles(elapsed, n=2)[0], p10=deciles[0], p90=deciles[8])


def _once(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one run: device events on a GPU, the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3

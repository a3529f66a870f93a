"""Milliseconds by stage, on the device in use, of models and their floors that take turns.

    preprocessing       an image to views, on the host
    vision_encoder      views to features, reduced
    fusion              the projector, or the image's part of a generator; a part of:
    prefill             features to the first token's logits
    first_token         pixels to the first token's logits: encoder and prefill in one run
    decode              one more token, on the cache; compiled, if the model is (``language.compile``)
    end_to_end_N        pixels to N tokens

The floor of a model has the stages of its decoder with the bare language model on the text alone: what fusion at no
cost would leave. Random weights serve: time does not depend on them.

A machine is never alone: what else it does comes and goes. So all contestants run a stage one after the other, turn by
turn (A B C, then C B A), and the runs of one turn, neighbours in time, are compared with each other. A run that is
shorter than a scheduler's time slices is either hit by another process or not, a longer one is hit in part: runs on a
CPU are repeated within their turn until all last about as long as some slices (:data:`SHORTEST`), so that a busy
machine lengthens all alike. And they use half of the threads only (:func:`half_the_threads`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from transformers import Cache

from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.scenario import PromptShape
from lavi.efficiency.steps import Prefill, Steps
from lavi.model import VisionLanguageModel

TURNS = 15
"""Of each stage, by default."""
MOST = 3
"""Times as many turns, at most, where figures are noisy."""
LONGEST = 30_000.0
"""Milliseconds of a stage's runs, after which it gets no more turns than :data:`TURNS` or the number named."""
WARMUP = 3
"""Runs of each stage that are not timed."""
SHORTEST = 20.0
"""Milliseconds that the runs of one turn on a CPU last together, at least."""

Track = Callable[[Sequence[Any]], Iterable[Any]]


class Clock(ABC):
    """Milliseconds between :meth:`start` and :meth:`stop`."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> float: ...


class HostClock(Clock):
    """What a watch on the wall says."""

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> float:
        return (time.perf_counter() - self.began) * 1e3


class DeviceClock(Clock):
    """Events of a GPU: work that was queued and is not done yet counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        self.began.record(torch.cuda.current_stream(self.device))  # which may not be that of the current device

    def stop(self) -> float:
        self.ended.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        return float(self.began.elapsed_time(self.ended))


def clock_of(device: torch.device) -> Clock:
    """The clock that a device is timed by."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def shortest_turn(device: torch.device) -> float:
    """Milliseconds that the runs of one turn last together, at least: on a GPU one run is enough."""
    return SHORTEST if device.type == "cpu" else 0.0


@dataclass(frozen=True)
class Contestant:
    """What is timed beside others: stages by name, each run ``within`` a context that is not timed itself."""

    stages: Mapping[str, Callable[[], Any]]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def only(self, stages: Collection[str]) -> Contestant:
        """The same with some of its stages."""
        return Contestant({name: run for name, run in self.stages.items() if name in stages}, self.within)


def time_in_turns(
    contestants: Sequence[Contestant],
    clock: Clock,
    *,
    pairs: Collection[tuple[int, int]] = (),
    turns: int = TURNS,
    shortest: float = 0.0,
    track: Track = iter,
    meter: WaitMeter | None = None,
) -> list[dict[str, list[float]]]:
    """Time all contestants, stage by stage, each stage in turns.

    Args:
        pairs: the contestants that are compared, by number. A stage has more turns, at most :data:`MOST` times as
            many, as long as one of its times or one of these ratios is noisy.
        shortest: milliseconds that the runs of one turn last together; their mean counts.
        track: draws a progress bar over the stages.
        meter: runs while stages are timed, and not while they warm up: compiling is no waiting.

    Returns:
        For each contestant the milliseconds of its stages, by turn.
    """
    times: list[dict[str, list[float]]] = [{} for _ in contestants]
    for stage in track(list(dict.fromkeys(stage for one in contestants for stage in one.stages))):
        taking_part = {number: one for number, one in enumerate(contestants) if stage in one.stages}
        compared = [pair for pair in pairs if taking_part.keys() >= set(pair)]
        with torch.no_grad():
            _warm_up(taking_part.values(), stage)
            with meter or nullcontext():
                by_turn = _time_stage(taking_part, stage, clock, compared, turns, shortest)
        for number, milliseconds in by_turn.items():
            times[number][stage] = milliseconds
    return times


def _warm_up(contestants: Iterable[Contestant], stage: str) -> None:
    for one in contestants:
        with one.within():
            for _ in range(WARMUP):
                one.stages[stage]()


def _time_stage(
    contestants: Mapping[int, Contestant],
    stage: str,
    clock: Clock,
    pairs: Collection[tuple[int, int]],
    turns: int,
    shortest: float,
) -> dict[int, list[float]]:
    times: dict[int, list[float]] = {number: [] for number in contestants}
    order, spent = list(contestants), 0.0
    for _ in range(MOST):
        for _ in range(turns):
            for number in order:
                passes = _passes(contestants[number], stage, clock, shortest)
                times[number].append(fmean(passes))
                spent += sum(passes)
            order.reverse()
        if spent > LONGEST or not _any_noisy(times, pairs):
            break
    return times


def _passes(contestant: Contestant, stage: str, clock: Clock, shortest: float) -> list[float]:
    """Milliseconds of each of the runs of one turn."""
    run, passes = contestant.stages[stage], [0.0]
    with contestant.within():
        while len(passes) == 1 or sum(passes) < shortest:
            clock.start()
            run()
            passes.append(clock.stop())
    return passes[1:]


def _any_noisy(times: Mapping[int, Sequence[float]], pairs: Collection[tuple[int, int]]) -> bool:
    estimates = [estimate(milliseconds) for milliseconds in times.values()]
    return any(one.noisy for one in [*estimates, *(ratio(times[first], times[second]) for first, second in pairs)])


@contextmanager
def half_the_threads(device: torch.device) -> Iterator[None]:
    """On a CPU torch computes with half of its threads: where all wait for one that another process keeps from its
    core, milliseconds become hundreds."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WaitMeter:
    """How long the thread that times had no core, because other processes had them, while the meter was entered.

    Args:
        wall, thread: clocks in seconds, of the time that passes and of what this thread computes.
    """

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, thread: Callable[[], float] = time.thread_time
    ) -> None:
        self.wall, self.thread = wall, thread
        self.passed = self.computed = 0.0

    def __enter__(self) -> None:
        self.passed -= self.wall()
        self.computed -= self.thread()

    def __exit__(self, *_: object) -> None:
        self.passed += self.wall()
        self.computed += self.thread()

    def share(self) -> float:
        """Share of the time without a core, for a thread that had work all along."""
        return max(0.0, 1 - self.computed / self.passed) if self.passed else 0.0


def model_and_floor(
    model: VisionLanguageModel,
    shape: PromptShape,
    *,
    device: torch.device,
    outputs: Sequence[int] = (),
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Contestant, Contestant]:
    """The stages of a model on a prompt of this shape, and those of its floor.

    Args:
        outputs: lengths of answers to time from end to end.
        within: the context that the model runs in.
    """
    batch, features = shape.inputs(model, device)
    pixels = shape.pixels(model, device)
    hf, token = model.language.hf, torch.ones(shape.batch, 1, dtype=torch.long, device=device)

    def encoded() -> Any:
        return model.features(pixels, shape.layouts) if len(pixels) else None

    def prefill(cache: Cache | None = None) -> tuple[Any, Any]:
        return model.prefill(batch, features, cache)

    def bare(cache: Cache | None = None) -> tuple[Any, Any]:
        text = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return hf(**text, past_key_values=cache, use_cache=True, logits_to_keep=1), None

    def stages(start: Prefill, columns: int) -> dict[str, Callable[[], Any]]:
        length = None if model.language.compiled is None else columns + max((1, *outputs))
        steps, answers = (Steps(hf, start, rows=shape.batch, length=length) for _ in range(2))
        steps.begin(undoable=True)

        def decode() -> None:
            steps.step(token)
            steps.undo_step()  # so that every run decodes at the same length

        def answer(length: int) -> None:
            encoded()
            logits = answers.begin()
            for _ in range(length - 1):
                logits = answers.step(logits.argmax(-1))

        whole = {f"end_to_end_{length}": partial(answer, length) for length in sorted(outputs)}
        first: dict[str, Callable[[], Any]] = {
            "prefill": partial(start, None),
            "first_token": lambda: (encoded(), start(None)),
        }
        return {**first, "decode": decode, **whole}

    arranged = shape.text + shape.visual_tokens_in_language(model)
    with torch.no_grad(), within():
        stages_of_model = {"fusion": lambda: model.fusion(batch, features, model.language), **stages(prefill, arranged)}
        floor = stages(bare, shape.text)
    if len(pixels):
        stages_of_model["vision_encoder"] = encoded
    if shape.layout and shape.layout.size != (0, 0):
        image = Image.new("RGB", shape.layout.size[::-1])
        stages_of_model["preprocessing"] = lambda: model.tiling.views(image, model.vision.preprocessing)
    return Contestant(stages_of_model, within), Contestant(floor, within)

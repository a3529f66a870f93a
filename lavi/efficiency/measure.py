"""From a recipe and a scenario to a record: counted, and measured on a device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles
from typing import Any

import torch

from lavi.checkpoints.published_vlm import as_released, is_released, written_out
from lavi.checkpoints.weight_files import versions
from lavi.efficiency.energy import EnergyMeter
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.flops import Flops, closed_form
from lavi.efficiency.latency import (
    TURNS,
    Contestant,
    Track,
    WaitMeter,
    clock_of,
    half_the_threads,
    model_and_floor,
    shortest_turn,
    time_in_turns,
)
from lavi.efficiency.memory import prefill_memory, weights_of
from lavi.efficiency.record import Record, current_commit, device_name
from lavi.efficiency.scenario import Prompt, PromptShape, Scenario
from lavi.errors import UserError
from lavi.loading.without_weights import without_weights
from lavi.model import VisionLanguageModel
from lavi.recipe import TARGET, Recipe

log = logging.getLogger("lavi")

MOST_PROMPTS = 200
"""Different prompts that a mean over samples is taken of."""
CONCAT = {TARGET: "lavi.fusion.concat.ConcatFusion"}


def concat_twin(recipe: Recipe) -> Recipe:
    """The same recipe with all tokens concatenated instead of its fusion: the baseline of every method.

    Of a released model that is the model as it was released.
    """
    twin = as_released(recipe)
    if twin is recipe:
        twin = recipe.replaced("model.fusion", dict(CONCAT))
        if twin.settings["model"].get("reducer") is not None:
            twin = twin.replaced("model.reducer", None)
    twin.settings["name"] = f"{recipe.settings['name']} (concat)" if "name" in recipe.settings else "concat"
    return twin


def method_name(recipe: Recipe) -> str:
    """``lavi``, ``concat``, ``concat+visionzip``: the files that the fusion, and what reduces before it, live in."""
    recipe = written_out(recipe)
    parts = [recipe.settings["model"]["fusion"], recipe.settings["model"].get("reducer")]
    return "+".join(str(part[TARGET]).split(".")[-2] for part in parts if part is not None)


def is_concat(recipe: Recipe) -> bool:
    """Whether it is a baseline itself: all tokens, concatenated as the model was released."""
    if not is_released(recipe):
        return method_name(recipe) == "concat"
    as_it_was = as_released(recipe)
    own_tower = written_out(recipe).settings["model"]["vision"] == as_it_was.settings["model"]["vision"]
    return own_tower and method_name(recipe) == method_name(as_it_was)


def check_not_quantized(recipe: Recipe) -> None:
    """Whether random weights take the time and the memory of a recipe's.

    Raises:
        UserError: its weights are quantized, which random ones are not.
    """
    kind = written_out(recipe).settings["model"]["language"].get("quantization")
    if kind is not None:
        raise UserError(
            f"{recipe.source}: weights in {kind} are counted here, and neither timed nor weighed: set "
            "model.language.quantization=null, or time a run of it with python -m lavi.evaluate."
        )


def build_on(recipe: Recipe, device: torch.device | str) -> VisionLanguageModel:
    """A model of this recipe on ``device`` with random weights; on ``meta`` in a second even at full size.

    Adapters are left out: a model answers with the weights they were merged into.
    """
    recipe = written_out(recipe)
    if recipe.settings["model"]["language"].get("lora") is not None:
        recipe = recipe.replaced("model.language.lora", None)
    with torch.random.fork_rng(), without_weights(), torch.device(device):
        model: VisionLanguageModel = recipe.build("model")
    if model.language.hf.device.type == "meta":  # where ids have no values that padding could be looked for in
        model.language.hf.config.pad_token_id = None
    return model.eval()


def count(
    recipe: Recipe, model: VisionLanguageModel, scenario: Scenario, routes: Mapping[Hashable, int] | None = None
) -> Record:
    """FLOPs of one scenario. ``model`` may be on meta.

    Args:
        routes: how many samples took each route through the decoder; the record is their mean, its knob ``routes`` has
            the share of each.
    """
    shape = scenario.shape_for(model)
    flops = _mean(model, shape, routes) if routes else closed_form(model, shape)
    total = sum(routes.values()) if routes else 0
    return replace(
        uncounted(recipe, model, scenario),
        knobs={"routes": {str(route): number / total for route, number in routes.items()}} if routes else {},
        flops=flops.prefill,
        flops_floor=flops.floor,
        flops_causal_discount=flops.causal_discount,
        decode_flops=flops.decode,
    )


def uncounted(recipe: Recipe, model: VisionLanguageModel, scenario: Scenario) -> Record:
    """The same record without FLOPs: what a model is, and what a prompt holds."""
    shape = scenario.shape_for(model)
    return Record(
        method=method_name(recipe),
        text_tokens=shape.text,
        visual_tokens=shape.views * shape.per_view,
        visual_tokens_in_language=shape.visual_tokens_in_language(model),
        views=shape.encoded,
        batch=shape.batch,
        baseline=is_concat(recipe),
        dtype=str(model.language.hf.dtype).removeprefix("torch."),
        attention=model.language.attention,
        versions=versions(),
        commit=current_commit(),
        seed=recipe.settings.get("seed"),
        recipe=recipe.source,
    )


def note_mean_flops(
    record: Record, model: VisionLanguageModel, prompts: Counter[Prompt], routes: Mapping[Hashable, int] | None = None
) -> None:
    """Add to a record the mean FLOPs over prompts as they were: their own texts and images, and their routes.

    Of more than :data:`MOST_PROMPTS` different prompts, that many evenly spread ones stand for all.

    Args:
        routes: how many samples took each route, whatever their size.
    """
    sizes = sorted(prompts.elements(), key=str)
    kept = Counter(sizes if len(prompts) <= MOST_PROMPTS else sizes[:: -(-len(sizes) // MOST_PROMPTS)])
    total, mean = sum(kept.values()), dict[str, float]()
    for prompt, number in kept.items():
        shape = PromptShape.of_prompt(prompt, model)
        flops = _mean(model, shape, routes) if routes else closed_form(model, shape)
        for part, value in (flops.prefill | {"floor": flops.floor}).items():
            mean[part] = mean.get(part, 0.0) + value * number / total
    record.flops_of_samples = mean


def _mean(model: VisionLanguageModel, shape: PromptShape, routes: Mapping[Hashable, int]) -> Flops:
    """The mean over routes, weighted by how many samples took each."""
    total, by_route = sum(routes.values()), []
    for route, number in routes.items():
        with model.fusion.force_route(route):
            by_route.append((number / total, closed_form(model, shape)))

    def mean(parts: Callable[[Flops], dict[str, float]]) -> dict[str, float]:
        return {name: sum(share * parts(flops)[name] for share, flops in by_route) for name in parts(by_route[0][1])}

    return Flops(
        prefill=mean(lambda flops: flops.prefill),
        decode=mean(lambda flops: flops.decode),
        causal_discount=sum(share * flops.causal_discount for share, flops in by_route),
        floor=by_route[0][1].floor,
    )


@dataclass(frozen=True)
class Measurement:
    """A counted record, and what is measured for it.

    ``model`` gives the model, on any device, when it is needed. ``route``: that samples take through the decoder while
    they are timed; by default the fusion's ``default_route``.
    """

    record: Record
    scenario: Scenario
    model: Callable[[], VisionLanguageModel]
    route: Hashable | None = None


def measure(
    measurements: Sequence[Measurement],
    *,
    device: torch.device,
    runs: int = TURNS,
    outputs: Sequence[int] = (),
    stages: Collection[str] | None = None,
    track: Track = iter,
) -> None:
    """Add what the clock and the allocator say to counted records; all models are timed in turns.

    Where that fails (the memory does not hold all of them at once), each is timed alone, in turns with its floor, and
    the record says so under the knob ``timed alone``. What cannot be measured so either has its reason as ``error``.
    No record is lost, and whoever sweeps goes on.

    Args:
        outputs: lengths of answers to time from end to end.
        stages: those that are timed; all by default.
        track: draws a progress bar over the stages.
    """
    attempt = partial(_attempt, device=device, runs=runs, outputs=outputs, stages=stages, track=track)
    with half_the_threads(device):
        for measurement in measurements:
            measurement.record.device = device_name(device)
        problem = attempt(measurements)
        if problem and len(measurements) > 1:
            for measurement in measurements:
                measurement.record.error = attempt([measurement])
                measurement.record.knobs["timed alone"] = f"all at once: {problem}"
        elif problem:
            measurements[0].record.error = problem


def _attempt(measurements: Sequence[Measurement], *, device: torch.device, **settings: Any) -> str:
    """Measure; the reason if that failed. On a GPU models stay only where several fit at once."""
    problem, models = "", []
    try:
        for measurement in measurements:
            models.append(measurement.model().to(device))
        _measure(measurements, models, device=device, **settings)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, what was counted stands
        problem = _problem(error)
    if device.type == "cuda" and (problem or len(models) == 1):
        for model in models:
            model.to("cpu")
        torch.cuda.empty_cache()
    return problem


def _problem(error: Exception) -> str:
    """In one line; what nobody foresees is logged whole."""
    full = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if full or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    log.warning("not measured, what was counted stands:", exc_info=error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _measure(
    measurements: Sequence[Measurement],
    models: Sequence[VisionLanguageModel],
    *,
    device: torch.device,
    runs: int,
    outputs: Sequence[int],
    stages: Collection[str] | None,
    track: Track,
) -> None:
    records = [measurement.record for measurement in measurements]
    shapes = [one.scenario.shape_for(model) for one, model in zip(measurements, models, strict=True)]
    contexts = [partial(computing, model, one.route, device) for one, model in zip(measurements, models, strict=True)]
    sizes = [weights_of(model) for model in models]
    contestants: list[Contestant] = []
    # As long as an outer autocast is open, an inner one keeps the weights that it has cast: no turn casts them anew.
    with torch.autocast(device.type, enabled=False):
        for record, model, shape, within, weights in zip(records, models, shapes, contexts, sizes, strict=True):
            with within():
                record.mib = prefill_memory(model, shape, device=device, others=sum(sizes) - weights)
        for model, shape, within in zip(models, shapes, contexts, strict=True):
            for one in model_and_floor(model, shape, device=device, outputs=outputs, within=within):
                contestants.append(one if stages is None else one.only(stages))
        pairs, waiting = _pairs(records, models), WaitMeter()
        times = time_in_turns(
            contestants,
            clock_of(device),
            pairs=pairs,
            turns=max(2, runs),  # percentiles want two
            shortest=shortest_turn(device),
            track=track,
            meter=waiting,
        )
        waited = waiting.share() if device.type == "cpu" else 0.0  # a GPU is not shared with what its host does
        if (meter := EnergyMeter.of(device)) is not None:
            for record, fused, bare in zip(records, contestants[::2], contestants[1::2], strict=True):
                of_floor = {f"floor_{stage}": joules for stage, joules in _joules(meter, bare).items()}
                record.joules = _joules(meter, fused) | of_floor
    for record, plain, floor in zip(records, times[::2], times[1::2], strict=True):
        record.waited = waited
        _note_times(record, plain | {f"floor_{stage}": milliseconds for stage, milliseconds in floor.items()})
    for (first, second), name in pairs.items():
        ours, theirs = times[first], times[second]
        both = {stage: ratio(ours[stage], theirs[stage]) for stage in ours if stage in theirs}
        records[first // 2].ratios[name] = {stage: [r.median, r.low, r.high] for stage, r in both.items()}


def _pairs(records: Sequence[Record], models: Sequence[VisionLanguageModel]) -> dict[tuple[int, int], str]:
    """The contestants that are compared, and what the other one is: each model (2 i) with its floor (2 i + 1), and with
    the first that concatenates in front of the same decoder: of another one a ratio would say nothing of the fusion."""
    pairs = {(2 * i, 2 * i + 1): "floor" for i in range(len(records))}
    decoders = [_decoder(record, model) for record, model in zip(records, models, strict=True)]
    concat: dict[Hashable, int] = {}
    for i, record in enumerate(records):
        if record.is_baseline:
            concat.setdefault(decoders[i], i)
    pairs |= {(2 * i, 2 * concat[own]): "concat" for i, own in enumerate(decoders) if concat.get(own, i) != i}
    return pairs


def _decoder(record: Record, model: VisionLanguageModel) -> Hashable:
    """What is equal for two models whose bare decoders do the same work on the text of their prompts, in the same way.

    The head is left out: checkpoints of one decoder pad their vocabularies differently.
    """
    language, layers_flops = model.language, record.flops_floor - record.flops.get("head", 0.0)
    kind = type(language.hf), record.dtype, language.quantization, language.width, len(language.layers)
    return *kind, language.attention, language.compiled is None, record.text_tokens, layers_flops


@contextmanager
def computing(model: VisionLanguageModel, route: Hashable | None, device: torch.device) -> Iterator[None]:
    """How models are timed: tower and projector compute in the decoder's dtype, and all samples take one route.

    Args:
        route: None: the fusion's own.
    """
    dtype = model.language.hf.dtype
    computes = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with computes, model.fusion.force_route(model.fusion.default_route if route is None else route):
        yield


def _joules(meter: EnergyMeter, contestant: Contestant) -> dict[str, float]:
    """Of what a user waits for: the first token, and whole answers."""
    counted = [name for name in contestant.stages if name == "first_token" or name.startswith("end_to_end")]
    with torch.no_grad(), contestant.within():
        return {name: meter.joules(contestant.stages[name]) for name in counted}


def _note_times(record: Record, times: Mapping[str, Sequence[float]]) -> None:
    for stage, milliseconds in times.items():
        middle, deciles = estimate(milliseconds), quantiles(milliseconds, n=10, method="inclusive")
        record.milliseconds[stage] = [middle.median, deciles[0], deciles[8]]
        record.intervals[stage] = [middle.low, middle.high]
        record.turns[stage] = middle.count


def saving(record: Record, baseline: Record, *, with_vision: bool) -> tuple[float, float]:
    """Percent of the baseline's FLOPs that a method saves, and the ceiling: what fusion at no cost would save."""
    return _saving(record.flops | {"floor": record.flops_floor}, baseline.flops, with_vision=with_vision)


def saving_of_samples(record: Record, baseline: Record, *, with_vision: bool) -> tuple[float, float]:
    """The same of the means over samples."""
    return _saving(record.flops_of_samples, baseline.flops_of_samples, with_vision=with_vision)


def _saving(ours: Mapping[str, float], theirs: Mapping[str, float], *, with_vision: bool) -> tuple[float, float]:
    left_out = {"floor"} if with_vision else {"floor", "vision_encoder"}
    own, base = (sum(value for part, value in flops.items() if part not in left_out) for flops in (ours, theirs))
    ceiling = ours["floor"] + (ours["vision_encoder"] if with_vision else 0.0)
    return 100 * (1 - own / base), 100 * (1 - ceiling / base)

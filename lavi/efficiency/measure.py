"""A recipe and a scenario in, a record out: the way of every measurement."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict

import torch

from lavi.configurations import without_weights
from lavi.efficiency import record
from lavi.efficiency.flops import Flops, closed_form
from lavi.efficiency.latency import stage_times
from lavi.efficiency.memory import prefill_memory
from lavi.efficiency.point import Point, Scenario
from lavi.efficiency.record import Record
from lavi.model import VisionLanguageModel
from lavi.recipe import TARGET, Recipe
from lavi.weights import versions

CONCAT = {TARGET: "lavi.fusion.concat.ConcatFusion"}


def concat_twin(recipe: Recipe) -> Recipe:
    """The same recipe with all tokens concatenated in place of its fusion: what every method is measured against."""
    twin = recipe.replaced("model.fusion", dict(CONCAT))
    if twin.settings["model"].get("reducer") is not None:
        twin = twin.replaced("model.reducer", None)
    twin.settings["name"] = f"{recipe.settings['name']} (concat)" if "name" in recipe.settings else "concat"
    return twin


def method_name(recipe: Recipe) -> str:
    """``lavi``, ``concat``, ``concat+visionzip``: the files that the fusion, and what reduces before it, live in."""
    parts = [recipe.settings["model"]["fusion"], recipe.settings["model"].get("reducer")]
    return "+".join(str(part[TARGET]).split(".")[-2] for part in parts if part is not None)


def is_concat(recipe: Recipe) -> bool:
    """Whether it is a baseline itself: all tokens, concatenated."""
    return method_name(recipe) == "concat"


def build_on(recipe: Recipe, device: torch.device | str) -> VisionLanguageModel:
    """A model of this recipe on ``device`` with random weights; on ``meta`` in a second even at full size.

    Adapters are left out: an answer is given by the weights they were merged into.
    """
    if recipe.settings["model"]["language"].get("lora") is not None:
        recipe = recipe.replaced("model.language.lora", None)
    with torch.random.fork_rng(), without_weights(), torch.device(device):
        model: VisionLanguageModel = recipe.build("model")
    if model.language.hf.device.type == "meta":  # where ids have no values that padding could be looked for in
        model.language.hf.config.pad_token_id = None
    return model.eval()


def count(
    recipe: Recipe, model: VisionLanguageModel, scenario: Scenario, ways: Mapping[Hashable, int] | None = None
) -> Record:
    """FLOPs of one scenario. ``model`` may be on meta.

    Args:
        ways: how often samples went each way through the decoder; the record is their mean, its knob ``ways`` has the
            share of each.
    """
    point = scenario.at(model)
    flops = _mean(model, point, ways) if ways else closed_form(model, point)
    total = sum(ways.values()) if ways else 0
    return Record(
        knobs={"ways": {str(way): number / total for way, number in ways.items()}} if ways else {},
        method=method_name(recipe),
        text_tokens=point.text,
        visual_tokens=point.views * point.per_view,
        visual_tokens_in_language=point.inside(model),
        views=point.encoded,
        batch=point.batch,
        flops=flops.prefill,
        flops_floor=flops.floor,
        flops_causal_discount=flops.causal_discount,
        decode_flops=flops.decode,
        dtype=str(model.language.hf.dtype).removeprefix("torch."),
        attention=model.language.attention,
        versions=versions(),
        commit=record.commit(),
        seed=recipe.settings.get("seed"),
        recipe=recipe.source,
    )


def _mean(model: VisionLanguageModel, point: Point, ways: Mapping[Hashable, int]) -> Flops:
    total, found = sum(ways.values()), []
    for way, number in ways.items():
        with model.fusion.going(way):
            found.append((number / total, closed_form(model, point)))

    def mean(parts: Callable[[Flops], dict[str, float]]) -> dict[str, float]:
        return {name: sum(share * parts(flops)[name] for share, flops in found) for name in parts(found[0][1])}

    return Flops(
        prefill=mean(lambda flops: flops.prefill),
        decode=mean(lambda flops: flops.decode),
        causal_discount=sum(share * flops.causal_discount for share, flops in found),
        floor=found[0][1].floor,
    )


def measure(
    made: Record,
    model: VisionLanguageModel,
    scenario: Scenario,
    *,
    device: torch.device,
    runs: int = 20,
    outputs: Sequence[int] = (),
    way: Hashable | None = None,
) -> Record:
    """Add what the clock and the allocator say to a counted record; ``model`` is on ``device``.

    Args:
        way: that samples go through the decoder while they are timed; by default the one that was counted.

    Where the memory does not suffice the record says so, and whoever sweeps goes on.
    """
    point, dtype = scenario.at(model), model.language.hf.dtype
    made.device = record.device_name(device)
    computes = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # tower and projector as the decoder
    try:
        with computes, model.fusion.going(model.fusion.counted_way if way is None else way):
            times = stage_times(model, point, device=device, runs=runs, outputs=outputs)
            made.mib = prefill_memory(model, point, device=device)
        made.milliseconds = {stage: list(asdict(t).values()) for stage, t in times.items()}
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        made.error = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return made


def saving(made: Record, baseline: Record, *, with_vision: bool) -> tuple[float, float]:
    """Percent of the baseline's FLOPs that a method saves, and the ceiling: what fusion at no cost would save."""
    vision = made.flops["vision_encoder"] / 1e9 if with_vision else 0.0
    base = baseline.gflops_total if with_vision else baseline.gflops_language
    own = made.gflops_total if with_vision else made.gflops_language
    return 100 * (1 - own / base), 100 * (1 - (vision + made.flops_floor / 1e9) / base)

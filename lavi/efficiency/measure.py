"""A recipe and a point in, a record out: the way of every measurement."""

from __future__ import annotations

from dataclasses import asdict

import torch

from lavi.efficiency import record
from lavi.efficiency.flops import closed_form, tokens_inside, views_for
from lavi.efficiency.latency import stage_times
from lavi.efficiency.memory import prefill_memory
from lavi.efficiency.record import Record
from lavi.model import VisionLanguageModel
from lavi.recipe import TARGET, Recipe
from lavi.weights import versions

CONCAT = {TARGET: "lavi.fusion.concat.ConcatFusion"}


def concat_twin(recipe: Recipe) -> Recipe:
    """The same recipe with token concatenation in place of its fusion: what every method is measured against."""
    return recipe.replaced("model.fusion", dict(CONCAT))


def method_name(recipe: Recipe) -> str:
    """``lavi``, ``concat``: the file the fusion lives in."""
    return str(recipe.settings["model"]["fusion"][TARGET]).split(".")[-2]


def build_on(recipe: Recipe, device: torch.device | str) -> VisionLanguageModel:
    """A model of this recipe on ``device``; on ``meta`` from configurations alone, in a second even at full size."""
    with torch.device(device):
        model: VisionLanguageModel = recipe.build("model")
    return model.eval()


def count(recipe: Recipe, model: VisionLanguageModel, *, text: int, visual: int) -> Record:
    """FLOPs of one point. ``model`` may be on meta."""
    views = views_for(model, visual)
    flops = closed_form(model, text=text, visual=visual, views=views)
    return Record(
        method=method_name(recipe),
        text_tokens=text,
        visual_tokens=visual,
        visual_tokens_in_language=tokens_inside(model, visual),
        views=views,
        flops=flops.components,
        flops_floor=flops.floor,
        flops_causal_discount=flops.causal_discount,
        dtype=str(model.language.hf.dtype).removeprefix("torch."),
        attention=model.language.attention,
        versions=versions(),
        commit=record.commit(),
        seed=recipe.settings.get("seed"),
        recipe=recipe.source,
    )


def measure(made: Record, model: VisionLanguageModel, *, device: torch.device, runs: int = 20) -> Record:
    """Add what the clock and the allocator say at the point of a counted record; ``model`` is on ``device``."""
    point = {"text": made.text_tokens, "visual": made.visual_tokens, "views": made.views}
    times = stage_times(model, **point, device=device, runs=runs)
    made.milliseconds = {stage: list(asdict(t).values()) for stage, t in times.items()}
    made.mib = prefill_memory(model, **point, device=device)
    made.device = record.device_name(device)
    return made


def saving(made: Record, baseline: Record, *, with_vision: bool) -> tuple[float, float]:
    """Percent of the baseline's FLOPs that a method saves, and the ceiling: what fusion at no cost would save."""
    vision = made.flops["vision_encoder"] / 1e9 if with_vision else 0.0
    base = baseline.gflops_total if with_vision else baseline.gflops_language
    own = made.gflops_total if with_vision else made.gflops_language
    return 100 * (1 - own / base), 100 * (1 - (vision + made.flops_floor / 1e9) / base)

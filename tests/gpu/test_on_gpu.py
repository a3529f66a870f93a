"""The oracles that a GPU could break: other kernels, bf16, device events."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ask, awaken, collate

from lavi.efficiency.measure import Measurement, build_on, count, measure
from lavi.efficiency.scenario import Scenario
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.recipe import Recipe
from lavi.visor.fusion import VisorFusion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

SAMPLES = [ask(1, "what colour is the circle?", answer="red"), ask("is there a blue square?", answer="yes")]


@pytest.mark.parametrize(
    "fusion",
    [
        LaViFusion,
        ConcatFusion,
        CrossAttentionFusion,
        partial(VisorFusion, cross_attention=2, self_attention=1),
        partial(FastV, layer=1),
    ],
)
def test_the_gpu_says_what_the_cpu_says(build, fusion) -> None:  # type: ignore[no-untyped-def]
    model = build(fusion())
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        expected = model(batch)
        seen = model.cuda()(batch.to("cuda")).cpu()
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)


def test_zero_deltas_are_the_language_model_bit_for_bit_in_bf16(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2), dtype="bfloat16").cuda()
    batch = collate(model, SAMPLES).to("cuda")
    bare = model.language.hf(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions(batch)
    )
    with torch.no_grad():
        assert torch.equal(model(batch), bare.logits)


def positions(batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def test_measuring_reads_the_gpu(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    model, scenario = build_on(recipe, "cuda"), Scenario(12, visual_tokens=64)
    made = count(recipe, model, scenario)
    measure([Measurement(made, scenario, lambda: model)], device=torch.device("cuda"), runs=5, outputs=[1, 4])
    assert made.device == torch.cuda.get_device_name()
    assert made.mib["peak"] > 0
    assert all(median > 0 for median, _, _ in made.milliseconds.values())

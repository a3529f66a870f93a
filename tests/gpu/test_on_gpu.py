"""The oracles that a GPU could break: other kernels, bf16, device events, an allocator.

On a CPU they run where ``LAVI_CHECK_ON=cpu`` is set (``make gpu-check DEVICE=cpu``): what fails there would fail on a
GPU, too.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOWER, ask, awaken, collate

import lavi.nn.norm_kernel as kernel
from lavi.batch import Layout
from lavi.efficiency.latency import half_the_threads
from lavi.efficiency.measure import Measurement, build_on, count, measure
from lavi.efficiency.memory import prefill_memory
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import Scenario
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV
from lavi.fusion.shortv import ShortV
from lavi.fusion.vica import ViCA
from lavi.language.compiled import DecodeCompiler
from lavi.recipe import Recipe
from lavi.vision.frame_merging import FrameMerging
from lavi.vision.hf import HFVision
from lavi.vision.reduced import ReducedTower
from lavi.vision.repeated_patches import RepeatedPatches
from lavi.vision.tiles_on_request import TilesOnRequest
from lavi.vision.token_merging import TokenMerging
from lavi.visor.fusion import VisorFusion

DEVICE = torch.device(os.environ.get("LAVI_CHECK_ON", "cuda"))
there = DEVICE.type == "cpu" or torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not there, reason="there is no GPU here")]

SAMPLES = [ask(1, "what colour is the circle?", answer="red"), ask("is there a blue square?", answer="yes")]


@pytest.mark.parametrize(
    "fusion",
    [
        LaViFusion,
        partial(LaViFusion, fused_norm=True),
        ConcatFusion,
        CrossAttentionFusion,
        partial(CASA, every=2),
        partial(LateInjection, first=1, last=2, stages={1: 0.5}),
        partial(VisorFusion, cross_attention=2, self_attention=1),
        partial(FastV, layer=1),
        partial(ShortV, layers=[1, 2]),
        partial(ViCA, layers=[1, 2]),
        partial(DeepStackFusion, levels=3),
    ],
)
def test_the_gpu_says_what_the_cpu_says(build, fusion) -> None:  # type: ignore[no-untyped-def]
    model = build(fusion())
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        expected = model(batch)
        seen = model.to(DEVICE)(batch.to(DEVICE)).cpu()
    torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_towers_on_fewer_tokens_give_on_the_gpu_what_they_give_on_the_cpu() -> None:
    """Images with tiles, images that repeat themselves, and videos in one batch; in bf16 no more than that it runs."""
    merging = TokenMerging(per_block=3)
    towers = [
        ReducedTower(tower=HFVision(config=TOWER), reductions=[FrameMerging(keep=0.5, behind=0), merging]),
        ReducedTower(tower=HFVision(config=TOWER), reductions=[RepeatedPatches(), merging]),
        TilesOnRequest(tower=HFVision(config=TOWER), keep=0.5),
    ]
    layouts = [Layout(), Layout(views=5, tiles=(2, 2), size=(60, 64)), Layout(views=4, video=True)]
    for vision in towers:
        vision.eval()
        pixels = torch.randn(10, *vision.pixel_shape, generator=torch.Generator().manual_seed(0))
        pixels[0, :, :16] = 0
        expected = vision(pixels, layouts)
        seen = vision.to(DEVICE)(pixels.to(DEVICE), layouts).cpu()
        torch.testing.assert_close(seen, expected, atol=1e-3, rtol=1e-3)
        in_half = vision.to(torch.bfloat16)(pixels.to(DEVICE, torch.bfloat16), layouts)
        assert bool(in_half.isfinite().all())


@pytest.mark.parametrize("fusion", [LaViFusion, ConcatFusion])
def test_compiled_answers_are_those_of_single_steps(build, fusion) -> None:  # type: ignore[no-untyped-def]
    model = build(fusion(), initializer_range=0.3, tie_word_embeddings=False).to(DEVICE)
    awaken(model.fusion)
    batch = collate(model, SAMPLES, prompt=True, pad_left=True).to(DEVICE)
    expected = model.generate(batch, max_new_tokens=8, eos_token_id=None)
    model.language.compiled = DecodeCompiler()
    for _ in range(2):
        assert model.generate(batch, max_new_tokens=8, eos_token_id=None) == expected


def test_zero_deltas_are_the_language_model_bit_for_bit_in_bf16(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2), dtype="bfloat16").to(DEVICE)
    batch = collate(model, SAMPLES).to(DEVICE)
    bare = model.language.hf(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions(batch)
    )
    with torch.no_grad():
        assert torch.equal(model(batch), bare.logits)


def positions(batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("affine", range(len(kernel.NAMES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_modulated_norm_is_that_of_fp64(affine: int, dtype: torch.dtype) -> None:
    """In both directions, of rows as wide as a 7B model's."""
    generator = torch.Generator().manual_seed(0)
    x, dgamma, dbeta, grad = (torch.randn(7, 3584, generator=generator) for _ in range(4))
    weight, bias = torch.randn(2, 3584, generator=generator).to(dtype)
    given = [x.to(dtype), weight, dgamma, dbeta, *([bias] if affine == kernel.LAYER else [])]
    ours = [tensor.to(DEVICE).requires_grad_() for tensor in given]
    exact = [tensor.to(DEVICE).double().requires_grad_() for tensor in given]
    x, weight, dgamma, dbeta, *biases = ours
    y = torch.ops.lavi.modulated_norm(x, weight, biases[0] if biases else None, dgamma, dbeta, 1e-6, affine)[0]
    x, weight, dgamma, dbeta, *biases = exact
    x = x - x.mean(-1, keepdim=True) if biases else x
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    true = x * scale * (weight + (affine == kernel.PLUS_ONE) + dgamma) + sum(biases, dbeta)
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    grad = grad.to(DEVICE)
    got, wanted = torch.autograd.grad(y, ours, grad.to(y.dtype)), torch.autograd.grad(true, exact, grad.double())
    for one, other in zip((y, *got), (true, *wanted), strict=True):
        assert float((one.double() - other).norm() / other.norm()) < close


def test_measuring_reads_the_device(tiny_recipe: Path) -> None:
    recipe = Recipe.load(tiny_recipe)
    model, scenario = build_on(recipe, DEVICE), Scenario(12, visual_tokens=64)
    made = count(recipe, model, scenario)
    measure([Measurement(made, scenario, lambda: model)], device=DEVICE, runs=5, outputs=[1, 4])
    with half_the_threads(DEVICE):
        assert made.device == device_name(DEVICE)
    assert {"vision_encoder", "prefill", "decode", "end_to_end_4", "floor_prefill"} <= set(made.milliseconds)
    assert made.mib["peak"] > 0


@pytest.mark.parametrize("fusion", [LaViFusion, ConcatFusion])
def test_the_estimated_peak_is_the_allocator_s(build, fusion) -> None:  # type: ignore[no-untyped-def]
    """Within 10 %, of a prompt that is long enough for an allocator's rounding not to matter."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    model, shapes = build(fusion(), **sizes).to(DEVICE), build(fusion(), **sizes).to("meta")
    scenario = Scenario(200, batch=16, visual_tokens=64)
    told = prefill_memory(shapes, scenario.shape_for(shapes), device=torch.device("meta"))["peak"]
    seen = prefill_memory(model, scenario.shape_for(model), device=DEVICE)["peak"]
    assert told == pytest.approx(seen, rel=0.1)

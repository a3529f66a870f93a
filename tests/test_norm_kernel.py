"""The modulated norm as one operator: the plain formula, its gradients, and the Triton kernel in its interpreter."""

from __future__ import annotations

from typing import Any

import norm as benchmark
import pytest
import torch
from conftest import awaken, small
from processes import run_in_triton_s_interpreter
from torch import Tensor

import lavi.nn.norm_kernel as kernel
from lavi.fusion.lavi import LaViFusion
from lavi.nn.modulated_norm import AFFINES, ModulatedNorm

AFFINE = range(len(AFFINES))
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
DTYPES += [(torch.float16, torch.float16), (torch.float16, torch.float32)]
"""Of the input and of the weight."""


def inputs(of_x: torch.dtype, of_weight: torch.dtype, *, width: int = 24) -> list[Tensor]:
    """x, weight, bias, dgamma and dbeta."""
    generator = torch.Generator().manual_seed(0)
    x, dgamma, dbeta = (torch.randn(2, 5, width, generator=generator) for _ in range(3))
    both = torch.cat([dgamma, dbeta], dim=-1)  # rows that lie apart, as a generator gives them
    dgamma, dbeta = both.split(width, dim=-1)
    weight, bias = torch.randn(2, width, generator=generator).to(of_weight)
    return [(3 * x + 1).to(of_x), weight, bias, dgamma, dbeta]


def given_to(affine: int, tensors: list[Tensor]) -> list[Tensor | None]:
    """A bias is a layer norm's alone."""
    return [tensor if place != 2 or affine == kernel.LAYER else None for place, tensor in enumerate(tensors)]


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, dgamma: Tensor, dbeta: Tensor, eps: float, affine: int
) -> Tensor:
    """Written out: what Llama, OLMo-2, Gemma and GPT-2 do with their weight, then the deltas, rounded on their own."""
    wide = x.float()
    if affine == kernel.LAYER:
        wide = wide - wide.mean(-1, keepdim=True)
    xhat = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = [
        weight * xhat.to(x.dtype),
        (weight * xhat).to(x.dtype),
        (xhat * (1 + weight.float())).to(x.dtype),
        (xhat * weight.float() + (0.0 if bias is None else bias.float())).to(x.dtype),
    ][affine]
    return y + (dgamma * xhat + dbeta).to(y.dtype)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_operator_is_the_plain_formula(affine: int, dtypes: Any) -> None:
    given = given_to(affine, inputs(*dtypes))
    y, mean, scale = torch.ops.lavi.modulated_norm(*given, 1e-3, affine)
    expected = plain(*given, 1e-3, affine)  # type: ignore[arg-type]
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    x = given[0].float()  # type: ignore[union-attr]
    torch.testing.assert_close(mean, x.mean(-1) * (affine == kernel.LAYER))
    torch.testing.assert_close(scale, 1 / ((x - mean[..., None]).square().mean(-1) + 1e-3).sqrt())


@pytest.mark.parametrize("affine", AFFINE)
def test_its_gradients_are_those_of_the_plain_formula(affine: int) -> None:
    given = given_to(affine, [t.clone().requires_grad_() for t in inputs(torch.float32, torch.float32)])
    wanted = [tensor for tensor in given if tensor is not None]
    ours = torch.autograd.grad(torch.ops.lavi.modulated_norm(*given, 1e-3, affine)[0].square().sum(), wanted)
    theirs = torch.autograd.grad(plain(*given, 1e-3, affine).square().sum(), wanted)  # type: ignore[arg-type]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", AFFINE)
def test_it_is_a_whole_operator(affine: int) -> None:
    """Its shapes on meta, its aliases and its gradient are what torch wants of an operator."""
    given = given_to(affine, [t.contiguous().requires_grad_() for t in inputs(torch.float32, torch.float32)])
    torch.library.opcheck(kernel.modulated_norm, (*given, 1e-3, affine))


CHECK = """
import torch
import lavi.nn.norm_kernel as kernel
from test_norm_kernel import AFFINE, DTYPES, given_to, inputs, plain
assert kernel.INTERPRETED
TOLERANCE = {torch.bfloat16: (2e-2, 3e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-4, 1e-4)}
for width in (24, 64, 130):
    for affine in AFFINE:
        for dtypes in DTYPES:
            given = given_to(affine, inputs(*dtypes, width=width))
            assert kernel.runs_kernel(given[0])
            y = torch.ops.lavi.modulated_norm(*given, 1e-3, affine)[0]
            expected = plain(*given, 1e-3, affine)
            assert y.dtype == expected.dtype
            # The interpreter cuts the places of bf16 off, where a GPU rounds them; one place of fp16 is rounding.
            places = {torch.bfloat16: {"rtol": 1.6e-2, "atol": 3.2e-2}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}
            torch.testing.assert_close(y, expected, **places.get(dtypes[0], {}))
            double = [None if tensor is None else tensor.double().requires_grad_() for tensor in given]
            ours = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given]
            y = torch.ops.lavi.modulated_norm(*ours, 1e-3, affine)[0]
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
            got = torch.autograd.grad(y, [tensor for tensor in ours if tensor is not None], grad)
            x, weight, bias, dgamma, dbeta = double
            if affine == kernel.LAYER:
                x = x - x.mean(-1, keepdim=True)
            xhat = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
            exact = xhat * (weight + (affine == kernel.PLUS_ONE) + dgamma) + dbeta + (0 if bias is None else bias)
            wanted = [tensor for tensor in double if tensor is not None]
            for one, true in zip(got, torch.autograd.grad(exact, wanted, grad.double()), strict=True):
                coarsest = max((one.dtype, *dtypes), key=TOLERANCE.get)
                rtol, atol = TOLERANCE[coarsest]
                torch.testing.assert_close(one.double(), true, rtol=rtol, atol=atol)
"""


@pytest.mark.skipif(not kernel.HAS_TRITON, reason="Triton is not on this machine")
def test_the_kernel_in_triton_s_interpreter() -> None:
    run_in_triton_s_interpreter(CHECK)


def test_lavi_asks_for_it_away_from_the_cpu(build: Any) -> None:
    model = build(LaViFusion(every=2, generator=small(), fused_norm=True))
    awaken(model.fusion)
    norms = [target.norm for target in model.fusion.modulated_norms]
    assert all(isinstance(norm, ModulatedNorm) and norm.fused is kernel.fused for norm in norms)
    x, _, _, dgamma, dbeta = inputs(torch.float32, torch.float32, width=32)
    norms[0].deltas = (dgamma, dbeta)
    on_cpu = norms[0](x)
    with torch.no_grad():
        torch.testing.assert_close(kernel.fused(x, norms[0].weight, None, (dgamma, dbeta), norms[0].kind), on_cpu)
    norms[0].to("meta")
    with pytest.MonkeyPatch.context() as patch:
        asked: list[torch.Size] = []
        patch.setattr(norms[0], "fused", lambda x, *_: asked.append(x.shape) or x, raising=False)
        norms[0].deltas = (dgamma.to("meta"), dbeta.to("meta"))
        norms[0](x.to("meta"))
        assert asked == [x.shape]


@pytest.mark.parametrize("family", ["gpt2", "phi", "stablelm", "cohere"])
def test_layer_norms_are_the_operator_s_too(build: Any, family: str) -> None:
    model = build(LaViFusion(every=2, generator=small(), fused_norm=True), family=family)
    norm: Any = model.fusion.modulated_norms[0].norm
    assert norm.kind.affine == "layer norm"
    assert not norm.kind.exact
    x, _, _, dgamma, dbeta = inputs(torch.float32, torch.float32, width=32)
    norm.deltas = (dgamma, dbeta)
    with torch.no_grad():
        at_once = kernel.fused(x, norm.weight, getattr(norm, "bias", None), (dgamma, dbeta), norm.kind)
        torch.testing.assert_close(at_once, norm(x), rtol=1e-4, atol=1e-4)


def test_the_benchmark_measures_all_ways() -> None:
    records = benchmark.measure(torch.device("cpu"), width=32, tokens=4, turns=1)
    assert len(records) == 6
    columns, rows = benchmark.norm_table(records)
    assert {len(row) for row in rows} == {len(columns)}
    forward = [benchmark.least_bytes(way, "forward", 10, 3, 2) for way in (benchmark.BARE, benchmark.AT_ONCE)]
    assert forward == [2 * 10 * 3 * 2, 2 * 10 * 3 * 2 + 2 * 10 * 3 * 4]

"""LaVi's modulated norm in one pass: ``affine(xhat) + (dgamma * xhat + dbeta)``, forward and backward.

    x (rows, D) ---> xhat = (x - mean) / deviation ---> affine, as the family rounds it ---+---> y
                          |                                                                |
    dgamma, dbeta (rows, D) fp32 ---> dgamma * xhat + dbeta, rounded to y -----------------+

The mean stays in root-mean-square norms, and is taken off by layer norms, whose affine part may have a bias.

An operator of torch (``lavi::modulated_norm``) with its gradient and its shapes on meta. On a GPU a Triton kernel runs,
elsewhere the plain formula, which is what the kernel is held against. A kernel adds up squares in another order than
torch does: its output is the plain one's to rounding, and not to the last bit.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from lavi.nn.modulated_norm import AFFINES, NormKind, normalise

NAMES = tuple(AFFINES)
"""An operator takes numbers: the number of an affine formula is its place here."""
BEHIND, BEFORE, PLUS_ONE, LAYER = range(4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, line by line: for tests."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
WIDEST = 2**16
"""D that one block of a kernel holds."""


def runs_kernel(x: Tensor) -> bool:
    """Whether the Triton kernel serves this input."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.shape[-1] <= WIDEST


def _statistics(x: Tensor, eps: float, affine: int) -> tuple[Tensor, Tensor]:
    """Mean of each row (...), 0 of a root-mean-square norm, and 1 / its deviation from it."""
    x = x.float()
    mean = x.mean(-1) if affine == LAYER else x.new_zeros(x.shape[:-1])
    return mean, torch.rsqrt((x - mean[..., None]).square().mean(-1) + eps)


def _dtype_of_output(x: Tensor, weight: Tensor, affine: int) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if affine == BEHIND else x.dtype


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: tuple[Tensor, Tensor], kind: NormKind) -> Tensor:
    """A norm of a known formula with its deltas (dgamma, dbeta), by one operator."""
    assert kind.affine is not None
    y: Tensor = torch.ops.lavi.modulated_norm(x, weight, bias, *deltas, kind.eps, NAMES.index(kind.affine))[0]
    return y


@torch.library.custom_op("lavi::modulated_norm", mutates_args=())
def modulated_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, dgamma: Tensor, dbeta: Tensor, eps: float, affine: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's output (..., D); mean and 1 / deviation of each row (...) in fp32, the mean 0 where it stays.

    Args:
        x: (..., D).
        weight: (D,).
        bias: (D,), of a layer norm.
        dgamma, dbeta: (..., D), fp32.
        affine: the number of one of :data:`lavi.nn.modulated_norm.AFFINES`.
    """
    if runs_kernel(x):
        from lavi.nn.norm_triton import forward

        return forward(x, weight, bias, dgamma, dbeta, eps, affine, _dtype_of_output(x, weight, affine))
    mean, scale = _statistics(x, eps, affine)
    xhat = normalise(x, eps, centred=affine == LAYER)
    y = AFFINES[NAMES[affine]](xhat, weight, bias, x.dtype)
    return y + torch.addcmul(dbeta, dgamma, xhat).to(y.dtype), mean, scale


@modulated_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, dgamma: Tensor, dbeta: Tensor, eps: float, affine: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=_dtype_of_output(x, weight, affine))
    mean, scale = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y, mean, scale


@torch.library.custom_op("lavi::modulated_norm_backward", mutates_args=())
def modulated_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dgamma: Tensor, mean: Tensor, scale: Tensor, affine: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of ``dgamma``; that of ``dbeta`` is the output's own, in fp32."""
    if runs_kernel(x):
        from lavi.nn.norm_triton import backward

        return backward(grad, x, weight, dgamma, mean, scale, affine)
    xhat, grad = (x.float() - mean[..., None]) * scale[..., None], grad.float()
    of_xhat = grad * (weight.float() + float(affine == PLUS_ONE) + dgamma)
    of_x = of_xhat - (of_xhat * xhat).mean(-1, keepdim=True) * xhat
    if affine == LAYER:
        of_x = of_x - of_xhat.mean(-1, keepdim=True)
    return (scale[..., None] * of_x).to(x.dtype), grad * xhat


@modulated_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, dgamma: Tensor, mean: Tensor, scale: Tensor, affine: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, dgamma, _, _, ctx.affine = inputs
    ctx.of_bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, dgamma, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, dgamma, mean, scale = ctx.saved_tensors
    of_x, of_dgamma = torch.ops.lavi.modulated_norm_backward(grad, x, weight, dgamma, mean, scale, ctx.affine)
    of_weight = of_dgamma.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
    of_dbeta = grad.float()
    of_bias = of_dbeta.flatten(0, -2).sum(0).to(ctx.of_bias) if ctx.needs_input_grad[2] else None
    return of_x, of_weight, of_bias, of_dgamma, of_dbeta, None, None


modulated_norm.register_autograd(_backward, setup_context=_keep)

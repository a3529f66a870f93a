"""The Triton kernels of :mod:`lavi.nn.norm_kernel`: one program a row, its whole width in one block."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(x_at, weight_at, bias_at, dgamma_at, dbeta_at, y_at, mean_at, scale_at, dgamma_stride, dbeta_stride, width,
             eps, AFFINE: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    given = tl.load(x_at + row * width + column, mask=inside, other=0.0)
    x = given.to(tl.float32)
    mean = 0.0
    if AFFINE == 3:
        mean = tl.sum(x, axis=0) / width
        x = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    xhat = x * scale
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
    if AFFINE == 0:
        base = weight * xhat.to(given.dtype).to(tl.float32)
    elif AFFINE == 2:
        base = xhat * (1.0 + weight)
    else:
        base = weight * xhat
    if BIAS:
        base += tl.load(bias_at + column, mask=inside, other=0.0).to(tl.float32)
    dgamma = tl.load(dgamma_at + row * dgamma_stride + column, mask=inside, other=0.0)
    dbeta = tl.load(dbeta_at + row * dbeta_stride + column, mask=inside, other=0.0)
    kind = y_at.dtype.element_ty
    # Both parts are rounded before they are added, as torch rounds them.
    y = base.to(kind).to(tl.float32) + (dgamma * xhat + dbeta).to(kind).to(tl.float32)
    tl.store(y_at + row * width + column, y.to(kind), mask=inside)
    tl.store(mean_at + row, mean)
    tl.store(scale_at + row, scale)


@triton.jit
def _backward(grad_at, x_at, weight_at, dgamma_at, mean_at, scale_at, of_x_at, of_dgamma_at, dgamma_stride, width,
              PLUS: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    grad = tl.load(grad_at + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + row)
    x = tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (x - tl.load(mean_at + row)) * scale, 0.0)
    weight = tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32) + PLUS
    dgamma = tl.load(dgamma_at + row * dgamma_stride + column, mask=inside, other=0.0)
    of_xhat = grad * (weight + dgamma)
    of_x = of_xhat - tl.sum(of_xhat * xhat, axis=0) / width * xhat
    if CENTRED:
        of_x -= tl.sum(of_xhat, axis=0) / width
    tl.store(of_x_at + at, (scale * of_x).to(of_x_at.dtype.element_ty), mask=inside)
    tl.store(of_dgamma_at + at, grad * xhat, mask=inside)


def _rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D), each row in one piece; rows may lie apart, as the deltas of several norms do."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _settings(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dgamma: Tensor,
    dbeta: Tensor,
    eps: float,
    affine: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lavi.nn.norm_kernel.modulated_norm`; ``dtype`` of the output."""
    width = x.shape[-1]
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, scale = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    b = weight if bias is None else bias
    dgamma, dbeta = _rows(dgamma), _rows(dbeta)
    settings = {"AFFINE": affine, "BIAS": bias is not None, **_settings(width)}
    if x.numel():
        with torch.cuda.device_of(x):  # not the current device, which may be another
            _forward[(x.numel() // width,)](
                x, weight, b, dgamma, dbeta, y, mean, scale, dgamma.stride(0), dbeta.stride(0), width, eps, **settings
            )
    return y, mean, scale


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, dgamma: Tensor, mean: Tensor, scale: Tensor, affine: int
) -> tuple[Tensor, Tensor]:
    """As :func:`lavi.nn.norm_kernel.modulated_norm_backward`."""
    width = x.shape[-1]
    x, grad = x.contiguous(), grad.contiguous()
    of_x, of_dgamma = torch.empty_like(x), torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dgamma = _rows(dgamma)
    settings = {"PLUS": float(affine == 2), "CENTRED": affine == 3, **_settings(width)}
    if x.numel():
        with torch.cuda.device_of(x):
            _backward[(x.numel() // width,)](
                grad, x, weight, dgamma, mean, scale, of_x, of_dgamma, dgamma.stride(0), width, **settings
            )
    return of_x, of_dgamma

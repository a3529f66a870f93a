"""A norm whose affine parameters take deltas for the time of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Deltas = tuple[Tensor | None, Tensor | None]
"""(dgamma, dbeta), each (B, T, D) fp32, or None."""


def normalise(x: Tensor, eps: float, *, centred: bool) -> Tensor:
    """xhat(x) in fp32: ``x`` (..., D) over its root mean square, after its mean is taken off if ``centred``."""
    x = x.float()
    if centred:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _with_bias(xhat: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = xhat * weight.float()
    return (y if bias is None else y + bias.float()).to(dtype)


Affine = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""xhat (..., D) in fp32, weight and bias (D,) and the dtype of the norm's input, to its output."""

AFFINES: dict[str, Affine] = {
    "weight behind the cast": lambda xhat, weight, bias, dtype: weight * xhat.to(dtype),  # Llama, Qwen, Mistral
    "weight before the cast": lambda xhat, weight, bias, dtype: (weight * xhat).to(dtype),  # OLMo-2
    "1 + weight": lambda xhat, weight, bias, dtype: (xhat * (1.0 + weight.float())).to(dtype),  # Gemma
    "layer norm": _with_bias,  # GPT-2, Phi
}
"""What families do with xhat; they cast at different points, and so round differently."""


class NormKind(NamedTuple):
    """What a norm computes."""

    eps: float
    centred: bool
    """It takes the mean off: a layer norm."""
    affine: str | None = None
    """Which of :data:`AFFINES` gives its output; None: none of them does."""

    @property
    def exact(self) -> bool:
        """Whether it does to the last bit: torch adds up a layer norm's in another order."""
        return self.affine is not None and not self.centred

    def scale(self, weight: Tensor) -> Tensor:
        """(D,) what xhat is multiplied by."""
        return 1.0 + weight if self.affine == "1 + weight" else weight


class ModulatedNorm(nn.Module):
    """Mixed in front of a norm's own class: ``base(x) + (dgamma * xhat(x) + dbeta)``, LaVi's ViLN.

    The output with deltas of zero is the base's to the last bit. A base whose formula is known shares its xhat; any
    other runs its own code, and xhat is computed beside it.
    """

    deltas: Deltas | Callable[[Tensor], Deltas] | None = None
    """(dgamma, dbeta), or what gives them for the norm's input; None when nothing modulates."""
    kind: NormKind
    weight: Tensor
    fused: Callable[[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor], NormKind], Tensor] | None = None
    """What computes it at once, away from the CPU (:func:`lavi.nn.norm_kernel.fused`); None: what stands here."""

    def forward(self, x: Tensor) -> Tensor:
        if self.deltas is None:
            return super().forward(x)  # type: ignore[no-any-return]
        dgamma, dbeta = self.deltas(x) if callable(self.deltas) else self.deltas
        if dgamma is None:
            y = super().forward(x)
            return y if dbeta is None else y + dbeta.to(y.dtype)
        if self.fused is not None and self.kind.affine is not None and dbeta is not None and not x.is_cpu:
            return self.fused(x, self.weight, getattr(self, "bias", None), (dgamma, dbeta), self.kind)
        xhat = normalise(x, self.kind.eps, centred=self.kind.centred)
        known = self.kind.affine if self.kind.exact else None
        if known is not None and x.dtype == self.weight.dtype == torch.float32:
            # No affine part of half precision is to be rounded by itself: one scale does for both.
            scale = self.kind.scale(self.weight) + dgamma
            return scale * xhat if dbeta is None else torch.addcmul(dbeta, scale, xhat)
        y = super().forward(x) if known is None else AFFINES[known](xhat, self.weight, None, x.dtype)
        delta = dgamma * xhat if dbeta is None else torch.addcmul(dbeta, dgamma, xhat)
        return y + delta.to(y.dtype)

"""A norm whose affine parameters take deltas for the time of one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Deltas = tuple[Tensor | None, Tensor | None]
"""(dgamma, dbeta), each (B, T, D) fp32, or None."""


def normalise(x: Tensor, eps: float, *, centred: bool) -> Tensor:
    """xhat(x) in fp32: ``x`` (..., D) over its root mean square, after its mean is taken off if ``centred``."""
    x = x.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class ModulatedNorm(nn.Module):
    """Mixed in front of a norm's own class: ``base(x) + (dgamma * xhat(x) + dbeta)``, LaVi's ViLN.

    The base keeps its own kernel and its own rounding: doing the affine part again would change bf16 logits even
    with deltas of zero, since families cast at different points.
    """

    deltas: Deltas | Callable[[Tensor], Deltas] | None = None
    """(dgamma, dbeta), or what gives them for the norm's input; None when nothing modulates."""
    eps_of_xhat: float
    centred: bool

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.deltas is None:
            return y
        dgamma, dbeta = self.deltas(x) if callable(self.deltas) else self.deltas
        delta = dgamma * normalise(x, self.eps_of_xhat, centred=self.centred) if dgamma is not None else None
        if dbeta is not None:
            delta = dbeta if delta is None else delta + dbeta
        return y if delta is None else y + delta.to(y.dtype)

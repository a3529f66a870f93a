"""Which tokens each text token sees: made once a call, for all layers that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What each of T text tokens sees of M others: visual ones, and in CASA the text's own behind them."""

    shape: tuple[int, int, int]
    """(B, T, M)."""
    device: torch.device
    partly: Tensor | None = None
    """(B, T, M) bool; None: each token sees all."""
    any: Tensor | None = None
    """(B, T, 1) bool, whether a token sees anything; None: all do."""
    allowed: Tensor | None = None
    """(B, 1, T, M) bool, for an attention; None: it needs no mask.

    A token that sees nothing may attend to everything, so that no softmax is over an empty set: what it reads is
    multiplied by 0, by :meth:`only`."""

    @classmethod
    def by(cls, mask: Tensor) -> Visibility:
        """As a mask (B, T, M) says."""
        batch, text, visual = mask.shape
        some = mask.any(-1, keepdim=True)
        return cls((batch, text, visual), mask.device, mask, some, (mask | ~some)[:, None])

    @property
    def mask(self) -> Tensor:
        """(B, T, M) bool."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device) if self.partly is None else self.partly

    def only(self, read: Tensor) -> Tensor:
        """What tokens read (B, T, E), exactly 0 where one sees nothing."""
        return read if self.any is None else read * self.any

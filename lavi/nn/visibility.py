"""Which visual tokens each text token sees: made once a call, for all layers that read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What each of T text tokens sees of M visual ones.

    Args:
        partly: (B, T, M) bool; None: each token sees all, and no attention needs a mask.
        shape: (B, T, M).
    """

    partly: Tensor | None
    shape: tuple[int, int, int]
    device: torch.device

    @classmethod
    def by(cls, mask: Tensor) -> Visibility:
        """As a mask (B, T, M) says."""
        batch, text, visual = mask.shape
        return cls(mask, (batch, text, visual), mask.device)

    @cached_property
    def mask(self) -> Tensor:
        """(B, T, M) bool."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device) if self.partly is None else self.partly

    @cached_property
    def any(self) -> Tensor | None:
        """(B, T, 1) bool, whether a token sees anything; None: all do."""
        return None if self.partly is None else self.partly.any(-1, keepdim=True)

    @cached_property
    def allowed(self) -> Tensor | None:
        """(B, 1, T, M) bool, for an attention; None: it needs no mask.

        A token that sees nothing may attend to everything, so that no softmax is over an empty set: what it reads is
        multiplied by 0, by :meth:`only`.
        """
        if self.partly is None or self.any is None:
            return None
        return (self.partly | ~self.any)[:, None]

    def only(self, read: Tensor) -> Tensor:
        """What tokens read (B, T, E), exactly 0 where one sees nothing."""
        return read if self.any is None else read * self.any

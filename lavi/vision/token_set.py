"""Which tokens the blocks of a vision tower work on, of those that it began with.

    the tower's tokens (V, N)    p p p p p p p p      V views of N tokens each
    a token set (S, n)           p   p2  p   p3       S sequences of n; some stand for several of the tower's

S is V until sequences, too, are merged (frames of a video). What the set stands for can be written out to the tower's
tokens again at any time, so whatever comes behind the blocks finds the grid that it expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSet:
    """Tokens that stand for those of a tower; padding is at the end of a sequence.

    Args:
        index: (S, n) into the tower's V N tokens: one of those that each stands for, whose place it has.
        size: (S, n) how many it stands for; 0: padding.
        source: (V N,) into the S n tokens: which one stands for each of the tower's.
        counts: tokens of each sequence without padding.
        prefix: tokens at the head of each sequence that lie on no grid (class token, registers): never merged.
    """

    index: Tensor
    size: Tensor
    source: Tensor
    counts: tuple[int, ...]
    prefix: int

    @classmethod
    def whole(cls, views: int, tokens: int, *, prefix: int, device: torch.device, valid: Tensor | None = None) -> Self:
        """All tokens of a tower, each for itself.

        Args:
            valid: (V, N) which of them are no padding; None: all.
        """
        index = torch.arange(views * tokens, device=device).view(views, tokens)
        size = torch.ones(views, tokens, device=device) if valid is None else valid.float()
        counts = [tokens] * views if valid is None else valid.sum(1).tolist()
        return cls(index, size, index.flatten(), tuple(counts), prefix)

    @property
    def valid(self) -> Tensor | None:
        """(S, n): which are no padding; None: all."""
        return None if min(self.counts) == self.index.shape[1] else self.size > 0

    def gather(self, tower: Tensor) -> Tensor:
        """What stands in these places of the tower's tokens: (V, N, D) to (S, n, D)."""
        return tower.flatten(0, 1)[self.index]

    def write_out(self, tokens: Tensor, views: int) -> Tensor:
        """Each of the tower's tokens gets what stands for it: (S, n, D) to (V, N, D)."""
        return tokens.flatten(0, 1)[self.source].unflatten(0, (views, -1))

    def merged(self, tokens: Tensor, target: Tensor, order: Tensor, counts: Sequence[int]) -> tuple[TokenSet, Tensor]:
        """Merge tokens (S, n, D) into others: their mean, weighted by how many each stands for.

        Args:
            target: (S, n) into the S n tokens: the one that each goes to, itself where it stays.
            order: (S', n') into the S n tokens: those that are left, each once; what padding holds does not matter.
            counts: of them, without padding, in each sequence.

        Returns:
            The smaller set, and its tokens (S', n', D). What nothing was merged into is the same to the last bit.
        """
        flat, size, onto = tokens.flatten(0, 1), self.size.flatten(), target.flatten()
        total = torch.zeros_like(size).index_add(0, onto, size)  # (S n,)
        weighted = flat.float() * size[:, None]
        mean = torch.zeros_like(weighted).index_add(0, onto, weighted) / total.clamp(min=1)[:, None]  # (S n, D)
        values = torch.where((total != size)[:, None], mean.to(flat.dtype), flat)
        column = torch.arange(order.shape[1], device=order.device)
        own = torch.tensor(counts, device="cpu").to(order.device)[:, None]
        position = torch.zeros_like(onto).scatter(0, order.flatten(), torch.arange(order.numel(), device=order.device))
        smaller = TokenSet(
            index=self.index.flatten()[order],
            size=total[order] * (column < own),
            source=position[onto[self.source]],
            counts=tuple(counts),
            prefix=self.prefix,
        )
        return smaller, values[order]

    def merged_within(
        self, tokens: Tensor, target: Tensor, stays: Tensor, counts: Sequence[int]
    ) -> tuple[TokenSet, Tensor]:
        """:meth:`merged`, within each sequence; those that stay keep their order.

        Args:
            target: (S, n) the token of its sequence that each goes to.
            stays: (S, n) those that are left; none of them is padding.
            counts: how many these are in each sequence.
        """
        order = (~stays).long().argsort(dim=1, stable=True)[:, : max(counts)]  # (S, n')
        first = stays.shape[1] * torch.arange(len(stays), device=stays.device)[:, None]
        return self.merged(tokens, target + first, order + first, counts)

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

from lavi.nn.take_rows import take_rows


@dataclass(frozen=True)
class Merge:
    """Which tokens of a set go on as one.

    Args:
        target: (S, n) into the S n tokens: the one that each goes to, itself where it stays.
        order: (S', n') into the S n tokens: those that are left, each once; what padding holds does not matter.
        counts: of those that are left, without padding, in each sequence.
        mean: they go on as their mean, weighted by what each stands for; else as the token that they go to.
    """

    target: Tensor
    order: Tensor
    counts: tuple[int, ...]
    mean: bool = True

    @classmethod
    def within(cls, target: Tensor, stays: Tensor, counts: Sequence[int], *, mean: bool = True) -> Self:
        """Of tokens of the same sequence; those that stay keep their order.

        Args:
            target: (S, n) the token of its sequence that each goes to.
            stays: (S, n) those that are left; none of them is padding.
            counts: how many these are in each sequence.
        """
        order = (~stays).long().argsort(dim=1, stable=True)[:, : max(counts)]  # (S, n')
        first = stays.shape[1] * torch.arange(len(stays), device=stays.device)[:, None]
        return cls(target + first, order + first, tuple(counts), mean)


@dataclass(frozen=True)
class TokenSet:
    """Tokens that stand for those of a tower; padding is at the end of a sequence.

    Args:
        index: (S, n) into the tower's V N tokens: one of those that each stands for, whose place it has.
        size: (S, n) how many it stands for; 0: padding.
        source: (V N,) into the S n tokens: which one stands for each of the tower's.
        counts: tokens of each sequence without padding.
        prefix: tokens at the head of each sequence that lie on no grid (class token, registers).
        is_whole: nothing has been merged yet.
    """

    index: Tensor
    size: Tensor
    source: Tensor
    counts: tuple[int, ...]
    prefix: int
    is_whole: bool = False

    @classmethod
    def whole(cls, views: int, tokens: int, *, prefix: int, device: torch.device, valid: Tensor | None = None) -> Self:
        """All tokens of a tower, each for itself.

        Args:
            valid: (V, N) which of them are no padding; None: all.
        """
        index = torch.arange(views * tokens, device=device).view(views, tokens)
        size = torch.ones(views, tokens, device=device) if valid is None else valid.float()
        counts = [tokens] * views if valid is None else valid.sum(1).tolist()
        return cls(index, size, index.flatten(), tuple(counts), prefix, is_whole=True)

    @property
    def valid(self) -> Tensor | None:
        """(S, n): which are no padding; None: all."""
        return None if min(self.counts) == self.index.shape[1] else self.size > 0

    def gather(self, tower: Tensor) -> Tensor:
        """What stands in these places of the tower's tokens: (V, N, D) to (S, n, D)."""
        return take_rows(tower.flatten(0, 1), self.index)

    def write_out(self, tokens: Tensor, views: int) -> Tensor:
        """Each of the tower's tokens gets what stands for it: (S, n, D) to (V, N, D)."""
        return take_rows(tokens.flatten(0, 1), self.source).unflatten(0, (views, -1))

    def values(self, tokens: Tensor, merge: Merge) -> Tensor:
        """Tokens (S, n, D) as they go on (S', n', D). What nothing was merged into is the same to the last bit."""
        flat, size, onto = tokens.flatten(0, 1), self.size.flatten(), merge.target.flatten()
        if not merge.mean:
            return take_rows(flat, merge.order)
        total = self._merged_sizes(merge)
        weighted = flat.float() * size[:, None]
        mean = torch.zeros_like(weighted).index_add(0, onto, weighted) / total.clamp(min=1)[:, None]  # (S n, D)
        return take_rows(torch.where((total != size)[:, None], mean.to(flat.dtype), flat), merge.order)

    def merged(self, merge: Merge) -> TokenSet:
        """The set that goes on."""
        order, onto = merge.order, merge.target.flatten()
        column = torch.arange(order.shape[1], device=order.device)
        own = torch.tensor(merge.counts, device="cpu").to(order.device)[:, None]
        position = torch.zeros_like(onto).scatter(0, order.flatten(), torch.arange(order.numel(), device=order.device))
        return TokenSet(
            index=self.index.flatten()[order],
            size=self._merged_sizes(merge)[order] * (column < own),
            source=position[onto[self.source]],
            counts=merge.counts,
            prefix=self.prefix,
        )

    def _merged_sizes(self, merge: Merge) -> Tensor:
        """(S n,): for how many each token stands when all have gone where they go."""
        size = self.size.flatten()
        return torch.zeros_like(size).index_add(0, merge.target.flatten(), size)

"""Similar tokens become one between the blocks of a vision tower: ToMe (arXiv 2210.09461).

    behind each block:  a b a b a b a b      every second token (a) looks for the b whose key is most like its own
                        a b a b a . a b      the r most similar pairs are merged: their mean, weighted by size

Paper: keys are compared (mean over heads, cosine), bipartite matching of every second token, r a block (constant, or
from 2 r falling to 0), proportional attention, class tokens never merged. Chosen here: tokens keep the order of the
grid between blocks; nothing is merged behind the last block, where no block follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lavi.config.types import Count, CountOrZero
from lavi.nn.autocast import without_autocast
from lavi.vision.reduced import BlockOutput, TokenReduction
from lavi.vision.token_set import Merge, TokenSet


@dataclass(frozen=True)
class TokenMerging(TokenReduction):
    """Pairs of similar tokens are merged behind each block, at most half of the tokens at a time.

    Args:
        per_block: r, the tokens that a view loses behind each block; or a list of them, for the blocks from ``start``
            on, and none behind later ones.
        schedule: of a single r: ``constant``; or ``decreasing``, from 2 r behind the first block to 0 behind the last.
        start: the first block that tokens are merged behind.
    """

    per_block: Count | list[CountOrZero]
    schedule: Literal["constant", "decreasing"] = "constant"
    start: CountOrZero = 0

    def starts_at(self) -> int:
        return self.start

    def tokens_lost(self, block: int, blocks: int) -> int:
        """How many tokens a view loses behind a block."""
        if isinstance(self.per_block, list):
            return self.per_block[block - self.start] if block - self.start < len(self.per_block) else 0
        if self.schedule == "constant":
            return self.per_block
        steps = max(1, blocks - 1 - self.start)
        return int(2 * self.per_block * (1 - (block - self.start) / steps))

    def merge(self, out: BlockOutput, tokens: TokenSet) -> Merge | None:
        assert out.keys is not None
        lost = self.tokens_lost(out.block, out.blocks)
        merged = [min(lost, (count - tokens.prefix) // 2) for count in tokens.counts]
        if not any(merged):
            return None
        with torch.no_grad(), without_autocast(out.keys):  # the same pairs in any precision
            target, stays = match(out.keys.float(), tokens, merged)
        return Merge.within(target, stays, [count - r for count, r in zip(tokens.counts, merged, strict=True)])


def match(keys: Tensor, tokens: TokenSet, merged: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The most similar pairs of every second token and one of the others (the paper's bipartite matching).

    Args:
        keys: (S, n, d) what is compared.
        merged: how many pairs there are in each sequence.

    Returns:
        (S, n) the token of its sequence that each goes to, and (S, n) which stay.
    """
    first, valid = tokens.prefix, tokens.valid
    compared = normalize(keys[:, first:], dim=-1)  # (S, n - prefix, d)
    scores = compared[:, ::2] @ compared[:, 1::2].transpose(1, 2)  # (S, a, b)
    if valid is not None:
        pairs = valid[:, first::2, None] & valid[:, None, first + 1 :: 2]
        scores = scores.masked_fill(~pairs, float("-inf"))
    best, partner = scores.max(dim=-1)  # (S, a)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    goes = rank < torch.tensor(merged, device="cpu").to(keys.device)[:, None]
    target = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)  # (S, n)
    stays = torch.ones_like(target, dtype=torch.bool) if valid is None else valid.clone()
    target[:, first::2] = torch.where(goes, first + 1 + 2 * partner, target[:, first::2])
    stays[:, first::2] &= ~goes
    return target, stays

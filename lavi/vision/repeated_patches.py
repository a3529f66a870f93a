"""Patches that repeat a neighbour do not enter a vision tower: PixelPrune (arXiv 2604.00886).

    patches   A A A B      left, upper or upper-left neighbour the same: dropped, and the neighbour stands for it
              A A A B  ->  A . . B
              C A A B      . . . .
                           C A . .

Screens, documents and drawings repeat themselves; photographs do not. How many patches are left depends on the image,
so FLOPs that are counted without one are those of an image that repeats nothing. Paper: the three neighbours, exactly
or within a tolerance. Chosen here: a patch is compared with its neighbour itself, also where that was dropped; what
stands for others weighs as much as they (:mod:`lavi.vision.reduced`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lavi.config.types import PositiveOrZero
from lavi.vision.reduced import BlockOutput, TokenReduction
from lavi.vision.token_set import Merge, TokenSet


@dataclass(frozen=True)
class RepeatedPatches(TokenReduction):
    """Drops patches that equal their left, upper or upper-left neighbour.

    Args:
        tolerance: how much each value may differ, in the tower's normalised pixels; 0: not at all.
    """

    tolerance: PositiveOrZero = 0.0

    def starts_at(self) -> int:
        return -1

    def merge(self, out: BlockOutput, tokens: TokenSet) -> Merge | None:
        if out.patches is None:
            return None
        columns = torch.tensor([width for _, width in out.grids], device="cpu").to(out.patches.device)[:, None]
        first = first_of_run(out.patches, columns, self.tolerance)  # (V, N - prefix)
        target = pad(first + tokens.prefix, (tokens.prefix, 0))
        own = torch.arange(target.shape[1], device=target.device)
        target[:, : tokens.prefix] = own[: tokens.prefix]
        if (valid := tokens.valid) is not None:
            target = torch.where(valid, target, own)
        stays = target == own if valid is None else (target == own) & valid
        counts = stays.sum(1).tolist()
        return None if counts == list(tokens.counts) else Merge.within(target, stays, counts, mean=False)


def first_of_run(patches: Tensor, columns: Tensor, tolerance: float) -> Tensor:
    """The patch that each leads back to, from neighbour to equal neighbour.

    Args:
        patches: (V, N, c), row by row.
        columns: (V, 1) of each view's grid.

    Returns:
        (V, N) indices.
    """
    own = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])  # (V, N)
    at_left, at_top = own % columns == 0, own < columns
    lead = own
    neighbours = ((columns + 1, at_left | at_top), (columns, at_top), (torch.ones_like(columns), at_left))
    for back, outside in neighbours:  # the last has the first say: left, upper, upper-left
        neighbour = (own - back).clamp(min=0)
        values = patches.gather(1, neighbour[..., None].expand_as(patches))
        equal = (patches - values).abs().amax(-1) <= tolerance
        lead = torch.where(equal & ~outside, neighbour, lead)
    for _ in range(patches.shape[1].bit_length()):  # each time twice as far
        lead = lead.gather(1, lead)
    return lead

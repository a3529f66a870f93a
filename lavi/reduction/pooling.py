"""Average pooling over the grid (DeCo, arXiv 2405.20985), also at a scale drawn anew each step (M3, arXiv 2405.17430).

24 x 24 tokens -> mean over 2 x 2 -> 12 x 12 tokens
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lavi.config.types import Count
from lavi.errors import UserError
from lavi.reduction.base import Reducer
from lavi.vision.base import FeatureSpec, VisionBackbone


class AveragePooling(Reducer):
    """The mean over each square of ``factor`` x ``factor`` tokens; at the border, of what is left of one."""

    def __init__(self, *, factor: Count = 2) -> None:
        super().__init__()
        if factor < 1:
            raise UserError(f"average pooling shrinks by a factor of at least 1, not {factor}.")
        self.factor = factor

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        rows, columns = (math.ceil(side / self.factor) for side in vision.grid)
        return FeatureSpec(vision.width, rows * columns, (rows, columns))

    def forward(self, features: Tensor) -> Tensor:
        if self.factor == 1:
            return features
        assert self.before.grid is not None
        on_grid = features.transpose(1, 2).unflatten(-1, self.before.grid)  # (views, Dv, rows, columns)
        squares = nn.functional.avg_pool2d(on_grid, self.factor, ceil_mode=True, count_include_pad=False)
        return squares.flatten(2).transpose(1, 2)


class MatryoshkaPooling(Reducer):
    """Nested scales of one image: in training each step draws one of ``sides``, afterwards ``side`` is used.

    One training then serves every budget of tokens: change ``model.reducer.side`` and evaluate again. The draw is the
    same for all views of a batch. Leave room in ``model.context_length`` for the largest.

    Args:
        sides: tokens on a side of the grid (M3: 24, 12, 6, 3, 1).
        side: of evaluation; by default the largest.
    """

    def __init__(self, *, sides: list[Count], side: Count | None = None) -> None:
        super().__init__()
        if not sides or min(sides) < 1:
            raise UserError(f"matryoshka pooling needs sides of at least 1, not {sides}.")
        self.sides, self.side = sorted(sides), side or max(sides)

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        largest = max(*self.sides, self.side)
        if largest > min(vision.grid):
            raise UserError(f"matryoshka pooling to {largest} a side: the backbone's grid is {vision.grid}.")
        return FeatureSpec(vision.width, self.side**2, (self.side, self.side))

    def forward(self, features: Tensor) -> Tensor:
        assert self.before.grid
        side = self.side
        if self.training:
            side = self.sides[int(torch.randint(len(self.sides), (1,), device="cpu"))]
        return pooled(features, self.before.grid, (side, side))


def pooled(features: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """(views, N, Dv) of a ``grid`` to (views, n, Dv) of another, by means; equal grids leave them untouched."""
    if grid == to:
        return features
    on_grid = features.transpose(1, 2).unflatten(-1, grid)  # (views, Dv, rows, columns)
    return nn.functional.adaptive_avg_pool2d(on_grid, to).flatten(2).transpose(1, 2)

"""Pixel shuffle (InternVL, Idefics3): a square of tokens becomes one wide token; nothing is averaged away.

24 x 24 tokens of Dv -> 12 x 12 tokens of 4 Dv
"""

from __future__ import annotations

from torch import Tensor

from lavi.config.types import Count
from lavi.errors import UserError
from lavi.reduction.base import Reducer
from lavi.vision.base import FeatureSpec, VisionBackbone


class PixelShuffle(Reducer):
    """Lays the ``factor`` x ``factor`` tokens of a square side by side in Dv: of each tower layer in it, its own.

    Raises:
        UserError: the grid is no multiple of ``factor``.
    """

    def __init__(self, *, factor: Count = 2) -> None:
        super().__init__()
        self.factor = factor

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        rows, columns = vision.grid
        if self.factor < 1 or rows % self.factor or columns % self.factor:
            raise UserError(
                f"pixel shuffle by {self.factor} does not divide the backbone's grid of {rows} x {columns}: take a "
                "factor that does, or AveragePooling."
            )
        grid = (rows // self.factor, columns // self.factor)
        self.levels = vision.levels
        return FeatureSpec(vision.width * self.factor**2, grid[0] * grid[1], grid)

    def forward(self, features: Tensor) -> Tensor:
        assert self.after.grid
        rows, columns = self.after.grid
        squares = features.unflatten(1, (rows, self.factor, columns, self.factor))  # (views, rows, f, columns, f, Dv)
        layers = squares.unflatten(-1, (self.levels, -1))  # (views, rows, f, columns, f, levels, Dv / levels)
        return layers.permute(0, 1, 3, 5, 2, 4, 6).flatten(3).flatten(1, 2)

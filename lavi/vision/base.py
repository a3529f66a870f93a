"""The contract of a vision backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class FeatureSpec:
    """What one view's features look like to those who take them in."""

    width: int
    """Dv."""
    tokens: int
    """N."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens (behind a class token, where there is one more); None: they lie on no grid."""


class VisionBackbone(nn.Module, ABC):
    """Pixels in, a grid of features out.

    Attributes:
        width: Dv, the width of a feature.
        grid: rows and columns of the feature grid of one view.
        prefix: tokens of one view that stand before its grid: 1 for a class token that was kept. Registers never are.
        mean: the colour (0 to 1) that :meth:`preprocess` makes 0.
        resample: the interpolation it resizes with.
    """

    width: int
    grid: tuple[int, int]
    prefix: int = 0
    mean: tuple[float, ...]
    resample: Image.Resampling

    @property
    def tokens(self) -> int:
        """N of one view."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def feature_spec(self) -> FeatureSpec:
        """What a view becomes."""
        return FeatureSpec(self.width, self.tokens, self.grid)

    @property
    @abstractmethod
    def pixel_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one view."""

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """One image to (C, H, W), by the backbone's own mean, deviation, size and interpolation."""

    @property
    def processor(self) -> Callable[[Image.Image], Tensor]:
        """What a data module needs to feed this backbone alone."""
        return self.preprocess

    @abstractmethod
    def flops(self, views: int) -> float:
        """FLOPs of encoding ``views`` views, in closed form (1 multiply-add = 2 FLOPs)."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """(views, C, H, W) to (views, N, Dv): the prefix, then the grid row by row."""

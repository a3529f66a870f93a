"""What turns an image into the pixels of a vision backbone: plain data, for the processes that read samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Preprocessing(ABC):
    """An image to the pixels of one view. It can be pickled and holds no weights.

    Attributes:
        pixel_shape: (C, H, W) of one view.
        mean: the colour (0 to 1) that becomes 0.
        resample: the interpolation that it resizes with.
    """

    pixel_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    resample: Image.Resampling

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the features of an image of ``size`` (height, width); None: all images have the same."""
        return None

    def colours(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """What of a prepared view (C, H, W) is a picture, to be looked at: (3, height, width), in the tower's range.

        Args:
            size: height and width of the image that the view is of.
        """
        return pixels

    @abstractmethod
    def __call__(self, image: Image.Image) -> Tensor:
        """One image to (C, H, W)."""

    def of_view(self, view: Image.Image) -> Tensor:
        """The same of a view of a tiled image: its rim is kept, also where that of an image is cut off."""
        return self(view)


@dataclass(frozen=True)
class SquareResize(Preprocessing):
    """Resizes an image to a square, whatever its aspect; a value v of a channel becomes (v - mean) / std.

    Args:
        side: of the square, in pixels.
        mean, std: of each channel, of values from 0 to 1.
    """

    side: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @property
    def pixel_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return (len(self.mean), self.side, self.side)

    def __call__(self, image: Image.Image) -> Tensor:
        resized = image.convert("RGB").resize((self.side, self.side), self.resample)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)  # (C, H, W)
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

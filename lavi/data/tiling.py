"""How an image becomes views.

    OneView      the whole image                            LLaVA, LLaVA-1.5 (padded to a square)
    AnyRes       the whole image, then tiles of it, larger      LLaVA-OneVision (arXiv 2408.03326), LLaVA-NeXT
    SplitImage   as many tiles as it has pixels for             Idefics3 (arXiv 2408.12637), SmolVLM (arXiv 2504.05299)

    pixels     [ whole ] [ tile 1 ] ... [ tile R C ]     each through the tower: (1 + R C, N, D)

The first view of a tiled image is the whole image, resized and not padded. Frames of a video are views too. How the
features of views become one sequence is said in lavi/fusion/tile_arrangement.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from PIL import Image
from torch import Tensor

from lavi.batch import Layout, Video, Visual
from lavi.config.types import Count
from lavi.data.images import MAX_PIXELS
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError

Grid = tuple[int, int]
"""Rows and columns."""


class Tiling(ABC):
    """How images become views.

    Attributes:
        native_resolution: its views may have grids of their own.
    """

    native_resolution: bool = False

    @abstractmethod
    def cut(self, image: Image.Image, preprocessing: Preprocessing, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        """The views of one image, before the backbone's own preprocessing; ``alone``: it has no others beside it."""

    def layout(self, visual: Visual, preprocessing: Preprocessing, *, alone: bool = True) -> Layout:
        """How the views of an image, or the frames of a video, belong together."""
        if isinstance(visual, Video):
            first = visual.frames[0]
            grid = preprocessing.grid((first.height, first.width))
            return Layout(views=len(visual.frames), video=True, grid=grid)
        return self.cut(visual, preprocessing, alone=alone)[1]

    def views(self, visual: Visual, preprocessing: Preprocessing, *, alone: bool = True) -> tuple[Tensor, Layout]:
        """Pixels (views, C, H, W) of an image, or of the frames of a video, and how they belong together."""
        if isinstance(visual, Video):
            cut, layout = visual.frames, self.layout(visual, preprocessing)
            if layout.grid is not None:  # the first frame's, for all of them
                cut = [frame if frame.size == cut[0].size else frame.resize(cut[0].size) for frame in cut]
        else:
            cut, layout = self.cut(visual, preprocessing, alone=alone)
        pixels = [preprocessing(view) if layout.tiles is None else preprocessing.of_view(view) for view in cut]
        return torch.stack(pixels) if len(pixels) > 1 else pixels[0][None], layout  # one is not copied


class OneView(Tiling):
    """One view an image.

    Args:
        pad_to_square: pad the shorter side with the backbone's mean colour, so that nothing is cut off or stretched
            (LLaVA-1.5); else the backbone's own preprocessing gets the image as it is.
    """

    native_resolution = True

    def __init__(self, *, pad_to_square: bool = False) -> None:
        self.pad_to_square = pad_to_square

    def layout(self, visual: Visual, preprocessing: Preprocessing, *, alone: bool = True) -> Layout:
        if isinstance(visual, Video):
            return super().layout(visual, preprocessing)
        size = (visual.height, visual.width)
        shown = (max(size), max(size)) if self.pad_to_square else size
        return Layout(size=size, grid=preprocessing.grid(shown))

    def cut(self, image: Image.Image, preprocessing: Preprocessing, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        view = square(image, preprocessing.mean) if self.pad_to_square else image
        return [view], self.layout(image, preprocessing)


class AnyRes(Tiling):
    """LLaVA-OneVision's and LLaVA-NeXT's: the grid of the largest effective resolution, then of the least waste.

    Args:
        max_grid: the most tiles on a side; grids run from 1 x 1 to ``max_grid`` x ``max_grid``.
        grids: instead, the grids to choose from, as pairs of rows and columns; of two as good the first.
        tile_several: tile each of several images of one conversation, too (LLaVA-NeXT); else they are padded to
            squares, one view each (LLaVA-OneVision).

    Raises:
        UserError: a grid that is no pair of counts.
    """

    def __init__(
        self, *, max_grid: Count = 6, grids: list[list[int]] | None = None, tile_several: bool = False
    ) -> None:
        sides = range(1, max_grid + 1)
        self.grids = [(rows, columns) for rows in sides for columns in sides]
        if grids is not None:
            if not grids or not all(len(grid) == 2 and min(grid) > 0 for grid in grids):
                raise UserError(f"tiling.grids is a list of pairs [rows, columns] from 1, not {grids}.")
            self.grids = [(rows, columns) for rows, columns in grids]
        self.tile_several = tile_several

    def layout(self, visual: Visual, preprocessing: Preprocessing, *, alone: bool = True) -> Layout:
        if isinstance(visual, Video):
            return super().layout(visual, preprocessing)
        size = (visual.height, visual.width)
        if not alone and not self.tile_several:
            return Layout(size=size)
        rows, columns = self.grid(size, preprocessing.pixel_shape[1:])
        return Layout(views=1 + rows * columns, tiles=(rows, columns), size=size)

    def cut(self, image: Image.Image, preprocessing: Preprocessing, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        layout = self.layout(image, preprocessing, alone=alone)
        if layout.tiles is None:
            return [square(image, preprocessing.mean)], layout
        _, height, width = preprocessing.pixel_shape
        rows, columns = layout.tiles
        whole = image.resize((width, height), preprocessing.resample)
        canvas = fitted(image, (rows * height, columns * width), preprocessing.resample)
        corners = [(row * height, column * width) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + width, top + height)) for top, left in corners]
        return [whole, *tiles], layout

    def grid(self, size: tuple[int, int], tile: tuple[int, int]) -> Grid:
        """Rows and columns of tiles for an image of ``size`` (height, width) and tiles of height and width ``tile``."""
        return max(self.grids, key=lambda grid: _effective(size, (grid[0] * tile[0], grid[1] * tile[1])))


class SplitImage(Tiling):
    """Idefics3's and SmolVLM's: the image is resized to ``longest_edge``, then to whole tiles, and cut.

    Args:
        longest_edge: of the image, in pixels; the tiles are as large as the vision backbone's views.
        split: cut it; else the whole image is the only view.
    """

    MOST_PIXELS = 4096
    """On a side; Idefics3's own limit."""

    def __init__(self, *, longest_edge: Count = 1456, split: bool = True) -> None:
        self.longest_edge, self.split = longest_edge, split

    def layout(self, visual: Visual, preprocessing: Preprocessing, *, alone: bool = True) -> Layout:
        if isinstance(visual, Video):
            return super().layout(visual, preprocessing)
        size = (visual.height, visual.width)
        rows, columns = self._grid(self._resized(size), preprocessing.pixel_shape[1])
        if not self.split or (rows, columns) == (1, 1):
            return Layout(size=size)
        return Layout(views=1 + rows * columns, tiles=(rows, columns), size=size, stretched=True)

    def cut(self, image: Image.Image, preprocessing: Preprocessing, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        layout = self.layout(image, preprocessing, alone=alone)
        side, resample = preprocessing.pixel_shape[1], preprocessing.resample
        height, width = self._resized(layout.size)
        image = image.resize((width, height), resample)
        rows, columns = self._grid((height, width), side)
        if self.split:
            image = image.resize((columns * side, rows * side), resample)
        whole = image.resize((side, side), resample)
        corners = [(row * side, column * side) for row in range(rows) for column in range(columns)]
        tiles = [image.crop((left, top, left + side, top + side)) for top, left in corners] if layout.tiles else []
        return [whole, *tiles], layout

    def _resized(self, size: Grid) -> Grid:
        """(height, width) at which the longest edge is ``longest_edge``; the other is even, if it is cut down to it."""
        height, width = size
        if width >= height:
            even = int(self.longest_edge / (width / height))
            height, width = max(1, even + even % 2), self.longest_edge
        else:
            even = int(self.longest_edge * (width / height))
            height, width = self.longest_edge, max(1, even + even % 2)
        return self._within(height, width)

    def _within(self, height: int, width: int) -> Grid:
        """(height, width) of at most :attr:`MOST_PIXELS` on a side."""
        aspect = width / height
        if width >= height and width > self.MOST_PIXELS:
            height, width = int(self.MOST_PIXELS / aspect), self.MOST_PIXELS
        elif height > width and height > self.MOST_PIXELS:
            height, width = self.MOST_PIXELS, int(self.MOST_PIXELS * aspect)
        return max(height, 1), max(width, 1)

    @staticmethod
    def _grid(size: Grid, side: int) -> Grid:
        """Rows and columns of whole tiles that hold an image of ``size``, its aspect kept by the longer side."""
        height, width = size
        aspect = width / height
        if width >= height:
            columns = math.ceil(width / side)
            return math.ceil(int(columns * side / aspect) / side), columns
        rows = math.ceil(height / side)
        return rows, math.ceil(int(rows * side * aspect) / side)


def _effective(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Pixels of the image that survive on the canvas, and (negative) the pixels of the canvas it leaves empty."""
    height, width = size
    scale = min(canvas[1] / width, canvas[0] / height)
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, effective - canvas[0] * canvas[1]


def fitted(image: Image.Image, canvas: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The image as large as fits on a black ``canvas`` (height, width), its aspect kept, in the middle."""
    height, width = canvas
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        size = (width, min(math.ceil(image.height * scale_width), height))
    else:
        size = (min(math.ceil(image.width * scale_height), width), height)
    out = Image.new("RGB", (width, height))
    out.paste(image.resize(size, resample), ((width - size[0]) // 2, (height - size[1]) // 2))
    return out


def square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The image in the middle of a square of the colour ``mean`` (0 to 1), which the backbone sees as 0.

    Raises:
        UserError: the square would have more than :data:`lavi.data.images.MAX_PIXELS`.
    """
    side = max(image.size)
    if image.width == image.height:
        return image
    if side * side > MAX_PIXELS:
        raise UserError(
            f"an image of {image.width}x{image.height} pixels cannot be padded to a square: that would have more than "
            f"{MAX_PIXELS} pixels."
        )
    red, green, blue = (int(255 * value) for value in mean)
    out = Image.new("RGB", (side, side), (red, green, blue))
    out.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return out

"""How an image becomes views, and how the features of its views become one sequence of visual tokens.

    OneView     the whole image                                  LLaVA, LLaVA-1.5 (padded to a square)
    AnyRes      the whole image, then tiles of it, larger            LLaVA-OneVision (arXiv 2408.03326), anyres_max_9

    pixels     [ whole ] [ tile 1 ] ... [ tile R C ]     each through the tower: (1 + R C, N, D)
    features   whole, then the tiles laid out as one grid, its padding cut off, shrunk to a budget, a newline a row

The first view of a tiled image is the whole image, resized and not padded. Frames of a video are views too, pooled
2 x 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from lavi.arguments import Count
from lavi.batch import Layout, Video, Visual
from lavi.errors import UserError
from lavi.images import MAX_PIXELS

if TYPE_CHECKING:
    from lavi.vision.base import VisionBackbone

Grid = tuple[int, int]
"""Rows and columns."""


class Tiling(ABC):
    """How images become views."""

    @abstractmethod
    def cut(self, image: Image.Image, vision: VisionBackbone, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        """The views of one image, before the backbone's own preprocessing; ``alone``: it has no others beside it."""

    def layout(self, visual: Visual, vision: VisionBackbone, *, alone: bool = True) -> Layout:
        """How the views of an image, or the frames of a video, belong together."""
        if isinstance(visual, Video):
            return Layout(views=len(visual.frames), video=True)
        return self.cut(visual, vision, alone=alone)[1]

    def views(self, visual: Visual, vision: VisionBackbone, *, alone: bool = True) -> tuple[Tensor, Layout]:
        """Pixels (views, C, H, W) of an image, or of the frames of a video, and how they belong together."""
        if isinstance(visual, Video):
            cut, layout = visual.frames, self.layout(visual, vision)
        else:
            cut, layout = self.cut(visual, vision, alone=alone)
        pixels = [vision.preprocess(view) for view in cut]
        return torch.stack(pixels) if len(pixels) > 1 else pixels[0][None], layout  # one is not copied


class OneView(Tiling):
    """One view an image.

    Args:
        pad_to_square: pad the shorter side with the backbone's mean colour, so that nothing is cut off or stretched
            (LLaVA-1.5); else the backbone's own preprocessing gets the image as it is.
    """

    def __init__(self, *, pad_to_square: bool = False) -> None:
        self.pad_to_square = pad_to_square

    def layout(self, visual: Visual, vision: VisionBackbone, *, alone: bool = True) -> Layout:
        if isinstance(visual, Video):
            return super().layout(visual, vision)
        return Layout(size=(visual.height, visual.width))

    def cut(self, image: Image.Image, vision: VisionBackbone, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        view = square(image, vision.mean) if self.pad_to_square else image
        return [view], self.layout(image, vision)


class AnyRes(Tiling):
    """LLaVA-OneVision's: the grid of tiles with the largest effective resolution, then the least waste.

    Several images of one conversation are not tiled but padded to squares, one view each (as there).

    Args:
        max_grid: the most tiles on a side; grids run from 1 x 1 to ``max_grid`` x ``max_grid``.
    """

    def __init__(self, *, max_grid: Count = 6) -> None:
        self.max_grid = max_grid

    def layout(self, visual: Visual, vision: VisionBackbone, *, alone: bool = True) -> Layout:
        if isinstance(visual, Video):
            return super().layout(visual, vision)
        size = (visual.height, visual.width)
        if not alone:
            return Layout(size=size)
        rows, columns = self.grid(size, vision.pixel_shape[1:])
        return Layout(views=1 + rows * columns, tiles=(rows, columns), size=size)

    def cut(self, image: Image.Image, vision: VisionBackbone, *, alone: bool) -> tuple[list[Image.Image], Layout]:
        layout = self.layout(image, vision, alone=alone)
        if layout.tiles is None:
            return [square(image, vision.mean)], layout
        _, height, width = vision.pixel_shape
        rows, columns = layout.tiles
        whole = image.resize((width, height), vision.resample)
        canvas = fitted(image, (rows * height, columns * width), vision.resample)
        corners = [(row * height, column * width) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + width, top + height)) for top, left in corners]
        return [whole, *tiles], layout

    def grid(self, size: tuple[int, int], tile: tuple[int, int]) -> Grid:
        """Rows and columns of tiles for an image of ``size`` (height, width) and tiles of height and width ``tile``."""
        sides = range(1, self.max_grid + 1)
        return max(
            ((rows, columns) for rows in sides for columns in sides),
            key=lambda grid: _effective(size, (grid[0] * tile[0], grid[1] * tile[1])),
        )


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
        UserError: the square would have more than :data:`lavi.images.MAX_PIXELS`.
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


# --- in feature space ------------------------------------------------------------------------------------------------


class Packing:
    """The features of one image's views to one sequence of visual tokens.

    Args:
        grid: rows and columns of the features of one view; None: they lie on no grid (a reducer took them off it), and
            all tokens of all views stand one after the other.
        budget: a tiled image keeps at most about this many views' worth of tile tokens (``max_9``); they are shrunk
            bilinearly, and only if they exceed it by 1.1 in each direction.
    """

    def __init__(self, grid: Grid | None, *, budget: int = 9) -> None:
        self._grid, self.budget = grid, budget

    @property
    def grid(self) -> Grid:
        """Of tokens that lie on one."""
        assert self._grid is not None
        return self._grid

    def count(self, layout: Layout, per_view: int, *, newline: bool) -> int:
        """How many tokens :meth:`pack` gives for views of ``per_view`` tokens."""
        if (other := self._at_scale(per_view)) is not None:
            return other.count(layout, per_view, newline=newline)
        if not per_view:
            return 0
        if self._grid is None:
            return layout.views * per_view + newline
        if layout.video:
            return layout.views * math.prod(self.frame_grid) + newline
        if layout.tiles is None:
            return per_view + newline
        rows, columns = self.shrunk(*self.kept(layout)[1])
        return per_view + rows * (columns + newline)

    def pack(self, features: Tensor, layout: Layout, newline: Tensor | None) -> Tensor:
        """(views, N, D) to (n, D); ``newline`` (D,) ends each row of the tiles' grid, or else the image.

        Raises:
            UserError: the views of a tiled image or of a video are more than their grid.
        """
        if (other := self._at_scale(features.shape[1])) is not None:
            return other.pack(features, layout, newline)
        end = [newline[None].to(features)] if newline is not None else []
        if not features.shape[1]:
            return features.flatten(0, 1)
        if self._grid is None:
            return torch.cat([features.flatten(0, 1), *end])
        if (layout.video or layout.tiles) and features.shape[1] != math.prod(self.grid):
            raise UserError(
                f"tiles and frames are grids of {self.grid[0]} x {self.grid[1]}, and the vision backbone gives "
                f"{features.shape[1]} tokens a view: drop its class token (model.vision.class_token=false)."
            )
        if layout.video:
            return torch.cat([self._pooled(features).flatten(0, 1), *end])
        if layout.tiles is None:
            return torch.cat([features.flatten(0, 1), *end])
        grid = self._tiled(features[1:], layout)  # (D, rows, columns)
        if newline is not None:
            column = newline[:, None, None].to(grid).expand(-1, grid.shape[1], 1)  # (D, rows, 1)
            grid = torch.cat([grid, column], dim=-1)
        return torch.cat([features[0], grid.flatten(1).transpose(0, 1)])

    def _at_scale(self, per_view: int) -> Packing | None:
        """Of views at another scale of the same square grid (matryoshka pooling draws one each step)."""
        side = math.isqrt(per_view)
        if self._grid is None or per_view < 1 or side * side != per_view or self._grid[0] != self._grid[1]:
            return None
        return Packing((side, side), budget=self.budget) if side != self._grid[0] else None

    @property
    def frame_grid(self) -> Grid:
        """Of one frame of a video, after pooling."""
        return math.ceil(self.grid[0] / 2), math.ceil(self.grid[1] / 2)

    def _pooled(self, frames: Tensor) -> Tensor:
        """(F, N, D) to (F, N / 4, D)."""
        x = frames.transpose(1, 2).unflatten(-1, self.grid)  # (F, D, rows, columns)
        return nn.functional.interpolate(x, self.frame_grid, mode="bilinear").flatten(2).transpose(1, 2)

    def _tiled(self, tiles: Tensor, layout: Layout) -> Tensor:
        """(R C, N, D) to (D, rows, columns): the tiles side by side, without padding, within the budget."""
        assert layout.tiles is not None
        x = tiles.unflatten(1, self.grid).unflatten(0, layout.tiles)  # (R, C, rows, columns, D)
        x = x.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (D, R rows, C columns)
        (top, left), (rows, columns) = self.kept(layout)
        x = x[:, top : top + rows, left : left + columns]
        shrunk = self.shrunk(rows, columns)
        if shrunk == (rows, columns):
            return x
        return nn.functional.interpolate(x[None], shrunk, mode="bilinear")[0]

    def kept(self, layout: Layout) -> tuple[Grid, Grid]:
        """Where the image lies in the grid of its tiles: the first row and column, and how many of each."""
        assert layout.tiles is not None
        rows, columns = layout.tiles[0] * self.grid[0], layout.tiles[1] * self.grid[1]
        height, width = layout.size
        top = left = 0
        # Rounded before it is cut to a whole number: 26.999999999 rows are 27.
        if width / height > columns / rows:
            top = (rows - max(1, int(round(height * columns / width, 7)))) // 2
        else:
            left = (columns - max(1, int(round(width * rows / height, 7)))) // 2
        return (top, left), (rows - 2 * top, columns - 2 * left)

    def shrunk(self, rows: int, columns: int) -> Grid:
        """The grid within the budget."""
        ratio = math.sqrt(rows * columns / (self.budget * math.prod(self.grid)))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

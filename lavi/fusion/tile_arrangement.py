"""The features of one image's views as one sequence of visual tokens.

    whole, then the tiles laid out as one grid, its padding cut off, shrunk to a budget, a newline a row

Frames of a video are pooled 2 x 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lavi.batch import Layout
from lavi.errors import UserError

Grid = tuple[int, int]
"""Rows and columns."""


class VisualArrangement(ABC):
    """The features of one image's views to one sequence of visual tokens; called, it counts them.

    It goes to processes that read data: numbers alone.
    """

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """Ids of the vocabulary whose embeddings :meth:`arrange` puts between the views."""
        return ()

    @abstractmethod
    def __call__(self, layout: Layout, per_view: int) -> int:
        """How many tokens :meth:`arrange` gives for views of ``per_view`` tokens."""

    @abstractmethod
    def arrange(self, features: Tensor, layout: Layout, embeddings: Tensor | None) -> Tensor:
        """(views, N, D) to (n, D).

        Args:
            embeddings: of what else stands in the sequence: of the :attr:`marker_ids` (K, D), or of a newline (D,).
        """


@dataclass(frozen=True)
class TileArrangement(VisualArrangement):
    """LLaVA's: the tiles as one grid, behind the whole image.

    Args:
        view_grid: rows and columns of the features of one view; None: they lie on no grid (a reducer took them off it),
            and all tokens of all views stand one after the other.
        budget: a tiled image keeps at most about this many views' worth of tile tokens (``max_9``); they are shrunk
            bilinearly, and only if they exceed it by 1.1 in each direction. None: they keep all (LLaVA-NeXT).
        newline: one more token ends each row of the tiles' grid, or else the image.
    """

    view_grid: Grid | None
    budget: int | None = 9
    newline: bool = False

    @property
    def grid(self) -> Grid:
        """Of tokens that lie on one."""
        assert self.view_grid is not None
        return self.view_grid

    def __call__(self, layout: Layout, per_view: int) -> int:
        if layout.grid is not None:
            per_view = min(per_view, layout.tokens_of_view(per_view))
            return replace(self, view_grid=layout.grid)(layout._replace(grid=None), per_view)
        if (other := self._at_scale(per_view)) is not None:
            return other(layout, per_view)
        if not per_view:
            return 0
        if self.view_grid is None:
            return layout.views * per_view + self.newline
        if layout.video:
            return layout.views * math.prod(self.frame_grid) + self.newline
        if layout.tiles is None:
            return per_view + self.newline
        rows, columns = self.shrunk(*self.kept(layout)[1])
        return per_view + rows * (columns + self.newline)

    def arrange(self, features: Tensor, layout: Layout, embeddings: Tensor | None) -> Tensor:
        """(views, N, D) to (n, D), with the embedding (D,) of the newline.

        Raises:
            UserError: the views of a tiled image or of a video are more than their grid.
        """
        if layout.grid is not None:
            own = features[:, : layout.tokens_of_view(features.shape[1])]
            return replace(self, view_grid=layout.grid).arrange(own, layout._replace(grid=None), embeddings)
        if (other := self._at_scale(features.shape[1])) is not None:
            return other.arrange(features, layout, embeddings)
        newline = embeddings
        end = [newline[None].to(features)] if newline is not None else []
        if not features.shape[1]:
            return features.flatten(0, 1)
        if self.view_grid is None:
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

    def _at_scale(self, per_view: int) -> TileArrangement | None:
        """Of views at another scale of the same square grid (matryoshka pooling draws one each step)."""
        side = math.isqrt(per_view)
        if self.view_grid is None or per_view < 1 or side * side != per_view or self.view_grid[0] != self.view_grid[1]:
            return None
        return replace(self, view_grid=(side, side)) if side != self.view_grid[0] else None

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
        if layout.fills_tiles:
            return (0, 0), (rows, columns)
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
        if self.budget is None:
            return rows, columns
        ratio = math.sqrt(rows * columns / (self.budget * math.prod(self.grid)))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

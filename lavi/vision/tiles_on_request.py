"""Of a large image only the tiles that promise something are encoded. A method of this library; no paper has it.

    whole image -> tower -> features of the overview --> which tiles? (a share of them, by what the overview shows
                                                                      and, by a ranking that reads it, the question)
    those tiles -> tower -> their features
    the others  --------->  the overview's features, where the tile lies: interpolated, as many as a tile has

What VISOR does to the layers of a decoder, done to the encoder. Each view keeps as many features as before, so it goes
with every fusion; what is saved is the encoder's work: of ten crops with a quarter of the tiles kept, four are encoded.
The tile of an image that needs only one shows what the overview shows: it is not encoded. Where the choice looks at the
overview alone, one encoding serves all questions about an image; by the question (:mod:`lavi.vision.tile_router`) each
has its own.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from lavi.batch import Layout
from lavi.config.targets import path_of
from lavi.config.text import TARGET
from lavi.config.types import Share
from lavi.errors import UserError
from lavi.nn.autocast import without_autocast
from lavi.vision.base import VisionBackbone, save_part
from lavi.vision.windows import windows_of_views


@dataclass(frozen=True)
class RankingInput:
    """What is known of an image before its tiles are encoded, in fp32."""

    overview: Tensor
    """(N, Dv): features of the whole image."""
    tiles: Tensor
    """(tiles, N, Dv): of the whole image, at the places of each tile's tokens."""
    windows: Tensor
    """(tiles, 4): top, left, height and width of each, in heights and widths of the image."""
    question: Tensor | None
    """(T, D): the language model's embeddings of what is asked; None: it is not known."""


class TileRanking(ABC):
    """Says of which tiles most is to be expected.

    One of one's own has :meth:`rank`. It is exported if it is a dataclass of its arguments, has none, or has
    ``save_pretrained(folder)`` as a backbone has it.

    Attributes:
        reads_questions: it looks at the question, too.
        width, question_width: Dv and D that it was trained on; None: any.
        variant: what tells it from others of its class.
    """

    reads_questions: bool = False
    width: int | None = None
    question_width: int | None = None
    variant: str = ""

    @abstractmethod
    def rank(self, given: RankingInput) -> Tensor:
        """(tiles,): how much each tile promises."""

    def flops(self, tiles: int, per_view: int) -> float:
        """FLOPs of ranking so many tiles, of ``per_view`` features each."""
        return 0.0


class Detail(TileRanking):
    """Tiles where the overview differs most from place to place: mean squared distance from the tile's own mean."""

    def rank(self, given: RankingInput) -> Tensor:
        return (given.tiles - given.tiles.mean(1, keepdim=True)).square().mean((1, 2))


class RandomTiles(TileRanking):
    """Any tiles, the same of each picture: what every other ranking has to be better than."""

    def rank(self, given: RankingInput) -> Tensor:
        count, device = len(given.tiles), given.tiles.device
        return torch.rand(count, generator=torch.Generator().manual_seed(0), device="cpu").to(device)


def check_one_grid(vision: VisionBackbone, what: str) -> None:
    """That an overview's features can be interpolated.

    Raises:
        UserError: images have grids of their own, or features lie on none.
    """
    if vision.native_resolution or vision.feature_spec.grid is None:
        raise UserError(
            f"{what} takes a backbone of one grid for all images, and {type(vision).__name__} as it is set has none: "
            "take another, or leave it out."
        )


def tiles_from_overview(overview: Tensor, layout: Layout, grid: tuple[int, int], prefix: int) -> tuple[Tensor, Tensor]:
    """The overview's features (N, Dv) at the places of each tile's tokens, interpolated.

    Args:
        layout: of the image; one that is not cut has no tiles.
        grid: rows and columns of the tokens of one view, behind ``prefix`` others.

    Returns:
        Where each tile lies (tiles, 4), as of :class:`RankingInput`, and its features (tiles, N, Dv).
    """
    of_tiles = windows_of_views(layout, grid)[1:] if layout.tiles is not None else []
    windows = torch.tensor(of_tiles, device="cpu").reshape(-1, 4).to(overview.device)  # (tiles, 4)
    rows, columns = grid
    top, left, height, width = windows.unbind(1)
    down = (torch.arange(rows, device=overview.device) + 0.5) / rows
    right = (torch.arange(columns, device=overview.device) + 0.5) / columns
    coordinates = torch.stack(
        [
            (left[:, None] + width[:, None] * right)[:, None, :].expand(-1, rows, -1),
            (top[:, None] + height[:, None] * down)[:, :, None].expand(-1, -1, columns),
        ],
        dim=-1,
    )  # (tiles, rows, columns, 2): from 0 to 1, across and down
    # In fp32: in half precision places would be far from where they are.
    cells = overview[prefix:].float().T.unflatten(1, grid)  # (Dv, rows, columns)
    cells = cells.expand(len(windows), -1, -1, -1)
    places = grid_sample(cells, 2 * coordinates - 1, padding_mode="border", align_corners=False)
    before = overview[:prefix].expand(len(windows), -1, -1)
    return windows, torch.cat([before, places.flatten(2).transpose(1, 2).to(overview.dtype)], dim=1)


class TilesOnRequest(VisionBackbone):
    """A backbone that encodes whole images, frames, and a share of the tiles.

    Args:
        tower: any backbone of one grid for all images.
        keep: the share of an image's tiles that is encoded, rounded up; 1: all, and the tower is itself.
        ranking: which tiles; by default :class:`Detail`.

    Raises:
        UserError: views of the tower have grids of their own, or the ranking is of another tower.
    """

    def __init__(self, *, tower: VisionBackbone, keep: Share, ranking: TileRanking | None = None) -> None:
        super().__init__()
        check_one_grid(tower, "TilesOnRequest")
        self.tower, self.keep, self.ranking = tower, keep, ranking or Detail()
        if self.ranking.width not in (None, tower.width):
            raise UserError(
                f"{type(self.ranking).__name__} was trained on features of width {self.ranking.width}, and "
                f"{type(tower).__name__}'s have {tower.width}: it is of another model."
            )
        self.width, self.levels, self.grid, self.prefix = tower.width, tower.levels, tower.grid, tower.prefix
        self.preprocessing, self.reads_layouts = tower.preprocessing, True
        self.reads_questions = self.ranking.reads_questions and keep < 1
        self.question_width = self.ranking.question_width
        told = asdict(self.ranking) if is_dataclass(self.ranking) else self.ranking.variant
        self.variant = f"{tower.variant} {keep} {type(self.ranking).__name__}{told}"

    def count(self, layout: Layout) -> int:
        """How many tiles of an image are encoded."""
        tiles = layout.tile_count
        return tiles if self.keep == 1 else math.ceil(self.keep * tiles - 1e-9) if tiles > 1 else 0

    def forward(
        self, pixels: Tensor, layouts: Sequence[Layout] = (), questions: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """(views, C, H, W) to (views, N, Dv).

        Args:
            layouts: of each image; views that none speaks of are images of their own.
            questions: (T, D) of each of these images, what is asked about it; None: not known.
        """
        about = [*(questions or [None] * len(layouts))]
        spoken_of = sum(layout.views for layout in layouts)
        layouts = [*layouts, *[Layout()] * (len(pixels) - spoken_of)]
        about += [None] * (len(layouts) - len(about))
        images = list(pixels.split([layout.views for layout in layouts]))
        whole = [layout if layout.tiles is None else Layout(size=layout.size) for layout in layouts]
        firsts = [image[: layout.views] for image, layout in zip(images, whole, strict=True)]
        overviews = self._encode(torch.cat(firsts), whole).split([layout.views for layout in whole])
        chosen = [self._chosen(*image) for image in zip(overviews, layouts, about, strict=True)]
        wanted = [image[1:][index] for image, (index, _) in zip(images, chosen, strict=True) if len(index)]
        encoded = iter(())
        if wanted:
            tiles = torch.cat(wanted)
            of_tiles = self._encode(tiles, [Layout()] * len(tiles))
            encoded = iter(of_tiles.split([len(one) for one in wanted]))
        features = []
        for overview, (index, tiles) in zip(overviews, chosen, strict=True):
            features += [overview, tiles.index_copy(0, index, next(encoded).to(tiles)) if len(index) else tiles]
        return torch.cat(features)

    def _encode(self, pixels: Tensor, layouts: Sequence[Layout]) -> Tensor:
        features: Tensor = self.tower(pixels, layouts) if self.tower.reads_layouts else self.tower(pixels)
        return features

    def _chosen(self, overview: Tensor, layout: Layout, question: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which tiles of an image to encode (k,), and what the overview (1, N, Dv) has of all (tiles, N, Dv)."""
        if layout.tiles is None:
            return torch.empty(0, dtype=torch.long, device=overview.device), overview[:0]
        windows, tiles = tiles_from_overview(overview[0], layout, self.grid, self.prefix)
        count = self.count(layout)
        if count in (0, len(tiles)):
            return torch.arange(count, device=overview.device), tiles
        with torch.no_grad(), without_autocast(overview):
            known = RankingInput(
                overview[0].float(), tiles.float(), windows, None if question is None else question.float()
            )
            score = self.ranking.rank(known)
        return score.argsort(descending=True, stable=True)[:count], tiles

    def flops(self, views: int, layout: Layout | None = None) -> float:
        if layout is None or layout.tiles is None:
            return self.tower.flops(views, layout)
        tiles, count = layout.tile_count, self.count(layout)
        ranking = self.ranking.flops(tiles, self.tokens) if 0 < count < tiles else 0.0
        return views / layout.views * (self.tower.flops(1 + count) + ranking)

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write tower and ranking; returns the arguments that build it again, paths relative to ``folder``.

        Raises:
            UserError: one of them cannot be saved.
        """
        return {"tower": save_part(self.tower, folder, "tower"), "keep": self.keep, "ranking": self._saved(folder)}

    def _saved(self, folder: Path) -> dict[str, Any]:
        if hasattr(self.ranking, "save_pretrained"):
            return save_part(self.ranking, folder, "ranking")
        kind = type(self.ranking)
        if not is_dataclass(self.ranking) and inspect.signature(kind).parameters:
            raise UserError(f"{kind.__name__} cannot be saved: make it a dataclass of its arguments.")
        return {TARGET: path_of(kind), **(asdict(self.ranking) if is_dataclass(self.ranking) else {})}

"""Tokens of the vocabulary around the views of an image (Idefics3, arXiv 2408.12637; SmolVLM, arXiv 2504.05299).

    <around> <row_1_col_1> V V V V <around> <row_1_col_2> V V V V \\n      tile after tile, row by row
    <around> <row_2_col_1> V V V V <around> <row_2_col_2> V V V V \\n \\n
    <around> <whole> V V V V <around>                                      then the whole image

They are not in the text: they come with the image, are counted with it, and cost what visual tokens cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.fusion.tile_arrangement import VisualArrangement

MOST_TILES = 12
"""On a side: an image of 4,096 pixels, the most that Idefics3 takes, in tiles of 364."""


@dataclass(frozen=True)
class TileMarkers:
    """What stands around the views, as text; in ``tile``, ``{row}`` and ``{column}`` count from 1.

    Args:
        around: before each view, and behind the last.
        whole: behind that, before the whole image.
        tile: behind that, before a tile.
        row_end: behind each row of tiles.
        before_whole: behind the last of these, before the whole image; the two are read as one text.
    """

    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"
    tile: str = "<row_{row}_col_{column}>"
    row_end: str = "\n"
    before_whole: str = "\n"

    def arrangement(self, tokenizer: PreTrainedTokenizerBase) -> MarkedArrangement:
        """The arrangement with the ids of a tokenizer.

        Raises:
            UserError: a marker that stands alone is no token of it.
        """

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        for marker in (self.around, self.whole):
            if len(ids(marker)) != 1:
                raise UserError(
                    f"the tokenizer of {tokenizer.name_or_path} has no token '{marker}' to mark views with."
                )
        grid = itertools.product(range(MOST_TILES), range(MOST_TILES))
        tiles = {(row, column): ids(self.tile.format(row=row + 1, column=column + 1)) for row, column in grid}
        row_end, before_whole = ids(self.row_end), ids(self.row_end + self.before_whole)
        return MarkedArrangement(ids(self.around), ids(self.whole), row_end, before_whole, tiles)

    def of_single_tokens(self) -> MarkedArrangement:
        """The arrangement of a model that is only counted, without a tokenizer: each marker is one token."""
        grid = itertools.product(range(MOST_TILES), range(MOST_TILES))
        return MarkedArrangement((0,), (0,), (0,), (0,), dict.fromkeys(grid, (0,)))


@dataclass(frozen=True)
class MarkedArrangement(VisualArrangement):
    """Tiles and the whole image with ids around them: numbers alone, for the processes that read data."""

    around: tuple[int, ...]
    whole: tuple[int, ...]
    row_end: tuple[int, ...]
    before_whole: tuple[int, ...]
    tiles: dict[tuple[int, int], tuple[int, ...]]

    @property
    def marker_ids(self) -> tuple[int, ...]:
        ids = [*self.around, *self.whole, *self.row_end, *self.before_whole, *itertools.chain(*self.tiles.values())]
        return tuple(dict.fromkeys(ids))

    def __call__(self, layout: Layout, per_view: int) -> int:
        of_view = layout.tokens_of_view(per_view)
        return sum(of_view if isinstance(piece, int) else len(piece) for piece in self._pieces(layout))

    def arrange(self, features: Tensor, layout: Layout, embeddings: Tensor | None) -> Tensor:
        assert embeddings is not None
        row_of = {marker: row for row, marker in enumerate(self.marker_ids)}
        of_view = layout.tokens_of_view(features.shape[1])
        return torch.cat(
            [
                features[piece, :of_view]
                if isinstance(piece, int)
                else embeddings[[row_of[marker] for marker in piece]]
                for piece in self._pieces(layout)
            ]
        )

    def _pieces(self, layout: Layout) -> Sequence[int | tuple[int, ...]]:
        """The sequence of an image: numbers of views (0: the whole image) and the ids between them.

        Raises:
            UserError: a video, or more tiles than there are markers for.
        """
        if layout.video:
            raise UserError("this model marks the tiles of images, and reads no videos: give it single frames.")
        rows, columns = layout.tiles or (0, 0)
        if max(rows, columns) > MOST_TILES:
            raise UserError(f"there are markers for at most {MOST_TILES} tiles on a side, not {rows} x {columns}.")
        pieces: list[int | tuple[int, ...]] = []
        for row in range(rows):
            for column in range(columns):
                pieces += [self.around, self.tiles[row, column], 1 + row * columns + column]
            pieces.append(self.row_end if row + 1 < rows else self.before_whole)
        return [*pieces, self.around, self.whole, 0, self.around]

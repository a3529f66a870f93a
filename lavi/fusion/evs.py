"""Concatenation that leaves out of a video what stays as it was: Efficient Video Sampling (EVS, arXiv 2510.14624).

    frame 1  V V V V      all of it
    frame 2  V . . V      then, of all frames together, the tokens most unlike the same place one frame before
    frame 3  . . V .

How many stay is told by the length of the video alone. Chosen here: tokens are compared by the cosine of what the
projector makes of them, pooled as concatenation pools frames (the paper compares pixels or embeddings); those that stay
have the positions of a sequence without the others, where the paper keeps their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavi.batch import Layout
from lavi.config.types import Count, Share
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.tile_arrangement import TileArrangement, VisualArrangement
from lavi.language.load import LanguageModel
from lavi.nn.autocast import without_autocast
from lavi.nn.projectors import Projector
from lavi.vision.base import FeatureSpec


class EVS(ConcatFusion):
    """A share of each video's visual tokens; images are left as they are.

    Args:
        keep: the share; a whole frame's tokens stay in any case.
        projector, newline, budget: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: a share out of range.
    """

    def __init__(
        self, *, keep: Share, projector: Projector | None = None, newline: bool = False, budget: Count | None = 9
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget)
        if not 0 < keep <= 1:
            raise UserError(f"EVS keeps a share above 0 and at most 1 of a video's tokens, not {keep}.")
        self.keep = keep

    def arrangement(self, language: LanguageModel, features: FeatureSpec) -> VisualArrangement:
        tiles = super().arrangement(language, features)
        assert isinstance(tiles, TileArrangement)
        return FrameArrangement(tiles, self.keep)


@dataclass(frozen=True)
class FrameArrangement(VisualArrangement):
    """Images as ``tiles`` arranges them, and a share ``keep`` of a video's tokens."""

    tiles: TileArrangement
    keep: float

    def __call__(self, layout: Layout, per_view: int) -> int:
        tokens = self.tiles(layout, per_view)
        return self._kept(layout, tokens) + self.tiles.newline if layout.video and tokens else tokens

    def arrange(self, features: Tensor, layout: Layout, embeddings: Tensor | None) -> Tensor:
        tokens = self.tiles.arrange(features, layout, embeddings)  # (n, D)
        if not layout.video or not len(tokens):
            return tokens
        kept, newline = self._kept(layout, len(tokens)), int(self.tiles.newline)
        frames = tokens[: len(tokens) - newline].unflatten(0, (layout.views, -1))  # (F, N, D)
        chosen = most_changed(frames, kept)
        return torch.cat([frames.flatten(0, 1)[chosen], tokens[len(tokens) - newline :]])

    def _kept(self, layout: Layout, tokens: int) -> int:
        """How many of a video's ``tokens`` stay, the newline aside."""
        frames = tokens - self.tiles.newline
        return max(frames // layout.views, round(self.keep * frames))


def most_changed(frames: Tensor, count: int) -> Tensor:
    """Which ``count`` of the tokens of ``frames`` (F, N, D), one frame after the other, stay: indices, ascending."""
    with torch.no_grad(), without_autocast(frames):
        each = frames.float()
        change = 1 - nn.functional.cosine_similarity(each[1:], each[:-1], dim=-1)  # (F - 1, N)
        first = change.new_full((1, frames.shape[1]), float("inf"))
        order = torch.cat([first, change]).flatten().argsort(descending=True, stable=True)
        return order[:count].sort().values

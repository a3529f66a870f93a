"""Training on fewer tiles: in some images, what the overview shows stands in the place of tiles.

A decoder that was trained on all tiles has never read an overview's features where a tile lies, which is what
:class:`lavi.vision.tiles_on_request.TilesOnRequest` gives it. So in training some images lose tiles, any number of
them: one run then serves every share of the tiles. All tiles are encoded, also those that are replaced: training is not
faster. A method of this library; no paper has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lavi.batch import Batch, Layout
from lavi.data.tiling import OneView
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.vision.tiles_on_request import check_one_grid, tiles_from_overview


class TileDropout:
    """Puts what the overview shows in the place of tiles.

    Args:
        share: the share of tiled images in which tiles are replaced; how many of them is drawn evenly from one to all.
        model: whose backbone gives the features.

    Raises:
        UserError: images are not tiled, their views have no common grid, or the reducer reads more than features.
    """

    def __init__(self, share: float, model: VisionLanguageModel) -> None:
        if isinstance(model.tiling, OneView):
            raise UserError(
                "module.tile_dropout replaces tiles, and images are not cut into any: name a tiling, such as "
                "model.tiling={_target_: lavi.data.tiling.AnyRes}."
            )
        check_one_grid(model.vision, "module.tile_dropout")
        if model.reducer is not None and model.reducer.reads_backbone:
            raise UserError(
                f"module.tile_dropout changes features alone, {type(model.reducer).__name__} reads the vision backbone "
                "at work: set module.tile_dropout=null."
            )
        self.share, self.grid, self.prefix = share, model.vision.grid, model.vision.prefix

    def __call__(self, batch: Batch) -> Batch:
        """A batch that brings the backbone's features with it, tiles in them replaced."""
        assert batch.backbone_features is not None
        return replace(batch, backbone_features=self.dropped(batch.backbone_features, batch.layouts))

    def dropped(self, features: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """Features (views, N, Dv) of images of these layouts; overviews, frames and images of one view stay."""
        result = [features[:0]]  # of no image, too, there is something to join
        for image, layout in zip(features.split([layout.views for layout in layouts]), layouts, strict=True):
            if layout.tile_count and float(torch.rand((), device="cpu")) < self.share:
                count = int(torch.randint(1, layout.tile_count + 1, (), device="cpu"))
                lost = torch.randperm(layout.tile_count, device="cpu")[:count].to(image.device)
                _, shown = tiles_from_overview(image[0], layout, self.grid, self.prefix)  # (tiles, N, Dv)
                image = image.index_copy(0, 1 + lost, shown[lost])
            result.append(image)
        return torch.cat(result)

"""Training on fewer tiles: of some images, what the overview shows stands in the place of tiles.

A decoder that was trained on all tiles has never read an overview's features where a tile lies, which is what
:class:`lavi.vision.tiles_on_request.TilesOnRequest` gives it. So in training some images lose tiles, any number of
them: one run then serves every share of the tiles. A method of this library; no paper has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.reduction.base import Reducer
from lavi.vision.base import VisionBackbone
from lavi.vision.tiles_on_request import tiles_from_overview


class TileDropout:
    """Replaces tiles of images.

    Args:
        share: of the images that lose tiles; how many of them is drawn evenly from one to all.
        vision: the backbone whose features it gets.
        reducer: what reads them.

    Raises:
        UserError: views have grids of their own, or the reducer reads more than features.
    """

    def __init__(self, share: float, vision: VisionBackbone, reducer: Reducer | None = None) -> None:
        if vision.native_resolution or vision.feature_spec.grid is None:
            raise UserError("module.tile_dropout takes a backbone of one grid for all images.")
        if reducer is not None and reducer.reads_backbone:
            raise UserError(
                f"module.tile_dropout changes features alone, {type(reducer).__name__} reads the vision backbone at "
                "work: set module.tile_dropout=null."
            )
        self.share, self.grid, self.prefix = share, vision.grid, vision.prefix

    def __call__(self, features: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """Features (views, N, Dv) of images of these layouts; overviews, frames and images of one view stay."""
        result = [features[:0]]
        for image, layout in zip(features.split([layout.views for layout in layouts]), layouts, strict=True):
            tiles = layout.views - 1 if layout.tiles is not None else 0
            if tiles and float(torch.rand(())) < self.share:
                lost = torch.randperm(tiles)[: int(torch.randint(1, tiles + 1, ()))].to(image.device)
                _, shown = tiles_from_overview(image[0], layout, self.grid, self.prefix)  # (tiles, N, Dv)
                image = image.index_copy(0, 1 + lost, shown[lost])
            result.append(image)
        return torch.cat(result)

"""Which image, which tile of it and which frame a visual token comes from, added to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lavi.nn.waves import waves


class ViewEmbedding(nn.Module):
    """Learned embeddings of the image's number, the tile's row and column and the frame (chosen here).

    They are added to normalised features, whose deviation is 1: beside a tower's own, which may be ten times as large,
    images would hardly be told apart.
    Where in its image a token lies is said by :mod:`lavi.nn.grid_code`.
    A whole image is in no tile and an image is no frame: there nothing is added. Numbers above the largest share its
    embedding.

    Args:
        width: Dv.
        images, tiles, frames: how many are told apart.
    """

    OF_IMAGE, OF_FRAME, OF_TILE = 0.5, 0.5, 0.02
    """Deviations at the start.

    From 0.02 LaVi learned late which of two images is meant: 76 % after 2,500 steps of recipes/lab/lavi.yaml, one seed,
    all other hard questions above 94 %; and which of two things appears first in a video: 78 % of
    recipes/lab/video_lavi.yaml on half of its videos, 88 % as it is now (one seed each). Of tiles there are many that
    training may never show: they keep what they start with, and must not be louder than what is seen. The same holds
    for frames (the 20th, where there were 8); they start as waves of their number, the slowest half a cycle over all of
    them, so that each is near to those beside it. What was trained on images alone has seen none of them, and they are
    as loud.
    """

    def __init__(self, width: int, *, images: int, tiles: int = 6, frames: int = 128) -> None:
        super().__init__()
        self.image = nn.Embedding(images, width)
        self.row, self.column, self.frame = (
            nn.Embedding(1 + count, width, padding_idx=0) for count in (tiles, tiles, frames)
        )
        for table in (self.image, self.row, self.column):
            nn.init.normal_(table.weight, std=self.OF_IMAGE if table is self.image else self.OF_TILE)
        number = torch.arange(1 + frames, device="cpu")
        of_frame = waves(number, (0.5 / len(number), 1 / 4), -(-width // 2))[:, :width]  # (1 + frames, Dv)
        with torch.no_grad():
            self.frame.weight.copy_(self.OF_FRAME * math.sqrt(2) * of_frame)
            for table in (self.row, self.column, self.frame):
                table.weight[0].zero_()

    def forward(self, numbers: Tensor) -> Tensor:
        """``numbers`` (views, 4), image from 0, tile row, tile column and frame from 1 (0: none), to (views, 1, Dv)."""
        tables = (self.image, self.row, self.column, self.frame)
        last = torch.tensor([table.num_embeddings - 1 for table in tables], device="cpu").to(numbers.device)
        columns = numbers.minimum(last).unbind(1)
        return torch.stack([table(n) for table, n in zip(tables, columns, strict=True)]).sum(0)[:, None]

"""Two towers that see the same image, such as SigLIP and DINOv2 (arXiv 2401.06209, 2406.16860).

    channels     first  (views, N, D1) -+- side by side -> (views, N, D1 + D2); the second on the grid of the first
                 second (views, M, D2) -+
    tokens       first  (views, N, D1 | 0 ) -+- one after the other -> (views, N + M, D1 + D2)
                 second (views, M, 0  | D2) -+

Tokens of the one are 0 in the channels of the other, so that a linear projector is one of its own for each.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from lavi.batch import Layout
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError
from lavi.vision.base import FeatureSpec, VisionBackbone, save_part
from lavi.vision.tower import resized

log = logging.getLogger("lavi")


class PairPreprocessing(Preprocessing):
    """An image as each of two backbones wants it: the channels of both, the smaller one's padded below and right.

    Colour and interpolation, where views are cut and padded, are the first's.
    """

    def __init__(self, first: Preprocessing, second: Preprocessing) -> None:
        self.first, self.second = first, second
        self.mean, self.resample = first.mean, first.resample
        (one, *one_size), (two, *two_size) = first.pixel_shape, second.pixel_shape
        height, width = (max(sides) for sides in zip(one_size, two_size, strict=True))
        self.pixel_shape = (one + two, height, width)

    def __call__(self, image: Image.Image) -> Tensor:
        return self._side_by_side(self.first(image), self.second(image))

    def of_view(self, view: Image.Image) -> Tensor:
        return self._side_by_side(self.first.of_view(view), self.second.of_view(view))

    def _side_by_side(self, first: Tensor, second: Tensor) -> Tensor:
        _, height, width = self.pixel_shape
        return torch.cat([pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in (first, second)])

    def colours(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        return self.first.colours(self.split(pixels[None])[0][0], size)

    def split(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(views, C, H, W) to what each of the two wants."""
        channels, height, width = self.first.pixel_shape
        _, second_height, second_width = self.second.pixel_shape
        return pixels[:, :channels, :height, :width], pixels[:, channels:, :second_height, :second_width]


def seen_of_rims(preprocessing: Preprocessing) -> tuple[bool, ...]:
    """Whether the left rim of a square image is seen, and that of a wide one."""
    seen = []
    for size in ((200, 200), (400, 200)):
        image = Image.new("RGB", size, "black")
        with torch.device("cpu"):
            plain = preprocessing(image)
            image.paste((255, 255, 255), (0, 0, size[0] // 40, size[1]))
            seen.append(not torch.equal(preprocessing(image), plain))
    return tuple(seen)


class TwoTowers(VisionBackbone):
    """Two backbones side by side, each behind its own preprocessing.

    Args:
        first, second: the backbones.
        join: ``channels``, a token of both each: where the grids differ, the second's is averaged or interpolated to
            the first's; or ``tokens``, all tokens of both, which then lie on no grid.

    Raises:
        UserError: joined by channels, only one keeps its class token; images at their own aspect.
    """

    preprocessing: PairPreprocessing

    def __init__(
        self, *, first: VisionBackbone, second: VisionBackbone, join: Literal["channels", "tokens"] = "channels"
    ) -> None:
        super().__init__()
        if first.native_resolution or second.native_resolution:
            raise UserError("TwoTowers takes backbones of one grid for all images; one of these gives each its own.")
        if first.reads_layouts or second.reads_layouts:
            raise UserError("TwoTowers takes backbones that are not told how views belong together (ReducedTower is).")
        if join == "channels" and first.prefix != second.prefix:
            raise UserError(
                "TwoTowers joins the tokens of two backbones by channels, and only one of them keeps its class token: "
                "set class_token alike."
            )
        if join == "channels" and seen_of_rims(first.preprocessing) != seen_of_rims(second.preprocessing):
            log.warning(
                "TwoTowers joins two grids place by place, and the backbones see different parts of an image: one cuts "
                "off a rim that the other sees. Let both resize alike (of timm: data_config.crop_mode=squash, "
                "data_config.crop_pct=1.0), or set join=tokens."
            )
        self.first, self.second, self.join = first, second, join
        self.preprocessing = PairPreprocessing(first.preprocessing, second.preprocessing)
        self.width = first.width + second.width
        self.prefix = first.prefix if join == "channels" else 0
        self.variant = first.variant + second.variant
        self.grid = first.grid if join == "channels" else (1, first.tokens + second.tokens)

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(self.width, self.tokens, self.grid if self.join == "channels" else None)

    def forward(self, pixels: Tensor) -> Tensor:
        one, two = self.preprocessing.split(pixels)
        first, second = self.first(one), self.second(two)  # (views, N, D1), (views, M, D2)
        if self.join == "tokens":
            own = [pad(first, (0, self.second.width)), pad(second, (self.first.width, 0))]
            return torch.cat(own, dim=1)  # (views, N + M, D1 + D2)
        prefix, grid = second[:, : self.prefix], second[:, self.prefix :]
        grid = resized(grid.transpose(1, 2).unflatten(-1, self.second.grid), self.grid)  # (views, D2, rows, columns)
        return torch.cat([first, torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)], dim=-1)

    def flops(self, views: int, layout: Layout | None = None) -> float:
        return self.first.flops(views) + self.second.flops(views)

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write both towers; returns the arguments that build them again, paths relative to ``folder``.

        Raises:
            UserError: one cannot be saved.
        """
        parts = {name: save_part(getattr(self, name), folder, name) for name in ("first", "second")}
        return parts | {"join": self.join}

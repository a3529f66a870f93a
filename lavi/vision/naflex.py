"""Images at their own aspect (NaViT: arXiv 2307.06304; SigLIP 2 NaFlex: arXiv 2502.14786), without tiles or squares.

    image (h, w) -> the largest rows x columns of patches within a budget, by its aspect -> patches (P, p p C), padded
    views of a batch: patches to the longest of them -> tower, padding masked -> features (views, P, Dv), 0 at padding

How many of a view's features are its own says its layout (:attr:`lavi.batch.Layout.grid`), which fusions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from lavi.batch import Layout
from lavi.config.types import Check, Count
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError
from lavi.loading.bare import bare_configuration
from lavi.nn.grid_code import squarest_grid
from lavi.vision.base import VisionBackbone
from lavi.vision.hf import (
    SELECTS,
    check_origin,
    cut_layers,
    load_tower,
    published_image_processor,
    read_configuration,
)
from lavi.vision.shape_flops import forward_on_meta

KIND = "siglip2_vision_model"


def check_config(config: dict[str, Any]) -> None:
    """Of a bare configuration.

    Raises:
        UserError: no tower of this kind, or a key or a value that it cannot have.
    """
    _settings(None, config)


class NaFlexPreprocessing(Preprocessing):
    """transformers' own for SigLIP 2 NaFlex; pixels (1, P, p p C) are patches, row by row, then zeros."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.mean = tuple(image_processor.image_mean)
        self.resample = Image.Resampling(image_processor.resample)
        self.pixel_shape = (1, image_processor.max_num_patches, image_processor.patch_size**2 * len(self.mean))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        patch, budget = self.image_processor.patch_size, self.image_processor.max_num_patches
        height, width = get_image_size_for_max_num_patches(*size, patch, budget)
        return height // patch, width // patch

    def colours(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        (rows, columns), side = self.grid(size), self.image_processor.patch_size
        patches = pixels[0, : rows * columns].reshape(rows, columns, side, side, -1)
        return patches.permute(4, 0, 2, 1, 3).reshape(-1, rows * side, columns * side)

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        patches: Tensor = self.image_processor(image, return_tensors="pt")["pixel_values"]  # (1, P, p p C)
        return patches


class NaFlexVision(VisionBackbone):
    """SigLIP 2 NaFlex, cut after the last layer whose features are used.

    Features are the layers' own outputs, before the norm that closes the tower. Counted without an image's size, a
    view has all patches of the budget, on :attr:`grid`.

    Args:
        source: hub name or local folder of a checkpoint, of the vision tower or of both towers.
        config: instead of ``source``, a bare configuration of ``siglip2_vision_model``; weights start random.
        layer: whose output to use, as in ``hidden_states``: -1 the last layer's. Several: their features side by side.
        max_patches: the budget of an image, not the checkpoint's own: more patches, finer features, more cost.

    Raises:
        UserError: neither or both of ``source`` and ``config``; nothing there, no NaFlex tower, no such layer.
    """

    native_resolution = True
    preprocessing: NaFlexPreprocessing

    def __init__(
        self,
        source: str | None = None,
        *,
        config: Annotated[dict[str, Any], Check(check_config)] | None = None,
        layer: int | list[int] = -1,
        max_patches: Count | None = None,
    ) -> None:
        super().__init__()
        source = check_origin(source, config)
        settings = _settings(source, config)
        self.tower = load_tower(source, settings)
        image_processor = _image_processor(source, settings)
        if max_patches is not None:
            image_processor.max_num_patches = max_patches
        self.preprocessing = NaFlexPreprocessing(image_processor)
        self.layers = cut_layers(self.tower, layer)
        self.levels = len(self.layers)
        self.width = settings.hidden_size * self.levels
        self.grid = squarest_grid(self.preprocessing.pixel_shape[1])
        self._flops_by_grid: dict[tuple[int, int], float] = {}

    def forward(self, pixels: Tensor, grids: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """(views, 1, P, p p C) to (views, P, Dv), 0 where a view has no patch.

        Args:
            grids: rows and columns of the patches of each view; None: all have those of :attr:`grid`.
        """
        grids = grids or [self.grid] * len(pixels)
        counts = [rows * columns for rows, columns in grids]
        longest = max(counts)
        mask = None
        if min(counts) < longest:
            own = torch.tensor(counts, device="cpu").to(pixels.device)
            mask = torch.arange(longest, device=pixels.device) < own[:, None]  # (views, longest)
        out = self.tower(
            pixels[:, 0, :longest],
            pixel_attention_mask=mask,
            spatial_shapes=torch.tensor(grids, device="cpu"),  # read on the host
            output_hidden_states=self.layers if SELECTS else True,
        )
        features = torch.cat([out.hidden_states[layer] for layer in self.layers], dim=-1)  # (views, longest, Dv)
        if mask is not None:
            features = features * mask[..., None]
        return pad(features, (0, 0, 0, pixels.shape[2] - longest))

    def flops(self, views: int, layout: Layout | None = None) -> float:
        grid = layout.grid if layout is not None and layout.grid is not None else self.grid
        if grid not in self._flops_by_grid:
            self._flops_by_grid[grid] = forward_on_meta(self, self.pixel_shape, [grid])[1]
        return views * self._flops_by_grid[grid]

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the tower, as cut, and its preprocessing; returns the arguments that build it again."""
        self.tower.save_pretrained(folder)
        self.preprocessing.image_processor.save_pretrained(folder)
        return {"source": Path(), "layer": self.layers}


def _settings(source: str | None, config: dict[str, Any] | None) -> PretrainedConfig:
    """The configuration of the vision tower alone, without a pooling head."""
    if config is not None:
        settings = bare_configuration({"model_type": KIND} | config, [KIND], what="vision tower")
    else:
        settings = read_configuration(str(source))
    settings = getattr(settings, "vision_config", settings)
    if settings.model_type != KIND:
        raise UserError(
            f"'{settings.model_type}' has one grid for all images: take lavi.vision.hf.HFVision; NaFlexVision opens "
            f"{KIND} alone, such as google/siglip2-base-patch16-naflex."
        )
    settings.vision_use_head = False
    return settings


def _image_processor(source: str | None, settings: PretrainedConfig) -> Any:
    if source is None:
        kind: Any = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
        return kind(patch_size=settings.patch_size, max_num_patches=settings.num_patches)
    return published_image_processor(source)

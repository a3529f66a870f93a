"""Scenes with what each patch of theirs shows: what the built-in vision tower learns from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.scenes import COLOURS, GLYPHS, SHAPES, SIDE, SIZES, SPLITS, Scene, jpeg
from datamodules.streamed import begin_reading
from lavi.config.types import Count, CountOrZero
from lavi.data.images import open_image

PATCH_CLASSES = {"colour": 1 + len(COLOURS), "shape": 1 + len(SHAPES), "size": 1 + len(SIZES), "glyph": 1 + len(GLYPHS)}
"""Classes of each attribute at a patch; class 0 is "nothing here"."""


def patch_labels(scene: Scene, grid: int) -> dict[str, Tensor]:
    """For each attribute, what the patches of a ``grid`` x ``grid`` raster show: (N,) each.

    ``centre`` (N, 2): x and y of what they show, in widths of the image; NaN of a patch that shows nothing. A patch
    belongs to the thing whose square around its centre covers most of it, if that is a fifth or more.
    """
    labels = {name: torch.zeros(grid, grid, dtype=torch.long) for name in PATCH_CLASSES}
    centres = torch.full((grid, grid, 2), torch.nan)
    covered = torch.full((grid, grid), 0.2)
    side = SIDE / grid
    starts = torch.arange(grid) * side
    for thing in scene.things:
        r = SIZES[thing.size]
        # Overlap along one axis, as a share of the patch: (grid,) for x and for y.
        x, y = (
            ((starts + side).clamp(max=c + r) - starts.clamp(min=c - r)).clamp(min=0) / side for c in (thing.x, thing.y)
        )
        share = y[:, None] * x[None, :]
        mine = share > covered
        covered = torch.where(mine, share, covered)
        values = {
            "colour": 1 + list(COLOURS).index(thing.colour),
            "shape": 1 + SHAPES.index(thing.shape),
            "size": 1 + list(SIZES).index(thing.size),
            "glyph": 1 + GLYPHS.index(thing.glyph) if thing.glyph else 0,
        }
        for name, value in values.items():
            labels[name][mine] = value
        centres[mine] = torch.tensor([thing.x, thing.y]) / SIDE
    return {name: label.flatten() for name, label in labels.items()} | {"centre": centres.flatten(0, 1)}


@dataclass(frozen=True)
class SceneBatches(Dataset[dict[str, Tensor]]):
    """Batches of scenes of the ``tower`` split with their patch labels, by number; a worker gets a copy."""

    processor: Callable[[Image.Image], Tensor]
    grid: int
    batch_size: int
    seed: int

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = range(index * self.batch_size, (index + 1) * self.batch_size)
        scenes = [Scene.draw_from(random.Random(f"{self.seed}/{SPLITS['tower']}/{i}")) for i in numbers]
        pixels = torch.stack([self.processor(open_image(jpeg(s.image()))) for s in scenes])
        labels = [patch_labels(s, self.grid) for s in scenes]
        return {"pixels": pixels} | {name: torch.stack([label[name] for label in labels]) for name in labels[0]}


class TowerScenes(pl.LightningDataModule):
    """Endless scenes with their patch labels, drawn as they are needed; a resumed run goes on behind those it had.

    Args:
        processor: the tower's preprocessing, image to (C, H, W).
        grid: patches along a side.
    """

    def __init__(
        self, processor: Callable[[Image.Image], Tensor], *, grid: Count, batch_size: Count = 64, seed: CountOrZero = 0
    ) -> None:
        super().__init__()
        self.batches = SceneBatches(processor, grid, batch_size, seed)
        self.used = 0
        """Batches that steps have used."""

    def train_dataloader(self) -> Iterable[dict[str, Tensor]]:
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.used, 2**31),
            num_workers=1,
            worker_init_fn=partial(begin_reading, rank=0),  # each batch is drawn by its number, on all ranks
        )

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        self.used += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.used = state["used"]

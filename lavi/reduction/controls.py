"""The controls that tables of reducers often lack: what a choice of tokens is worth beside any choice, and beside none.

A reducer that does not beat these at the same number of tokens has learned nothing about which tokens matter. (The
control of a smaller image is a recipe line of the tower: ``model.vision.image_size``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lavi.config.types import Count, CountOrZero
from lavi.errors import UserError
from lavi.reduction.base import Reducer
from lavi.vision.base import FeatureSpec, VisionBackbone


class RandomTokens(Reducer):
    """``keep`` tokens at random indices of the grid, in their order; the same indices for every view (chosen here).

    Places drawn anew would make a batch answer differently from its rows alone.
    """

    def __init__(self, *, keep: Count, seed: CountOrZero = 0) -> None:
        super().__init__()
        self.keep, self.seed = keep, seed

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(vision.tokens, generator=generator, device="cpu")[: check_count(self.keep, vision)]
        self.indices = chosen.sort().values.tolist()
        return FeatureSpec(vision.width, self.keep, None)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.indices]


class UniformTokens(Reducer):
    """``keep`` tokens spread evenly over the grid, row by row."""

    def __init__(self, *, keep: Count) -> None:
        super().__init__()
        self.keep = keep

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        count = check_count(self.keep, vision)
        self.indices = [(2 * i + 1) * vision.tokens // (2 * count) for i in range(count)]
        return FeatureSpec(vision.width, count, None)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.indices]


class ZeroTokens(Reducer):
    """No token at all: what is answered without looking."""

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        return FeatureSpec(vision.width, 0, None)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :0]


def check_count(keep: int, vision: VisionBackbone) -> int:
    if not 1 <= keep <= vision.tokens:
        raise UserError(f"keep={keep}: a view has {vision.tokens} tokens; keep 1 to all of them (none: ZeroTokens).")
    return keep

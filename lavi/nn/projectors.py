"""Projectors: visual features to the width of a language model, token by token.

V (views, N, Dv) -> projector -> (views, N, D)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lavi.nn.formulas import linear_flops


class Projector(nn.Module, ABC):
    """Built unbound from a recipe with its own arguments, then bound once to two widths."""

    @abstractmethod
    def bind(self, vision_width: int, width: int) -> None:
        """Make the parameters for features of width Dv and a language model of width D."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """(views, N, Dv) to (views, N, D)."""

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """FLOPs of so many tokens (1 multiply-add = 2 FLOPs)."""


class MLPProjector(Projector):
    """Two linear layers with a GELU between them (LLaVA-1.5, arXiv 2310.03744)."""

    def bind(self, vision_width: int, width: int) -> None:
        self.widths = (vision_width, width)
        self.layers = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layers(features)
        return projected

    def flops(self, tokens: int) -> float:
        vision_width, width = self.widths
        return linear_flops(tokens, vision_width, width) + linear_flops(tokens, width, width)


class LinearProjector(Projector):
    """One linear layer without a bias (Idefics3, arXiv 2408.12637; behind a pixel shuffle)."""

    def bind(self, vision_width: int, width: int) -> None:
        self.layer = nn.Linear(vision_width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layer(features)
        return projected

    def flops(self, tokens: int) -> float:
        return linear_flops(tokens, self.layer.in_features, self.layer.out_features)

"""What the backbones around one network share: the choice of layers and of tokens, and the shapes of features.

    pixels -> network, cut after the last chosen layer -+- layer a: [ class | registers ] grid (views, D, rows, columns)
                                                        +- layer b: [ class | registers ] grid
    features (views, N, Dv):  per layer [ class, optional | grid, row by row ], the layers side by side in Dv

A new kind of tower has ``preprocessing`` and :meth:`Tower.encode`, and calls :meth:`Tower.infer_shapes` at the end of
its constructor. Shapes are not read from a configuration: one forward on the meta device shows them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from lavi.errors import UserError
from lavi.vision.base import VisionBackbone
from lavi.vision.shape_flops import evaluating, forward_on_meta, state_on_meta


class Tower(VisionBackbone):
    """A backbone around one network.

    Attributes:
        standing_before: tokens that the network has before its grid (class token, registers), used or not.
    """

    standing_before: int

    @abstractmethod
    def encode(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(views, C, H, W) to the output of each chosen layer, in two parts.

        What stands before the grid (views, P, D), the class token first; and the grid (views, D, rows, columns).
        """

    def infer_shapes(self, *, class_token: bool, registers: int = 0) -> None:
        """Set grid, width, prefix and FLOPs of a view by one forward on the meta device.

        Args:
            class_token: keep the class token.
            registers: how many of the tokens before the grid are registers, not class tokens.

        Raises:
            UserError: there is no class token to keep, or the layers have different grids.
        """
        layers, self._flops_of_view = forward_on_meta(_Encode(self), self.pixel_shape)
        grids = {(grid.shape[2], grid.shape[3]) for _, grid in layers}
        if len(grids) > 1:
            raise UserError(f"the layers of this tower have different grids ({sorted(grids)}): choose one layer.")
        self.grid = grids.pop()
        widths = [grid.shape[1] for _, grid in layers]
        self.width, self.levels = sum(widths), len(widths) if len(set(widths)) == 1 else 1
        self.standing_before = layers[0][0].shape[1]
        self.prefix = int(class_token)
        if layers[0][0].shape[1] - registers < self.prefix:
            raise UserError(
                f"this tower has no class token, its {self.grid[0]}x{self.grid[1]} tokens are all of the grid: leave "
                "class_token out."
            )

    def forward(self, pixels: Tensor) -> Tensor:
        layers = [
            torch.cat([before[:, : self.prefix], grid.flatten(2).transpose(1, 2)], dim=1)  # (views, N, D)
            for before, grid in self.encode(pixels)
        ]
        return torch.cat(layers, dim=-1)  # (views, N, Dv)

    def drop_unused(self, network: nn.Module) -> None:
        """Drop the children of ``network`` whose weights no feature depends on: heads, poolings, closing norms."""
        state = state_on_meta(self, grad=True)
        with evaluating(self), torch.device("meta"), torch.enable_grad():
            features = functional_call(self, state, (torch.zeros(1, *self.pixel_shape),))
            features.sum().backward()
        path = next(name for name, module in self.named_modules() if module is network)
        for name, child in list(network.named_children()):
            weights = [state[f"{path}.{name}.{of_child}"] for of_child, _ in child.named_parameters()]
            if weights and all(weight.grad is None for weight in weights):
                setattr(network, name, nn.Identity())


class _Encode(nn.Module):
    """:meth:`Tower.encode` as a forward, which is what a functional call calls."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.tower.encode(pixels)


def chosen_layers(layer: int | list[int], count: int) -> list[int]:
    """The chosen of ``count`` layers, numbered from 1; ``layer`` counts as ``hidden_states`` do (-1: the last).

    Raises:
        UserError: no such layer, or none at all.
    """
    choices = layer if isinstance(layer, list) else [layer]
    if not choices:
        raise UserError("'layer' of the vision tower is an empty list: name at least one layer, such as -1.")
    numbers = [number + count + 1 if number < 0 else number for number in choices]
    for choice, number in zip(choices, numbers, strict=True):
        if not 1 <= number <= count:
            raise UserError(
                f"the vision tower has {count} layers, none is layer {choice}: take -{count} (the first) to -1 (the "
                "last)."
            )
    return numbers


def encoder_layers(tower: Any) -> nn.ModuleList:
    """The blocks of a vision transformer of transformers.

    Raises:
        UserError: they cannot be told apart.
    """
    layers = tower.config.num_hidden_layers
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if len(stacks) != 1:
        raise UserError(f"cannot tell which modules of {type(tower).__name__} are its {layers} encoder layers.")
    return stacks[0]


def nothing_before(grid: Tensor) -> Tensor:
    """(views, D, rows, columns) to (views, 0, D): what stands before a grid without a class token."""
    return grid.new_zeros(len(grid), 0, grid.shape[1])


def resized(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid (views, D, rows, columns) of ``size``: a finer one averaged, a coarser one interpolated."""
    if grid.shape[2:] == size:
        return grid
    if grid.shape[2] >= size[0] and grid.shape[3] >= size[1]:
        return adaptive_avg_pool2d(grid, size)
    return interpolate(grid, size, mode="bilinear", align_corners=False)


def middle(image: Image.Image, *, elongation: int = 64) -> Image.Image:
    """The middle of an image whose sides differ more than 1:``elongation``, else the image.

    For preprocessing that resizes the shortest edge and keeps the middle alone: of 20000x20 pixels it would make
    224000x224 first.
    """
    width, height = image.size
    size = (min(width, elongation * height), min(height, elongation * width))
    if size == image.size:
        return image
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))

"""The contract of a vision backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lavi.batch import Layout
from lavi.config.targets import path_of
from lavi.config.text import TARGET
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError
from lavi.vision.shape_flops import forward_on_meta


@dataclass(frozen=True)
class FeatureSpec:
    """The shape of one view's features."""

    width: int
    """Dv."""
    tokens: int
    """N."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens (behind a class token, where there is one more); None: they lie on no grid."""


class VisionBackbone(nn.Module, ABC):
    """Pixels in, a grid of features out.

    One of one's own sets ``width``, ``grid`` and ``preprocessing`` in its constructor and has :meth:`forward`. It is
    exported if it has ``save_pretrained(folder)``, which returns the arguments that build it again.

    Attributes:
        width: Dv, the width of a feature.
        levels: how many layers of a tower stand side by side in it, each as wide as the others.
        grid: rows and columns of the feature grid of one view.
        prefix: tokens of one view that stand before its grid: 1 for a class token that was kept. Registers never are.
        native_resolution: views have grids of their own, which :meth:`forward` is told (:mod:`lavi.vision.naflex`).
        reads_layouts: :meth:`forward` is told of each image how its views belong together (frames of a video, tiles).
        reads_questions: :meth:`forward` is told of each image how its views belong together and what is asked about it
            (``forward(pixels, layouts, questions)``, (T, D) of each image or None); its features serve that alone.
        question_width: D of the questions that it can read; None: any.
        variant: what of it neither weights nor pixels tell; cached features of another one are refused.
        preprocessing: one image to the pixels of a view, by the backbone's own mean, deviation, size and interpolation.
    """

    width: int
    levels: int = 1
    grid: tuple[int, int]
    prefix: int = 0
    native_resolution: bool = False
    reads_layouts: bool = False
    reads_questions: bool = False
    question_width: int | None = None
    variant: str = ""
    preprocessing: Preprocessing

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """(views, C, H, W) to (views, N, Dv): the prefix, then the grid row by row."""

    @property
    def tokens(self) -> int:
        """N of one view."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def feature_spec(self) -> FeatureSpec:
        """The shape of one view's features."""
        return FeatureSpec(self.width, self.tokens, self.grid)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one view."""
        return self.preprocessing.pixel_shape

    @property
    def processor(self) -> Preprocessing:
        """What a data module needs to feed this backbone alone."""
        return self.preprocessing

    def flops(self, views: int, layout: Layout | None = None) -> float:
        """FLOPs of encoding ``views`` views (1 multiply-add = 2 FLOPs), counted from the shapes of its operations.

        Args:
            layout: how the views of each image belong together, with their grid at native resolution; None: each is
                an image of its own.
        """
        return views * self._flops_of_view

    @cached_property
    def _flops_of_view(self) -> float:
        return forward_on_meta(self, self.pixel_shape)[1]


def save_part(backbone: Any, folder: Path, name: str) -> dict[str, Any]:
    """Write a backbone that another one holds into ``folder / name``.

    Returns:
        The component that builds it again, as a recipe names it; paths are relative to ``folder``.

    Raises:
        UserError: it cannot be saved.
    """
    if not hasattr(backbone, "save_pretrained"):
        raise UserError(f"{type(backbone).__name__}, the {name} of a backbone, has no save_pretrained(folder).")
    return {TARGET: path_of(type(backbone)), **_within(name, backbone.save_pretrained(folder / name))}


def _within(name: str, value: Any) -> Any:
    """Arguments whose paths are of the folder above."""
    if isinstance(value, dict):
        return {key: _within(name, one) for key, one in value.items()}
    return name / value if isinstance(value, Path) else value

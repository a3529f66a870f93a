"""The contract of a reducer: the tokens of a view to fewer.

    image -> tower -> (views, N, Dv) -> reducer -> (views, n, Dv') -> any fusion

A recipe names one as ``model.reducer``. It costs FLOPs too: they stand in the component ``reducer``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lavi.errors import UserError
from lavi.vision.base import FeatureSpec, VisionBackbone


def tokens_at(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (views, N, E) at ``index`` (views, n): (views, n, E)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class Reducer(nn.Module, ABC):
    """Built unbound from a recipe, then bound once to a vision backbone.

    Attributes:
        reads_backbone: it reads more of the backbone than its features, while that runs.
    """

    reads_backbone: bool = False

    def bind(self, vision: VisionBackbone) -> FeatureSpec:
        """Make what is needed for the features of ``vision``; what they look like afterwards.

        Raises:
            UserError: the backbone keeps a class token, which lies on no grid, or its grid does not fit or is none.
        """
        if vision.prefix:
            raise UserError(
                f"{type(self).__name__} takes the tokens of a grid, and the vision backbone gives a class token beside "
                "them: set model.vision.class_token=false."
            )
        if vision.feature_spec.grid is None:
            raise UserError(
                f"{type(self).__name__} takes the tokens of a grid, and those of two towers one after the other lie on "
                "none: set model.vision.join=channels."
            )
        self.before = vision.feature_spec
        self.after = self.make(vision)
        return self.after

    @abstractmethod
    def make(self, vision: VisionBackbone) -> FeatureSpec:
        """Make the reducer's own parameters, for features that look like :attr:`before`."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """(views, N, Dv) to (views, n, Dv')."""

    def flops(self) -> float:
        """FLOPs of one view (1 multiply-add = 2 FLOPs); averages, selections and sorting count as 0."""
        return 0.0

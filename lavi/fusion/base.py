"""The contract of a fusion: how vision meets language.

Five kinds of meeting go through the same two doors. *Before* the decoder a fusion arranges the sequence (:meth:`
Fusion.forward`); *inside* it, each opened layer hands its call to the context (``VisualContext.around``):

    in the norms      LaVi              arrange: text as it is       around: bind deltas to the layer's norms
    in the sequence   concatenation     arrange: splice V into text  around: -
    in extra layers   cross-attention   arrange: text as it is       around: attend to V, then call
    layers choose     VISOR             arrange: V beside the text   around: call on both, or on the text alone
    on the way out    FastV, PDrop      arrange: splice V into text  around: call, then drop tokens

The language model's own parameters never change their names; a fusion owns its new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavi.batch import Batch
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel


@dataclass(frozen=True)
class Cost:
    """FLOPs of one component (1 multiply-add = 2 FLOPs); ``uncounted`` of them no operator counter sees."""

    flops: float
    uncounted: float = 0.0


class Fusion(nn.Module, ABC):
    """Built unbound from a recipe, then bound once to a language model and a vision width."""

    @abstractmethod
    def bind(self, language: LanguageModel, vision_width: int) -> None:
        """Make the parameters and open the decoder."""

    @abstractmethod
    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        """Arrange one batch; ``features`` (views, N, Dv) stand in the order of ``batch.pixels``."""

    @abstractmethod
    def tokens_in_language(self, visual: int) -> int:
        """How many of ``visual`` visual tokens stand in the language model's sequence."""

    @abstractmethod
    def costs(self, text: int, visual: int) -> dict[str, Cost]:
        """The fusion's own FLOPs for one row of ``text`` tokens and ``visual`` visual tokens, in closed form.

        Components: ``generator`` and ``modulation``, or ``projector``, or what the method calls its parts.
        """


@dataclass
class RowTokens:
    """The visual tokens of each row, padded: ``tokens`` (B, N, Dv); ``column`` (B, N), the text column each is before.

    Padding stands before column :attr:`NEVER`. N is at least 1, so that no attention meets an empty axis.
    """

    tokens: Tensor
    column: Tensor
    image: Tensor
    """(B, N) which image of its row a token belongs to, from 0."""

    NEVER = 2**30


def rows_of_tokens(batch: Batch, features: Tensor) -> RowTokens:
    """Gather the features of each row's images; the index is made on the host, so no device is waited for."""
    views, per_view, width = features.shape
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(len(batch))]  # (token, column, image) of each row
    first = 0
    images_in_row = [0] * len(batch)
    for place in batch.places:
        tokens = range(first * per_view, (first + place.views) * per_view)
        rows[place.row] += [(token, place.column, images_in_row[place.row]) for token in tokens]
        images_in_row[place.row] += 1
        first += place.views
    longest = max(1, *(len(row) for row in rows))
    nothing = (views * per_view, RowTokens.NEVER, 0)  # one zero vector stands behind the features
    padded = torch.tensor([row + [nothing] * (longest - len(row)) for row in rows], device="cpu")  # (B, N, 3)
    index, column, image = padded.to(features.device).unbind(-1)
    flat = torch.cat([features.flatten(0, 1), features.new_zeros(1, width)])  # (views N + 1, Dv)
    return RowTokens(flat[index], column, image)

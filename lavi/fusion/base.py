"""The contract of a fusion: how vision meets language.

Eight kinds of meeting go through the same two doors. *Before* the decoder a fusion arranges the sequence
(:meth:`Fusion.forward`); *inside* it, each opened layer hands its call to the context (``VisualContext.run_layer``):

    in the norms      LaVi              arrange: text as it is       run_layer: bind deltas to the layer's norms
    in the sequence   concatenation     arrange: splice V into text  run_layer: -
    in extra layers   cross-attn, CASA  arrange: text as it is       run_layer: attend to V, then call
    layers choose     VISOR             arrange: V beside the text   run_layer: call on both, or on the text alone
    on the way out    FastV, PDrop      arrange: splice V into text  run_layer: call, then drop tokens
    late, on the way  late injection    arrange: splice V into text  run_layer: set V aside, join, then drop tokens
    behind layers     DeepStack         arrange: splice V into text  run_layer: call, then add to V
    in some layers    ViCA, ShortV      arrange: splice V into text  run_layer: call on both, or on the text

The language model's own parameters never change their names; a fusion owns its new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget
from lavi.vision.base import FeatureSpec


@dataclass(frozen=True)
class Cost:
    """FLOPs of one component (1 multiply-add = 2 FLOPs); ``uncounted`` of them no operator counter sees."""

    flops: float
    uncounted: float = 0.0


class TokenCounter(Protocol):
    """The visual tokens of an image in the language model's sequence, of its layout and the tokens of each view.

    It goes to processes that read data: a function of a module, or an object of numbers alone.
    """

    def __call__(self, layout: Layout, per_view: int) -> int: ...


def no_tokens(layout: Layout, per_view: int) -> int:
    """Of fusions that put nothing into the sequence."""
    return 0


class Fusion(nn.Module, ABC):
    """Built unbound from a recipe, then bound once to a language model and to what it will see."""

    packs = False
    """Whether rows may hold several conversations, which do not see each other."""

    native_resolution = False
    """Whether views may have grids of their own (:attr:`lavi.batch.Layout.grid`), their features padded."""
    own_cache = False
    """Whether its layers keep of a prompt what no cache of transformers can hold."""
    keeps_sequence = False
    """Whether every layer works on the text as it is, no more and no less: only then may it keep a recurrent state."""

    @property
    def modulated_norms(self) -> list[NormTarget]:
        """The norms that it modulates."""
        return []

    @property
    def route_counts(self) -> Counter[Hashable]:
        """How often samples went each way through the decoder, since somebody last cleared it; empty: there is one."""
        return Counter()

    @contextmanager
    def force_route(self, way: Hashable) -> Iterator[None]:
        """While it holds, all samples take this route, one of those that :attr:`route_counts` counts."""
        yield

    def resolved_arguments(self) -> dict[str, Any]:
        """Arguments that named a file, and what was read from it."""
        return {}

    @property
    def default_route(self) -> Hashable | None:
        """The way that :meth:`costs` is about; None: there is only one."""
        return None

    @abstractmethod
    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        """Make the parameters for features of this shape, and open the decoder."""

    @abstractmethod
    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        """Arrange one batch; ``features`` (views, N, Dv) stand in the order of ``batch.pixels``."""

    @property
    def token_counter(self) -> TokenCounter:
        """How many visual tokens of an image stand in the language model's sequence; by default none does."""
        return no_tokens

    def tokens_in_language(self, layout: Layout, per_view: int) -> int:
        """How many visual tokens of an image, ``per_view`` of each view, stand in the language model's sequence."""
        return self.token_counter(layout, per_view)

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        """How many visual tokens each decoder layer works on, of ``inside`` that stand in the sequence."""
        return [inside] * layers

    def cached_by_layer(self, inside: int, layers: int) -> list[int]:
        """How many visual tokens the cache of each decoder layer holds; by default those it works on."""
        return self.visual_by_layer(inside, layers)

    @abstractmethod
    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        """The fusion's own FLOPs for one row of ``text`` tokens, by formula.

        Components: ``generator`` and ``modulation``, or ``projector``, or what the method calls its parts.

        Args:
            layout: of the image that the row sees; None: it sees none.
            per_view: tokens of each of its views.
            past: text tokens before them that are cached, of a prompt with the image: what is computed once is there.
        """

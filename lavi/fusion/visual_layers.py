"""Each layer works on the visual tokens, reads them or leaves them out: what ViCA and ShortV share.

    [ text V V V V text ] -> layers 0 .. L-1, each in one mode:

    whole    (T, V) = layer([T ; V])                     both are updated, as in concatenation    cost O((T + M)^2)
    read     T = layer(T attends to [T ; V]), V = V      V is read through the layer's own keys   cost O(T (T + M))
                                                         and values, and stays as it is
    text     T = layer(T), V = V                         text alone                               cost O(T^2)

In all modes a token has the position it has in the arranged sequence, and a text token sees what stands before it. No
parameter is added. Where a layer's sequence is text alone, V waits beside it. The cache of a layer that is whole or
reads holds the arranged sequence, that of a text layer the text. Each paper's file says which layers have which mode.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count
from lavi.errors import UserError
from lavi.fusion.arrangement import ArrangedContext, visual_columns
from lavi.fusion.base import Cost
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.reading import check_reading, read
from lavi.language.subsequence import AttentionKind, take
from lavi.language.surgery import open_decoder
from lavi.nn.projectors import Projector
from lavi.vision.base import FeatureSpec

Mode = Literal["whole", "read", "text"]
"""What a decoder layer does with the visual tokens."""
PAPER_DEPTH = 32
"""Layers of LLaVA-1.5-7B, for which the papers name layers."""


class VisualLayersFusion(ConcatFusion):
    """Concatenation whose layers have modes; subclasses say which.

    Args:
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.
    """

    packs = False
    own_cache = True

    @abstractmethod
    def modes(self, depth: int) -> list[Mode]:
        """Of each of ``depth`` layers.

        Raises:
            UserError: the language model has other layers than are named.
        """

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        layers, attention = list(language.layers), AttentionKind.of(language.attention, language.hf.config)
        method, modes = type(self).__name__, tuple(self.modes(len(layers)))
        attention.check(method)
        open_decoder(language.hf, range(len(layers)))
        self.plan = VisualLayersPlan(modes, layers, attention)
        reading = self.plan.layers_in("read")
        self.read_sizes = check_reading(language.hf, reading, attention, method) if reading else {}
        self.read_widths = [language.attention_widths(layer) for layer in reading]

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        inputs, order = self.spliced(batch, features, language)
        text_columns, length = inputs.vision.text_columns, order.shape[1]
        assert text_columns is not None
        is_padded = bool((order < 0).any())
        text_is_padded = any(span != (0, batch.input_ids.shape[1]) for span in batch.spans)
        context = VisualLayersContext(
            text_columns=text_columns,
            plan=self.plan,
            length=length,
            valid=inputs.attention_mask if is_padded else None,
            columns=text_columns.masked_fill(~batch.attention_mask, length),
            text_valid=batch.attention_mask if text_is_padded else None,
            visual_columns=visual_columns(order, batch.input_ids.numel()).to(text_columns.device),
        )
        return replace(inputs, vision=context)

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        return [inside if mode == "whole" else 0 for mode in self.plan.modes]

    def cached_by_layer(self, inside: int, layers: int) -> list[int]:
        return [0 if mode == "text" else inside for mode in self.plan.modes]

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        """``reading``: keys and values of V in the layers that read, and what the text's queries do with them."""
        costs = super().costs(text, layout, per_view, past=past)
        if self.read_sizes:  # the keys that a new token meets are counted with its layer's cache
            visual = 0 if past or layout is None else self.tokens_in_language(layout, per_view)
            scores = sum(widths.score_flops(text * visual) for widths in self.read_widths)
            costs["reading"] = Cost(2.0 * visual * sum(self.read_sizes.values()) + scores)
        return costs


class ReadingLayersFusion(VisualLayersFusion):
    """Listed layers read the visual tokens, all others have one other mode.

    Args:
        layers: those that read, from 0; None: the paper's, where the language model is as deep as the paper's.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layer, or none named for a language model of another depth.
    """

    paper_layers: ClassVar[tuple[int, ...]]
    """Those that read, of :data:`PAPER_DEPTH`."""
    other_layers: ClassVar[Mode]
    """The mode of all others."""

    def __init__(
        self,
        *,
        layers: list[int] | None = None,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget, markers=markers)
        self.layers = layers

    def modes(self, depth: int) -> list[Mode]:
        method, reading = type(self).__name__, self.layers
        if reading is None and depth != PAPER_DEPTH:
            raise UserError(
                f"{method}'s paper names layers of {PAPER_DEPTH}, and this language model has {depth}: set "
                f"model.fusion.layers, for example to the same depths, {scaled_layers(self.paper_layers, depth)}."
            )
        reading = list(self.paper_layers) if reading is None else reading
        if wrong := sorted({layer for layer in reading if not 0 <= layer < depth}):
            raise UserError(f"{method} cannot read in layers {wrong}: the language model has 0 to {depth - 1}.")
        return ["read" if layer in reading else self.other_layers for layer in range(depth)]


def scaled_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Layers of :data:`PAPER_DEPTH` as the nearest ones, each once, of a stack of another depth."""
    return sorted({min(round(layer * depth / PAPER_DEPTH), depth - 1) for layer in layers})


@dataclass(frozen=True)
class VisualLayersPlan:
    """What each of the L layers does.

    Args:
        modes: of each layer.
        layers: of the language model.
    """

    modes: tuple[Mode, ...]
    layers: Sequence[nn.Module]
    attention: AttentionKind

    def layers_in(self, mode: Mode) -> list[int]:
        """The layers that have a mode."""
        return [layer for layer, own in enumerate(self.modes) if own == mode]

    def is_whole(self, layer: int) -> bool:
        """Whether a layer works on the arranged sequence; so does the stack before the first one, -1."""
        return layer < 0 or self.modes[layer] == "whole"

    def needs_visual(self, layer: int) -> bool:
        """Whether this layer or one behind it still wants the visual tokens."""
        return any(mode != "text" for mode in self.modes[layer:])


@dataclass(kw_only=True)
class VisualLayersContext(ArrangedContext):
    """The arranged prompt, and V where it waits beside the text."""

    plan: VisualLayersPlan
    valid: Tensor | None
    """(B, S); None: no padding."""
    columns: Tensor
    """(B, T): where the text stands in the arranged sequence (S: padding)."""
    text_valid: Tensor | None
    """(B, T); None: no padding."""
    visual_columns: Tensor
    """(B, M): where V stands in it (S: padding)."""
    visual: dict[int, Tensor] = field(default_factory=dict)
    """V (B, M, D) as each layer found it before which it was set aside. Made while the prompt is read."""

    def for_step(self, past: int, length: int) -> Self:
        return replace(self, past=past, new_tokens=length, visual={})

    def for_generation(self, copies: int) -> Self:
        tensors = {name: getattr(self, name) for name in ("valid", "columns", "text_valid", "visual_columns")}
        repeated = {name: part.repeat_interleave(copies, dim=0) for name, part in tensors.items() if part is not None}
        return replace(self, text_columns=None, **repeated)

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        mode = self.plan.modes[layer]
        if not self.visual_columns.shape[1]:
            return call(hidden, **kwargs)
        if mode == "text":
            kwargs = self._text_kwargs(layer, kwargs, hidden.dtype)
        if self.past:
            return call(hidden, **kwargs)
        columns = self.arranged.columns(self.columns)
        visual_columns = self.arranged.with_padding(self.visual_columns)
        hidden = self._sequence_for(layer, hidden, columns, visual_columns)
        if mode == "read":
            hidden = read(
                self.plan.layers[layer],
                call,
                (hidden, columns),
                (self._visual_before(layer), visual_columns),
                kwargs,
                arranged=self.arranged,
                valid=self.arranged.valid(self.valid),
                attention=self.plan.attention,
                number=layer,
            )
        else:
            hidden = call(hidden, **kwargs)
        # Behind the layers the stack wants the sequence that it gave (GPT-2): the text in its columns, nothing else.
        is_last = layer == len(self.plan.modes) - 1
        return self.arranged.join((hidden, columns)) if is_last and mode != "whole" else hidden

    def _sequence_for(self, layer: int, hidden: Tensor, columns: Tensor, visual_columns: Tensor) -> Tensor:
        """What a layer works on, arranged or text alone, of what the one before it left."""
        before, now = self.plan.is_whole(layer - 1), self.plan.is_whole(layer)
        if before and not now:
            if self.plan.needs_visual(layer):
                self.visual[layer] = take(hidden, visual_columns)
            return take(hidden, columns)
        if now and not before:
            return self.arranged.join((hidden, columns), (self._visual_before(layer), visual_columns))
        return hidden

    def _visual_before(self, layer: int) -> Tensor:
        """V (B, M, D) as it waits before a layer."""
        return self.visual[max(first for first in self.visual if first <= layer)]

    def _text_kwargs(self, layer: int, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of a layer that works on the text alone."""
        arranged = self.arranged
        valid = arranged.valid(self.text_valid)
        columns = arranged.columns(self.columns)
        return arranged.layer_kwargs(kwargs, columns, valid, attention=self.plan.attention, layer=layer, dtype=dtype)

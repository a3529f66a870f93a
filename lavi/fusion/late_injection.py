"""Late injection: visual tokens enter the decoder at a deeper layer (DeepInsert 2504.19327, HiDrop 2602.23699).

    [ text           text ] -> layers 0 .. first-1       text alone; V waits as it came into the decoder
    [ text V V V V V text ] -> layers first .. last      concatenation; V pruned behind the layers in ``stages``
    [ text           text ] -> layers last+1 .. L-1      text alone; only where ``last`` is given

The papers: early layers need no visual tokens, so V is spliced in at a middle layer, with the positions of the whole
sequence (both). HiDrop prunes V behind some of the layers that follow, and what is left leaves the sequence behind a
deep one. For LLaVA-1.5-7B, 32 layers and 576 tokens, its authors' code has V in layers 9 to 24 and keeps 215, 10, 5 and
1 of it behind layers 10, 14, 16 and 18: 64 tokens a layer. Chosen here: no layer is a default, since it depends on the
language model; V is ranked as in :mod:`lavi.fusion.pruning`, and the choice is not trained, where HiDrop's
differentiable top-k lets a gradient through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from lavi.batch import Batch
from lavi.config.types import Count, CountOrZero, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import visual_columns
from lavi.fusion.pruning import Columns, PruningContext, PruningFusion
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.subsequence import take
from lavi.nn.projectors import Projector
from lavi.vision.base import FeatureSpec


class LateInjection(PruningFusion):
    """Text alone, then text and visual tokens, then optionally text alone again.

    Args:
        first: the first layer, from 0, that the visual tokens are in.
        last: the last one; None: they stay.
        stages: after layer, of ``first`` to the one before ``last`` -> the share of the visual tokens still there that
            is kept; None: all stay.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layers, or a share out of range.
    """

    def __init__(
        self,
        *,
        first: CountOrZero,
        last: CountOrZero | None = None,
        stages: dict[int, Share] | None = None,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(stages=stages or {}, projector=projector, newline=newline, budget=budget, markers=markers)
        self.first, self.last = first, last

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        depth = len(language.layers)
        last = depth - 1 if self.last is None else self.last
        if not 0 <= self.first <= last < depth:
            raise UserError(
                f"late injection has visual tokens in layers {self.first} to {last}: the language model has 0 to "
                f"{depth - 1}."
            )
        if wrong := [layer for layer in self.stages if not self.first <= layer < last]:
            raise UserError(
                f"late injection prunes after layers {wrong}: there are visual tokens before and behind layers "
                f"{self.first} to {last - 1}."
            )
        super().bind(language, features)

    def all_stages(self, depth: int) -> dict[int, float]:
        if self.last is None or self.last == depth - 1:
            return self.stages
        return self.stages | {self.last: 0.0}

    @property
    def is_plain(self) -> bool:
        return super().is_plain and not self.first

    def context(self, batch: Batch, inputs: DecoderInput, order: Tensor) -> PruningContext:
        context = super().context(batch, inputs, order)
        assert context.text_columns is not None
        is_padded = any(span != (0, batch.input_ids.shape[1]) for span in batch.spans)
        return LateInjectionContext(
            **vars(context),
            first=self.first,
            columns=context.text_columns.masked_fill(~batch.attention_mask, context.length),
            text_valid=batch.attention_mask if is_padded else None,
            visual_columns=visual_columns(order, batch.input_ids.numel()).to(context.text_columns.device),
        )

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        counts = super().visual_by_layer(inside, layers)
        return [0] * self.first + counts[self.first :]


@dataclass(kw_only=True)
class LateInjectionContext(PruningContext):
    """The arranged prompt, and V where it waits beside the text."""

    first: int
    """The first layer that V is in."""
    columns: Tensor
    """(B, T): where the text stands in the arranged sequence (S: padding)."""
    text_valid: Tensor | None
    """(B, T); None: no padding."""
    visual_columns: Tensor
    """(B, M): where V stands in it (S: padding)."""
    waiting: Tensor | None = None
    """V (B, M, D) as it waits. Made while the prompt is read."""

    def for_step(self, past: int, length: int) -> Self:
        return replace(super().for_step(past, length), waiting=None)

    def for_generation(self, copies: int) -> Self:
        tensors = {name: getattr(self, name) for name in ("columns", "text_valid", "visual_columns")}
        repeated = {name: part.repeat_interleave(copies, dim=0) for name, part in tensors.items() if part is not None}
        return replace(super().for_generation(copies), **repeated)

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        if self.past or not any(self.visual_counts):
            return super().run_layer(layer, call, hidden, **kwargs)
        columns, visual_columns = self.arranged.columns(self.columns), self.arranged.with_padding(self.visual_columns)
        if layer == 0 and self.first:
            self.waiting = take(hidden, visual_columns)
            hidden = take(hidden, columns)
            self.stages[-1] = Columns(columns, self.arranged.valid(self.text_valid), [0] * len(hidden))
        elif layer == self.first and layer:
            assert self.waiting is not None  # and it stays: a checkpointed layer is run again
            hidden = self.arranged.join((hidden, columns), (self.waiting, visual_columns))
            self.stages[layer - 1] = None
        return super().run_layer(layer, call, hidden, **kwargs)

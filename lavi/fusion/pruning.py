"""Visual tokens leave on the way through the decoder: FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247).

    [ text V V V V V V V V text ] -> layers 0 .. k -> rank V by the attention of the last token of the prompt in layer k
    [ text V   V     V     text ] -> layers k+1 .. -> (rank again, drop again) -> ...

Concatenation with any number of such stages; FastV has one, behind the second layer, PyramidDrop three. Each sample
keeps its own tokens. Pruned tokens are in no later layer's cache. Scores are computed for one query in the ranking
layers alone, so fused attention stays in use. Chosen here: in training and under teacher forcing the query is the last
token before the first answer, so in a conversation of several questions the first one decides; an answer that is
generated is ranked by its own question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import ArrangedContext, last_prompt_columns
from lavi.fusion.base import Cost
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.ranking import Ranking, ranking_in
from lavi.language.subsequence import AttentionKind, LayeredCache, take
from lavi.language.surgery import open_decoder
from lavi.nn.projectors import Projector
from lavi.vision.base import FeatureSpec


class PruningFusion(ConcatFusion):
    """Concatenation whose visual tokens are dropped after some layers.

    Args:
        stages: after layer (from 0) -> the share of the visual tokens still there that is kept, above 0 and at most 1.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layer, or a share out of range.
    """

    packs = False
    own_cache = True

    def __init__(
        self,
        *,
        stages: dict[int, Share],
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget, markers=markers)
        for layer, keep in stages.items():
            if not 0 < keep <= 1:
                raise UserError(f"pruning after layer {layer} keeps a share above 0 and at most 1, not {keep}.")
        self.stages = {int(layer): keep for layer, keep in sorted(stages.items()) if keep < 1}

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        layers, attention = list(language.layers), AttentionKind.of(language.attention, language.hf.config)
        self.query_widths = [language.attention_widths(layer).query for layer in range(len(layers))]
        if wrong := [layer for layer in self.stages if not 0 <= layer < len(layers) - 1]:
            raise UserError(
                f"pruning after layers {wrong}: the language model has layers to prune before in 0 to "
                f"{len(layers) - 2}."
            )
        self.plan = PruningPlan(self.all_stages(len(layers)), layers, attention)
        if not self.is_plain:
            attention.check(type(self).__name__)
            open_decoder(language.hf, range(len(layers)))

    def all_stages(self, depth: int) -> dict[int, float]:
        """After which of ``depth`` layers what share of the visual tokens still there is kept; 0: none."""
        return self.stages

    @property
    def is_plain(self) -> bool:
        """Whether all layers work on all tokens."""
        return not self.plan.stages

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        inputs, order = self.spliced(batch, features, language)
        return inputs if self.is_plain else replace(inputs, vision=self.context(batch, inputs, order))

    def context(self, batch: Batch, inputs: DecoderInput, order: Tensor) -> PruningContext:
        """Of a batch as :meth:`spliced` arranged it."""
        columns = inputs.vision.text_columns
        assert columns is not None
        device, visual = columns.device, order >= batch.input_ids.numel()  # (B, S)
        asking = last_prompt_columns(batch)
        if any(self.plan.stages.values()) and any(slot.column > asking[slot.row] for slot in batch.image_slots):
            raise UserError(
                f"{type(self).__name__} ranks visual tokens by what the first question attends to, and this batch has "
                "a conversation with an image behind it: leave such conversations out."
            )
        queries = torch.tensor(asking, device="cpu")[:, None].to(device)
        return PruningContext(
            text_columns=columns,
            plan=self.plan,
            length=order.shape[1],
            valid=inputs.attention_mask,
            visual=visual.to(device),
            query=columns.gather(1, queries)[:, 0],
            visual_counts=visual.sum(1).tolist(),
            text_counts=batch.text_lengths,
            pads_left=all(stop == batch.input_ids.shape[1] for _, stop in batch.spans),
        )

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        counts, left = [], inside
        for layer in range(layers):
            counts.append(left)
            left = kept_count(left, self.plan.stages.get(layer, 1.0))
        return counts

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        inside = 0 if past or layout is None else self.tokens_in_language(layout, per_view)
        by_layer = self.visual_by_layer(inside, self.plan.depth)
        ranked = [layer for layer, keep in self.plan.stages.items() if keep and inside]
        ranking = sum(2.0 * (text + by_layer[layer]) * self.query_widths[layer] for layer in ranked)
        return super().costs(text, layout, per_view, past=past) | {"ranking": Cost(ranking)}


class FastV(PruningFusion):
    """One stage: behind the first ``layer`` layers (the paper's K) a share ``keep`` of the visual tokens stays."""

    def __init__(
        self,
        *,
        layer: Count = 2,
        keep: Share = 0.5,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(stages={layer - 1: keep}, projector=projector, newline=newline, budget=budget, markers=markers)


class PyramidDrop(PruningFusion):
    """Stages of equal depth; behind each a share ``keep`` of the visual tokens that are left stays.

    Args:
        stages: into how many parts the layers are divided (paper: 4).
        keep: the paper's lambda.
    """

    def __init__(
        self,
        *,
        stages: Count = 4,
        keep: Share = 0.5,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(stages={}, projector=projector, newline=newline, budget=budget, markers=markers)
        if stages < 2 or not 0 < keep <= 1:
            raise UserError(
                f"PyramidDrop has at least 2 stages and keeps above 0 and at most 1, not {stages} and {keep}."
            )
        self.parts, self.keep = stages, keep

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        depth = len(language.layers)
        ends = {round(depth * part / self.parts) - 1 for part in range(1, self.parts)}
        self.stages = {layer: self.keep for layer in sorted(ends) if layer >= 0 and self.keep < 1}
        super().bind(language, features)


def kept_count(count: int, share: float) -> int:
    """How many of ``count`` visual tokens a stage keeps; at least one, unless its share is 0."""
    return max(1, round(share * count)) if count and share else 0


@dataclass(frozen=True)
class PruningPlan:
    """Where tokens are ranked and dropped.

    Args:
        stages: after layer -> the share that is kept; 0: none.
        layers: the L layers of the language model.
    """

    stages: Mapping[int, float]
    layers: Sequence[nn.Module]
    attention: AttentionKind

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)


@dataclass
class Columns:
    """The columns that layers from one on work on."""

    index: Tensor
    """(B, n) into the arranged sequence."""
    valid: Tensor | None
    """(B, n); None: all."""
    visual_counts: list[int]
    """Visual tokens of each row."""


@dataclass(kw_only=True)
class PruningContext(ArrangedContext):
    """The arranged prompt, and which of its columns each layer of this call works on."""

    plan: PruningPlan
    valid: Tensor
    """(B, S)."""
    visual: Tensor
    """(B, S): the visual tokens among them."""
    query: Tensor
    """(B,): the column of the token whose attention ranks."""
    visual_counts: list[int]
    """Visual tokens of each row."""
    text_counts: list[int]
    """Text tokens of each row's prompt."""
    pads_left: bool
    stages: dict[int, Columns | None] = field(default_factory=dict)
    """For each layer behind a stage, until the next: what is left, None: all. Made while the prompt is read."""

    def for_step(self, past: int, length: int) -> Self:
        # What was kept is made anew by each reading of the prompt; the cache carries it to the calls that follow.
        return replace(self, past=past, new_tokens=length, stages={})

    def for_generation(self, copies: int) -> Self:
        tensors: dict[str, Any] = {
            name: getattr(self, name).repeat_interleave(copies, dim=0) for name in ("valid", "visual", "query")
        }
        counts: dict[str, Any] = {
            name: [count for count in getattr(self, name) for _ in range(copies)]
            for name in ("visual_counts", "text_counts")
        }
        return replace(self, text_columns=None, **tensors, **counts)

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        stages = self.stages
        if self.past:
            stages = kwargs["past_key_values"].kept["stages"]
        elif isinstance(cache := kwargs.get("past_key_values"), LayeredCache):
            cache.kept["stages"] = stages
        stage = max((after for after in stages if after < layer), default=None)
        columns = None if stage is None else stages[stage]
        if columns is not None:
            kwargs = self.arranged.layer_kwargs(
                kwargs, columns.index, columns.valid, attention=self.plan.attention, layer=layer, dtype=hidden.dtype
            )
        if layer not in self.plan.stages or self.past or not any(self.visual_counts):
            out = call(hidden, **kwargs)
        else:
            out, stages[layer] = self._drop(layer, call, hidden, columns or self._all_columns(), kwargs)
        if layer == self.plan.depth - 1 and not self.past and stages and (left := stages[max(stages)]) is not None:
            # The stack wants back the sequence that it gave (GPT-2), where the text is read from: what was pruned is 0.
            return self._spread(out, left)
        return out

    def _drop(
        self, layer: int, call: Callable[..., Tensor], hidden: Tensor, before: Columns, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Columns]:
        """A layer's output (B, n, D) at the columns that stay behind it, and these columns."""
        share = self.plan.stages[layer]
        if share:
            query = (before.index == self.query[:, None]).int().argmax(1)  # (B,)
            ranking = Ranking(self.plan.attention.kernel, at=query, columns=before.index, valid=before.valid)
            with ranking_in(self.plan.layers[layer], ranking):
                out = call(hidden, **kwargs)
            assert ranking.scores is not None
            scores = ranking.scores
        else:  # none stays: there is nothing to rank
            out = call(hidden, **kwargs)
            scores = torch.zeros_like(hidden[..., 0])
        indices, columns = self._pruned(before, scores, share)
        return take(out, indices), columns

    def _all_columns(self) -> Columns:
        """Every column of this call: the prompt's, and what was said behind it without a cache."""
        rows = list(zip(self.text_counts, self.visual_counts, strict=True))
        is_padded = len({text + visual for text, visual in rows}) > 1
        index = torch.arange(self.new_tokens, device=self.valid.device).expand(len(rows), -1)
        return Columns(index, self.arranged.valid(self.valid) if is_padded else None, self.visual_counts)

    def _pruned(self, before: Columns, scores: Tensor, share: float) -> tuple[Tensor, Columns]:
        """Which (B, n) of the columns before stay, and the columns they are."""
        behind = self.arranged.behind
        visual = torch.cat([self.visual, self.visual.new_zeros(len(self.visual), behind)], dim=1)
        visual = take(visual, before.index)  # (B, n before)
        visual = visual if before.valid is None else visual & before.valid
        counts = [kept_count(count, share) for count in before.visual_counts]
        most = torch.tensor(counts, device="cpu").to(scores.device)[:, None]
        order = scores.masked_fill(~visual, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        stays = torch.where(visual, rank < most, torch.ones_like(visual))
        stays = stays if before.valid is None else stays & before.valid
        lengths = [text + count + behind for text, count in zip(self.text_counts, counts, strict=True)]
        longest = max(lengths)
        if self.pads_left:
            indices = stays.long().argsort(dim=1, stable=True)[:, -longest:]
        else:
            indices = (~stays).long().argsort(dim=1, stable=True)[:, :longest]
        valid = None if min(lengths) == longest else take(stays, indices)
        return indices, Columns(take(before.index, indices), valid, counts)

    def _spread(self, out: Tensor, columns: Columns) -> Tensor:
        """(B, n, D) to (B, S, D)."""
        index = columns.index
        if columns.valid is not None:
            index = index.masked_fill(~columns.valid, self.new_tokens)
        return self.arranged.join((out, index))

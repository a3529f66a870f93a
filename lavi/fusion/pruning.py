"""Visual tokens leave on the way through the decoder: FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247).

    [ text V V V V V V V V text ] -> layers 0 .. k -> rank V by the attention of the last token of the prompt in layer k
    [ text V   V     V     text ] -> layers k+1 .. -> (rank again, drop again) -> ...

Concatenation with any number of such stages; FastV has one, behind the second layer, PyramidDrop three. Each sample
keeps its own tokens. Pruned tokens are in no later layer's cache. Scores are computed for one query in the ranking
layers alone, so fused attention stays in use. Chosen here: in training and teacher forcing the asking token is
the last one before the first answer, so in a conversation of several questions the first one decides; an answer that is
generated is ranked by its own question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lavi.batch import Batch, Layout
from lavi.config.types import Count, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import last_prompt_columns
from lavi.fusion.base import Cost
from lavi.fusion.concat import ConcatFusion
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.ranking import Ranking, ranking_in
from lavi.language.subsequence import LayeredCache, Span, check_kernel, layer_kwargs_for_subset, take
from lavi.language.surgery import open_decoder
from lavi.vision.base import FeatureSpec


class PruningFusion(ConcatFusion):
    """Concatenation whose visual tokens are dropped after some layers.

    Args:
        stages: after layer (from 0) -> the share of the visual tokens still there that is kept, above 0 and at most 1.
        newline, budget: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layer, or a share out of range.
    """

    packs = False

    def __init__(self, *, stages: dict[int, Share], newline: bool = False, budget: Count = 9) -> None:
        super().__init__(newline=newline, budget=budget)
        for layer, keep in stages.items():
            if not 0 < keep <= 1:
                raise UserError(f"pruning after layer {layer} keeps a share above 0 and at most 1, not {keep}.")
        self.stages = {int(layer): keep for layer, keep in sorted(stages.items()) if keep < 1}

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        self.layers = list(language.layers)  # a list: they stay the language model's, not the fusion's
        self.depth, self.kernel = len(self.layers), language.attention
        self.sliding = LayeredCache(language.hf.config)
        self.key_width = language.attention_width
        if wrong := [layer for layer in self.stages if not 0 <= layer < self.depth - 1]:
            raise UserError(
                f"pruning after layers {wrong}: the language model has layers to prune before in 0 to {self.depth - 2}."
            )
        if self.stages:
            check_kernel(self.kernel, self.sliding, "pruning")
            open_decoder(language.hf, range(self.depth))

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        made = super().forward(batch, features, language)
        if not self.stages:
            return made
        columns = made.vision.text_columns
        assert columns is not None
        device, length = columns.device, made.attention_mask.shape[1]
        text = torch.zeros(len(batch), length + 1, dtype=torch.bool, device=device)  # the last one for padding
        text.scatter_(1, columns.masked_fill(~batch.attention_mask, length), True)
        text = text[:, :length]
        counts = [0] * len(batch)
        for place in batch.image_slots:
            counts[place.row] += self.tokens_in_language(place.layout, features.shape[1])
        asking = torch.tensor(last_prompt_columns(batch), device="cpu")[:, None].to(device)
        context = PruningContext(
            text_columns=columns,
            fusion=self,
            length=length,
            valid=made.attention_mask,
            visual=made.attention_mask & ~text,
            columns=columns,
            asking=columns.gather(1, asking)[:, 0],
            counts=counts,
            texts=[stop - start for start, stop in batch.spans],
            pads_left=all(stop == batch.input_ids.shape[1] for _, stop in batch.spans),
        )
        return replace(made, vision=context)

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        found, left = [], inside
        for layer in range(layers):
            found.append(left)
            left = kept(left, self.stages.get(layer, 1.0))
        return found

    def costs(self, text: int, layout: Layout | None, per_view: int, *, decoding: bool = False) -> dict[str, Cost]:
        inside = self.tokens_in_language(layout, per_view) if layout else 0
        ranked = (
            [] if decoding or layout is None else [self.visual_by_layer(inside, self.depth)[k] for k in self.stages]
        )
        ranking = sum(2.0 * (text + visual) * self.key_width for visual in ranked)
        return super().costs(text, layout, per_view, decoding=decoding) | {"ranking": Cost(ranking)}


class FastV(PruningFusion):
    """One stage: behind the first ``layer`` layers (the paper's K) a share ``keep`` of the visual tokens stays."""

    def __init__(self, *, layer: Count = 2, keep: Share = 0.5, newline: bool = False, budget: Count = 9) -> None:
        super().__init__(stages={layer - 1: keep}, newline=newline, budget=budget)


class PyramidDrop(PruningFusion):
    """Stages of equal depth; behind each a share ``keep`` of the visual tokens that are left stays.

    Args:
        stages: into how many parts the layers are divided (paper: 4).
        keep: the paper's lambda.
    """

    def __init__(self, *, stages: Count = 4, keep: Share = 0.5, newline: bool = False, budget: Count = 9) -> None:
        super().__init__(stages={}, newline=newline, budget=budget)
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


def kept(count: int, share: float) -> int:
    """How many of ``count`` visual tokens a stage keeps; at least one."""
    return max(1, round(share * count)) if count else 0


@dataclass
class Columns:
    """The columns that layers from one on work on."""

    index: Tensor
    """(B, n) into the arranged sequence."""
    valid: Tensor | None
    """(B, n); None: all."""
    counts: list[int]
    """Visual tokens of each row."""


@dataclass
class PruningContext(VisualContext):
    """The arranged prompt, and which of its columns each layer of this call works on."""

    fusion: PruningFusion = None  # type: ignore[assignment]
    length: int = 0
    """S, of the arranged prompt."""
    valid: Tensor = None  # type: ignore[assignment]
    """(B, S)."""
    visual: Tensor = None  # type: ignore[assignment]
    """(B, S): the visual tokens among them."""
    columns: Tensor = None  # type: ignore[assignment]
    """(B, T): where the text stands."""
    asking: Tensor = None  # type: ignore[assignment]
    """(B,): the column of the token whose attention ranks."""
    counts: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    pads_left: bool = False
    past: int = 0
    now: int = 0
    """Tokens of this call."""
    stages: dict[int, Columns] = field(default_factory=dict)
    """For each layer behind a stage, until the next: what is left. Made while the prompt is read."""

    def for_step(self, past: int, length: int) -> Self:
        # What was kept is made anew by each reading of the prompt; the cache carries it to the calls that follow.
        return replace(self, past=past, now=length, stages={})

    def new_cache(self, config: PretrainedConfig) -> LayeredCache:
        return LayeredCache(config)

    def for_generation(self, copies: int) -> Self:
        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(copies, dim=0)

        names = ("valid", "visual", "columns", "asking")
        tensors: dict[str, Any] = {name: repeat(getattr(self, name)) for name in names}
        lists: dict[str, Any] = {
            name: [n for n in getattr(self, name) for _ in range(copies)] for name in ("counts", "texts")
        }
        return replace(self, text_columns=None, **tensors, **lists)

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        stages: dict[int, Columns] = self.stages
        if self.past:
            stages = kwargs["past_key_values"].kept["stages"]
        elif isinstance(cache := kwargs.get("past_key_values"), LayeredCache):
            cache.kept["stages"] = stages
        here = max((k for k in stages if k < layer), default=None)
        columns = stages[here] if here is not None else None
        if columns is not None:
            kwargs = layer_kwargs_for_subset(
                kwargs,
                columns.index,
                columns.valid,
                Span(self.length, self.past, self.now),
                cache=self.fusion.sliding,
                layer=layer,
                kernel=self.fusion.kernel,
                dtype=hidden.dtype,
            )
        keep = self.fusion.stages.get(layer)
        if keep is None or self.past or not any(self.counts):
            out = call(hidden, **kwargs)
        else:
            before = columns or Columns(self._all(hidden.device), self._padding(), self.counts)
            at = (before.index == self.asking[:, None]).int().argmax(1)
            ranking = Ranking(self.fusion.kernel, at=at, columns=before.index, valid=before.valid)
            with ranking_in(self.fusion.layers[layer], ranking):
                out = call(hidden, **kwargs)
            assert ranking.scores is not None
            places, stages[layer] = self._pruned(before, ranking.scores, keep)
            out = take(out, places)
        if layer == self.fusion.depth - 1 and not self.past and stages:  # the stack wants back what it gave (GPT-2)
            return self._spread(out, stages[max(stages)])
        return out

    def _all(self, device: torch.device) -> Tensor:
        """Every column of this call: the prompt's, and what was said behind it without a cache."""
        return torch.arange(self.now, device=device).expand(len(self.counts), -1)

    def _padding(self) -> Tensor | None:
        full = max(self.texts[row] + count for row, count in enumerate(self.counts))
        if all(text + count == full for text, count in zip(self.texts, self.counts, strict=True)):
            return None
        return torch.cat([self.valid, self.valid.new_ones(len(self.valid), self.now - self.length)], dim=1)

    def _pruned(self, before: Columns, scores: Tensor, share: float) -> tuple[Tensor, Columns]:
        """The places (B, n) among the columns before that stay, and the columns they are."""
        behind = self.now - self.length
        visual = torch.cat([self.visual, self.visual.new_zeros(len(self.visual), behind)], dim=1)
        visual = take(visual, before.index)  # (B, n before)
        visual = visual if before.valid is None else visual & before.valid
        counts = [kept(count, share) for count in before.counts]
        wanted = torch.tensor(counts, device="cpu").to(scores.device)[:, None]
        order = scores.masked_fill(~visual, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        stays = torch.where(visual, rank < wanted, torch.ones_like(visual))
        stays = stays if before.valid is None else stays & before.valid
        lengths = [text + count + behind for text, count in zip(self.texts, counts, strict=True)]
        longest = max(lengths)
        if self.pads_left:
            places = stays.long().argsort(dim=1, stable=True)[:, -longest:]
        else:
            places = (~stays).long().argsort(dim=1, stable=True)[:, :longest]
        valid = None if min(lengths) == longest else take(stays, places)
        return places, Columns(take(before.index, places), valid, counts)

    def _spread(self, out: Tensor, columns: Columns) -> Tensor:
        """(B, n, D) to (B, S, D), where the text is read from: pruned columns hold nothing."""
        wide = out.new_zeros(out.shape[0], self.now + 1, out.shape[2])
        index = columns.index if columns.valid is None else columns.index.masked_fill(~columns.valid, self.now)
        return wide.scatter(1, index[..., None].expand_as(out), out)[:, : self.now]

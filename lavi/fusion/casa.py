"""Cross-attention in which the text attends to itself, too, within windows between images (CASA, arXiv 2512.19535).

    [ text | image 1: text text | image 2: text ]      each | begins a window
    text in window i -> one softmax over [ V of image i ; the window's text so far ] -> + h      before some layers

No visual token enters the sequence or the language model's cache, none is updated, and a token reads the latest image
alone: what it knows of those before it has from their windows' text. Images that follow each other without text between
them share a window. In front of the first image nothing is added.
Chosen here: what :mod:`lavi.nn.window_attention` says of its parts; the projector, the views' embedding and the code of
a token's row and column, as for the other fusions; which layers get a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lavi.batch import Batch, Layout
from lavi.config.types import Count, Share
from lavi.fusion.arrangement import Rows
from lavi.fusion.base import Cost
from lavi.fusion.cross_attention import CrossAttentionContext, CrossAttentionFusion
from lavi.language.load import LanguageModel
from lavi.language.subsequence import LayeredCache
from lavi.nn.projectors import MLPProjector, Projector
from lavi.nn.visibility import Visibility
from lavi.nn.window_attention import WindowAttention
from lavi.vision.base import FeatureSpec


class CASA(CrossAttentionFusion):
    """A block of attention within windows before some decoder layers.

    Args:
        every, layers, fraction, max_images, grid_code: as in
            :class:`~lavi.fusion.cross_attention.CrossAttentionFusion`.
        heads: of the attention; by default the language model's.
        projector: features to the language model's width; by default LLaVA-1.5's.
    """

    own_cache = True
    method = "CASA"

    def __init__(
        self,
        *,
        every: Count = 4,
        layers: list[int] | None = None,
        fraction: Share | None = None,
        heads: Count | None = None,
        projector: Projector | None = None,
        max_images: Count = 8,
        grid_code: bool = True,
    ) -> None:
        super().__init__(
            every=every,
            layers=layers,
            fraction=fraction,
            heads=heads,
            ffn=0.0,
            max_images=max_images,
            grid_code=grid_code,
        )
        self.projector = projector or MLPProjector()

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        self.projector.bind(features.width, language.width)

    def block(self, width: int, vision_width: int, heads: int) -> nn.Module:
        return WindowAttention(width=width, heads=heads)

    def visual_tokens(self, batch: Batch, features: Tensor) -> Tensor:
        return self.projector(super().visual_tokens(batch, features))  # (views, N, D)

    def context(self, batch: Batch, visual: dict[str, Tensor], rows: Rows) -> CASAContext:
        columns: list[list[int]] = [[] for _ in range(len(batch))]
        for slot in batch.image_slots:
            columns[slot.row].append(slot.column)
        most = max(1, *map(len, columns))
        padded = [row + [Rows.NEVER] * (most - len(row)) for row in columns]
        images = torch.tensor(padded, device="cpu").to(rows.column.device)  # (B, I)
        return CASAContext(blocks=self.blocks, visual=visual, images=images, **rows.stand())

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        visual = layout.views * layout.tokens_of_view(per_view) if layout else 0
        flops, new = 0.0, 0 if past else visual
        for module in self.blocks.values():
            block = cast(WindowAttention, module)
            flops += block.flops(text, visual + past) + block.keys_values_flops(new)
        return {"projector": Cost(self.projector.flops(new)), "window_attention": Cost(flops)}


@dataclass(kw_only=True)
class CASAContext(CrossAttentionContext):
    """Keys and values of V for each block, until they are cached in front of the text's."""

    images: Tensor
    """(B, I): the text column that each image stands before; :attr:`Rows.NEVER` is padding."""
    past: int = 0
    """Text tokens that are cached, and V with them."""

    def new_cache(self, config: PretrainedConfig) -> LayeredCache:
        return LayeredCache(config)

    def for_step(self, past: int, length: int) -> Self:
        columns = torch.arange(past, past + length, device=self.column.device)  # (T,)
        before = self.images[:, None] <= columns[:, None]  # (B, T, I)
        if self.start is not None:
            before = before & (self.images[:, None] >= self.start[:, past : past + length, None])
        window = torch.where(before, self.images[:, None], -1).amax(-1, keepdim=True)  # (B, T, 1): where it begins
        keys = torch.arange(past + length, device=self.column.device)
        text = (keys >= window) & (keys <= columns[:, None]) & (window >= 0)  # (B, T, past + T)
        mask = torch.cat([self.column[:, None] == window, text], dim=-1)  # padding lies in no token's window
        return replace(self, past=past, step=Visibility.by(mask))

    def behind_prompt(self) -> Self:
        return replace(self, visual={})

    def for_generation(self, copies: int) -> Self:
        return replace(super().for_generation(copies), images=self.images.repeat_interleave(copies, dim=0))

    def works_in(self, layer: int) -> bool:
        return str(layer) in self.blocks

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        cache, block = kwargs.get("past_key_values"), cast(WindowAttention, self.blocks[str(layer)])
        keep = None
        if isinstance(cache, LayeredCache):
            keep = partial(cache.added.update, layer_idx=list(self.blocks).index(str(layer)))
        visual = None if self.past else (self.visual[f"{layer} key"], self.visual[f"{layer} value"])
        return call(block(hidden, visual, self.seen, cache=keep), **kwargs)

"""Gated cross-attention layers between the decoder's own (Flamingo, arXiv 2204.14198; Llama 3.2 Vision, "mllama").

    image -> tower -> V (N, Dv) -- keys, values for each block, once an image --+
                                                                                |
    h (T, D) -> [ gated cross-attention, gated feed-forward ] -> layer l -> ... -> h'      for some l

No visual token enters the sequence. The gates start at zero, so at step 0 the model *is* the language model. A token
reads the images before it in the conversation, all of them (Flamingo reads the last one only).
Chosen here: the views' norm and embedding and the code of a token's row and column (as in lavi.py), and which layers
get a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count, PositiveOrZero, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import ColumnContext, Rows, group_views_by_row, text_only_input, view_and_grid_code
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.layers import chosen_layers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.surgery import open_decoder
from lavi.nn.cross_attention import GatedCrossAttention
from lavi.nn.grid_code import GridCode
from lavi.nn.view_embedding import ViewEmbedding
from lavi.vision.base import FeatureSpec


class CrossAttentionFusion(Fusion):
    """A gated block before some decoder layers.

    Args:
        every: a block before the last layer of every group of this many (mllama: 5).
        layers: the layers that get a block, instead of ``every``.
        fraction: this share of the layers, evenly spread, instead of ``every``.
        heads: of the attention; by default the language model's.
        ffn: width of the gated feed-forward part as a multiple of D; 0: none.
        max_images: images of one conversation told apart by an embedding; later ones share the last.
        grid_code: tell where in its image each visual token lies, as in :class:`lavi.fusion.lavi.LaViFusion`.
    """

    packs = True
    native_resolution = True
    keeps_sequence = True
    method = "cross-attention"
    """What errors call it."""

    def __init__(
        self,
        *,
        every: Count = 4,
        layers: list[int] | None = None,
        fraction: Share | None = None,
        heads: Count | None = None,
        ffn: PositiveOrZero = 4.0,
        max_images: Count = 8,
        grid_code: bool = True,
    ) -> None:
        super().__init__()
        if layers is not None and fraction is not None:
            raise UserError(f"{self.method} takes either 'layers' or 'fraction', not both.")
        self.every, self.wanted, self.fraction = every, layers, fraction
        self.heads, self.ffn, self.max_images, self.has_grid_code = heads, ffn, max_images, grid_code

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        count, width = len(language.layers), language.width
        self.grid = features.grid
        layers = chosen_layers(
            count,
            every=self.every,
            layers=self.wanted,
            fraction=self.fraction,
            where="spread",
            method=self.method,
        )
        open_decoder(language.hf, layers)
        self.view_embedding = ViewEmbedding(features.width, images=self.max_images)
        self.grid_code = GridCode(features.width) if self.has_grid_code and features.grid else None
        self.norm = nn.LayerNorm(features.width)
        self.blocks = nn.ModuleDict(
            {
                str(layer): self.block(width, features.width, self.heads or language.hf.config.num_attention_heads)
                for layer in layers
            }
        )

    def block(self, width: int, vision_width: int, heads: int) -> nn.Module:
        """What stands before a layer of width D."""
        return GatedCrossAttention(width=width, vision_width=vision_width, heads=heads, ffn=round(self.ffn * width))

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        if not features.shape[1]:  # a control that shows no token: as without an image
            batch, features = batch.without_images(), features.new_zeros(0, 1, features.shape[2])
        tokens = self.visual_tokens(batch, features)
        rows = group_views_by_row(batch, tokens.shape[1]).to(features.device)
        visual = rows.gather(tokens)  # (B, M, E)
        keys_values = {}
        for layer, block in self.blocks.items():
            keys_values[f"{layer} key"], keys_values[f"{layer} value"] = cast(Any, block).keys_values(visual)
        return text_only_input(batch, self.context(batch, keys_values, rows))

    def visual_tokens(self, batch: Batch, features: Tensor) -> Tensor:
        """Features (views, N, Dv) as the blocks read them (views, N, E)."""
        code = view_and_grid_code(self.view_embedding, self.grid_code, batch, features, self.grid)  # (views, N, Dv)
        return self.norm(features.float()) + code  # type: ignore[no-any-return]

    def context(self, batch: Batch, visual: dict[str, Tensor], rows: Rows) -> CrossAttentionContext:
        """Of a batch, with the keys and values of each block."""
        return CrossAttentionContext(blocks=self.blocks, visual=visual, **rows.stand())

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        visual = layout.views * layout.tokens_of_view(per_view) if layout else 0
        flops = 0.0
        for module in self.blocks.values():
            block = cast(GatedCrossAttention, module)
            flops += block.flops(text, visual) + (0 if past else block.keys_values_flops(visual))
        return {"cross_attention": Cost(flops)}


@dataclass(kw_only=True)
class CrossAttentionContext(ColumnContext):
    """Keys and values for each block."""

    blocks: nn.ModuleDict

    def works_in(self, layer: int) -> bool:
        return str(layer) in self.blocks

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        keys_values = (self.visual[f"{layer} key"], self.visual[f"{layer} value"])
        return call(self.blocks[str(layer)](hidden, keys_values, self.seen), **kwargs)

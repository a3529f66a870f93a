"""Token concatenation, the baseline everything is measured against (LLaVA: arXiv 2304.08485, 2310.03744, 2408.03326).

    image -> tower -> projector -> V (n, D)      [ text before | V ... V | text after ] -> decoder
                                                   the image stands where the conversation puts it

Every visual token is a token of the language model: it costs its attention, its feed-forward part and its cache. With
any-resolution tiling (lavi/data/tiling.py) this is LLaVA-OneVision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count
from lavi.errors import UserError
from lavi.fusion.arrangement import conversation_ids, splice, splice_tokens
from lavi.fusion.base import Cost, Fusion, TokenCounter
from lavi.fusion.tile_arrangement import TileArrangement, VisualArrangement
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.surgery import open_decoder
from lavi.loading.without_weights import weights_wanted
from lavi.nn.projectors import MLPProjector, Projector
from lavi.vision.base import FeatureSpec


class ConcatFusion(Fusion):
    """A projector, then the visual tokens are spliced into the text.

    Args:
        projector: features to the language model's width; by default LLaVA-1.5's, two layers and a GELU.
        newline: a learned embedding ends each row of a tiled image's grid, and every other image (LLaVA-OneVision).
        budget: a tiled image keeps at most about this many views' worth of tile tokens (``anyres_max_9``); None: all.
        markers: tokens of the vocabulary around the views, instead of one grid of tiles (Idefics3, SmolVLM); where
            a model is only counted, each counts as one token.

    Raises:
        UserError: markers and newlines.
    """

    packs = True
    native_resolution = True

    def __init__(
        self,
        *,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__()
        if markers is not None and newline:
            raise UserError(
                "markers stand around views that are no grid, whose rows could end with a newline: take one."
            )
        self.projector = projector or MLPProjector()
        self.has_newline, self.budget, self.markers = newline, budget, markers

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        self.tile_arrangement = self.arrangement(language, features)
        self.projector.bind(features.width, language.width)
        self.newline = nn.Parameter(torch.randn(language.width) * language.width**-0.5) if self.has_newline else None
        open_decoder(language.hf)

    def arrangement(self, language: LanguageModel, features: FeatureSpec) -> VisualArrangement:
        """How the features of an image's views become its visual tokens."""
        if self.markers is None:
            return TileArrangement(features.grid, budget=self.budget, newline=self.has_newline)
        return self.markers.arrangement(language.tokenizer) if weights_wanted() else self.markers.of_single_tokens()

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        return self.spliced(batch, features, language)[0]

    def spliced(self, batch: Batch, features: Tensor, language: LanguageModel) -> tuple[DecoderInput, Tensor]:
        """The arranged batch, and the order of its tokens (B, S) as :func:`splice` makes it, on the host."""
        text = language.embed(batch.input_ids)  # (B, T, D)
        visual, counts = self.visual_tokens(batch, self.projector(features.float()).to(text.dtype), language)
        order, columns = splice(batch, counts, text_width=text.shape[1])
        embeds, mask = splice_tokens(text, visual, order)
        vision = VisualContext(text_columns=columns.to(text.device))
        conversation = None if batch.packed is None else conversation_ids(batch, counts, order).to(text.device)
        inputs = DecoderInput(inputs_embeds=embeds, attention_mask=mask, vision=vision, conversation=conversation)
        return inputs, order

    def visual_tokens(self, batch: Batch, projected: Tensor, language: LanguageModel) -> tuple[Tensor, list[int]]:
        """(views, N, D) to the visual tokens (n, D) of all images one after the other, and how many each has."""
        embeddings: Tensor | None = self.newline
        if ids := self.tile_arrangement.marker_ids:
            embeddings = language.embed(torch.tensor(ids, device=batch.input_ids.device)).to(projected)  # (K, D)
        packed = self.by_image(batch, projected, embeddings)
        # Without an image they are empty, and still in the graph: a rank without one must not hang the others.
        empty = [projected.flatten(0, 1)[:0]]
        if self.newline is not None:
            empty.append(self.newline[None][:0].to(projected))
        return torch.cat([*empty, *packed]), [len(tokens) for tokens in packed]

    def by_image(self, batch: Batch, views: Tensor, between: Tensor | None) -> list[Tensor]:
        """(views, N, E) to the tokens (n, E) of each image; ``between`` is what newlines and markers are."""
        images = views.split([layout.views for layout in batch.layouts]) if batch.image_slots else ()
        return [
            self.tile_arrangement.arrange(image, layout, between)
            for image, layout in zip(images, batch.layouts, strict=True)
        ]

    @property
    def token_counter(self) -> TokenCounter:
        return self.tile_arrangement

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        visual = 0 if past or layout is None else layout.views * layout.tokens_of_view(per_view)
        return {"projector": Cost(self.projector.flops(visual))}

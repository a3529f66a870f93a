"""LaVi: vision speaks to language through deltas on the affine parameters of its norms (arXiv 2506.16691).

    image -> tower -> V (N, Dv) --keys, values, once an image--+
                                                                |
    h (T, D) --+-- query --> attention -> SiLU -> 0-init -> (dgamma, dbeta) (T, D) for each target norm
               |                                                |
               +--> [ norm + dgamma xhat + dbeta ] -> attention -> + -> [ norm + dgamma xhat + dbeta ] -> FFN -> + -> h'

No visual token enters the sequence: the language model runs on the text alone. The last projection starts at zero, so
at step 0 the model *is* the language model. A token is modulated by the images before it in the conversation; without
one its deltas are exactly 0.

The paper's: vision-infused layer normalisation, the attention conditioning module, modulating some layers only.
Chosen here, where the paper is silent: which layers (``every``), one generator a layer for all its targets, the
bottleneck, ``dbeta`` also on RMS norms, several images, tiles and frames, and the embeddings that tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import ColumnContext, group_tokens_by_row, text_only_input, view_indices
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.layers import chosen_layers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget, modulated, norm_targets, norms_of, open_decoder, open_norm
from lavi.nn.delta_generators import GENERATORS, DeltaGenerator
from lavi.nn.formulas import modulation_flops
from lavi.nn.modulated_norm import Deltas, ModulatedNorm
from lavi.nn.view_embedding import ViewEmbedding
from lavi.vision.base import FeatureSpec


class LaViFusion(Fusion):
    """Modulates the norms of attention and feed-forward part in some decoder layers.

    Args:
        every: modulate the last layer of every group of this many (paper: about a quarter of the layers).
        layers: the layers to modulate, instead of ``every``.
        fraction: modulate this share of the layers, instead of ``every``.
        where: with ``fraction``, which of them.
        targets: which norms, by what they feed; where a family has none that feeds it (OLMo-2), the norm that closes
            it. ``final`` is the norm before the head.
        parameters: what is modulated: the scale, the shift, or both (the paper's ablation).
        generator: what makes the deltas (the paper's Table 4, and ``pooled`` as a control).
        bottleneck: width of a generator.
        heads: of the attention generator.
        depth: blocks of the mixer and the convolution generator.
        per_target: a generator for each norm, instead of one for all of its layer's.
        max_images: images of one conversation told apart by an embedding; later ones share the last.

    Raises:
        UserError: no such layer, or a layer without a norm of that kind.
    """

    packs = True

    def __init__(
        self,
        *,
        every: Count = 4,
        layers: list[int] | None = None,
        fraction: Share | None = None,
        where: Literal["first", "last", "spread"] = "spread",
        targets: list[Literal["attention", "ffn", "final"]] | None = None,
        parameters: Literal["both", "scale", "shift"] = "both",
        generator: Literal["attention", "mlp", "conv", "pooled"] = "attention",
        bottleneck: Count = 64,
        heads: Count = 4,
        depth: Count = 1,
        per_target: bool = False,
        max_images: Count = 8,
    ) -> None:
        super().__init__()
        if layers is not None and fraction is not None:
            raise UserError("LaVi takes either 'layers' or 'fraction', not both.")
        self.every, self.wanted_layers, self.fraction, self.where = every, layers, fraction, where
        self.wanted_targets = targets or ["attention", "ffn"]
        self.scale, self.shift = parameters in ("both", "scale"), parameters in ("both", "shift")
        self.kind, self.bottleneck, self.heads, self.depth = generator, bottleneck, heads, depth
        self.per_target, self.max_images = per_target, max_images

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        self.width, self.final = language.width, len(language.layers)
        self.grid = features.grid or (1, max(1, features.tokens))
        found = norm_targets(language.hf)
        inside = [target for target in self.wanted_targets if target != "final"]
        layers = []
        if inside:
            layers = chosen_layers(
                self.final,
                every=self.every,
                layers=self.wanted_layers,
                fraction=self.fraction,
                where=self.where,
                method="LaVi",
            )
        self.targets = {layer: norms_of(found, layer, inside) for layer in layers}
        if "final" in self.wanted_targets:
            self.targets[self.final] = norms_of(found, self.final, ["final"])
        self.targets = {layer: targets for layer, targets in self.targets.items() if targets}
        open_decoder(language.hf, [layer for layer in self.targets if layer != self.final])
        for target in self.modulated_norms:
            open_norm(target, language.width)
        self.views = ViewEmbedding(features.width, images=self.max_images)
        self.generators = nn.ModuleDict()
        for layer, targets in self.targets.items():
            for name, count in self._generators_of(layer, len(targets)):
                self.generators[name] = GENERATORS[self.kind](
                    width=language.width,
                    vision_width=features.width,
                    outputs=count * (self.scale + self.shift),
                    bottleneck=self.bottleneck,
                    heads=self.heads,
                    depth=self.depth,
                )

    @property
    def modulated_norms(self) -> list[NormTarget]:
        return [target for targets in self.targets.values() for target in targets]

    def _generators_of(self, layer: int, norms: int) -> list[tuple[str, int]]:
        """Names of a layer's generators, and how many norms each serves."""
        return [(f"{layer}-{i}", 1) for i in range(norms)] if self.per_target else [(str(layer), norms)]

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        if not features.shape[1]:  # a control that shows no token: as without an image
            batch, features = batch.without_images(), features.new_zeros(0, 1, features.shape[2])
        tokens = features.float() + self.views(view_indices(batch, features.device))  # (views, N, Dv)
        slots = {name: cast(DeltaGenerator, g).visual(tokens, self.grid) for name, g in self.generators.items()}
        per_view = next(iter(slots.values())).shape[1]
        rows = group_tokens_by_row(batch, [place.views * per_view for place in batch.image_slots]).to(features.device)
        visual = {name: rows.gather(slot) for name, slot in slots.items()}
        context = LaViContext(fusion=self, visual=visual, column=rows.column)
        return text_only_input(batch, context)

    def deltas(self, layer: int, hidden: Tensor, visual: dict[str, Tensor], mask: Tensor) -> list[Deltas]:
        """The deltas of a layer's norms for ``hidden`` (B, T, D)."""
        norms = len(self.targets[layer])
        made = [
            self.generators[name](hidden, visual[name], mask) for name, _ in self._generators_of(layer, norms)
        ]  # (B, T, outputs, D) each
        parts = iter(torch.cat(made, dim=2).unbind(2))
        return [(next(parts) if self.scale else None, next(parts) if self.shift else None) for _ in range(norms)]

    def tokens_in_language(self, layout: Layout, per_view: int) -> int:
        return 0

    def costs(self, text: int, layout: Layout | None, per_view: int, *, decoding: bool = False) -> dict[str, Cost]:
        views = layout.views if layout else 0
        generators = 0.0
        for module in self.generators.values():
            generator = cast(DeltaGenerator, module)
            generators += generator.flops(text, views=views, per_view=per_view)
            generators += 0 if decoding else views * generator.slots_flops(per_view)
        modulation = modulation_flops(len(self.modulated_norms), text, self.width, scale=self.scale, shift=self.shift)
        return {"generator": Cost(generators), "modulation": Cost(modulation, uncounted=modulation)}


@dataclass
class LaViContext(ColumnContext):
    """What the images left for each generator, and which of it each token may see."""

    fusion: LaViFusion = None  # type: ignore[assignment]

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        assert self.mask is not None
        norms = [cast(ModulatedNorm, target.norm) for target in self.fusion.targets[layer]]
        with modulated(norms, self.fusion.deltas(layer, hidden, self.visual, self.mask)):
            return call(hidden, **kwargs)

    def during_stack(self) -> AbstractContextManager[object]:
        final = self.fusion.final
        if final not in self.fusion.targets:
            return nullcontext()
        norm = cast(ModulatedNorm, self.fusion.targets[final][0].norm)
        assert self.mask is not None
        mask = self.mask  # the final norm's input is known only when the norm is called
        return modulated([norm], [lambda hidden: self.fusion.deltas(final, hidden, self.visual, mask)[0]])

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
bottleneck, ``dbeta`` also on RMS norms, several images and their order embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lavi.batch import Batch
from lavi.errors import UserError
from lavi.fusion.base import Cost, Fusion, rows_of_tokens
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget, modulated, norm_targets, open_decoder, open_norm
from lavi.nn.deltas import AttentionDeltas


class LaViFusion(Fusion):
    """Modulates the norms that feed attention and feed-forward part of some decoder layers.

    Args:
        every: modulate the last layer of every group of this many (paper: about a quarter of the layers).
        layers: the layers to modulate, instead of ``every``.
        targets: which norms, by what they feed.
        parameters: what is modulated: the scale, the shift, or both (the paper's ablation).
        bottleneck: width of a generator's attention.
        heads: of a generator's attention.
        max_images: images of one conversation told apart by an embedding; later ones share the last.

    Raises:
        UserError: no such layer, or a layer without a norm of that kind.
    """

    def __init__(
        self,
        *,
        every: int = 4,
        layers: list[int] | None = None,
        targets: list[Literal["attention", "ffn"]] | None = None,
        parameters: Literal["both", "scale", "shift"] = "both",
        bottleneck: int = 64,
        heads: int = 4,
        max_images: int = 8,
    ) -> None:
        super().__init__()
        if bottleneck % heads:
            raise UserError(f"LaVi's bottleneck ({bottleneck}) must be a multiple of its heads ({heads}).")
        self.every, self.wanted_layers, self.wanted_targets = every, layers, targets or ["attention", "ffn"]
        self.scale, self.shift = parameters in ("both", "scale"), parameters in ("both", "shift")
        self.bottleneck, self.heads, self.max_images = bottleneck, heads, max_images

    def bind(self, language: LanguageModel, vision_width: int) -> None:
        self.width = language.width
        layers = self._choose_layers(len(language.layers))
        found = norm_targets(language.hf)
        self.targets = {layer: self._choose_norms(layer, found) for layer in layers}
        open_decoder(language.hf, layers)
        for targets in self.targets.values():
            for target in targets:
                open_norm(target)
        self.image_order = nn.Embedding(self.max_images, vision_width)
        nn.init.normal_(self.image_order.weight, std=0.02)
        self.generators = nn.ModuleDict(
            {
                str(layer): AttentionDeltas(
                    width=language.width,
                    vision_width=vision_width,
                    outputs=len(targets) * (self.scale + self.shift),
                    bottleneck=self.bottleneck,
                    heads=self.heads,
                )
                for layer, targets in self.targets.items()
            }
        )

    def _choose_layers(self, count: int) -> list[int]:
        chosen = list(range(self.every - 1, count, self.every)) if self.wanted_layers is None else self.wanted_layers
        if not chosen or not all(0 <= layer < count for layer in chosen):
            raise UserError(
                f"LaVi cannot modulate layers {chosen} (every={self.every}): the language model has 0 to {count - 1}."
            )
        return sorted(chosen)

    def _choose_norms(self, layer: int, found: list[NormTarget]) -> list[NormTarget]:
        of_layer = [target for target in found if target.layer == layer]
        chosen = [t for t in of_layer if t.role == "both" or t.role in self.wanted_targets]
        if not chosen:
            roles = {t.name: t.role for t in of_layer}
            raise UserError(f"layer {layer} has no norm that feeds {' or '.join(self.wanted_targets)}; found: {roles}.")
        return chosen

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        rows = rows_of_tokens(batch, features)
        order = self.image_order(rows.image.clamp(max=self.max_images - 1))  # (B, N, Dv)
        tokens = rows.tokens.float() + order
        visual = {int(layer): cast(AttentionDeltas, g).visual(tokens) for layer, g in self.generators.items()}
        context = LaViContext(fusion=self, visual=visual, column=rows.column)
        return DecoderInput(input_ids=batch.input_ids, attention_mask=batch.attention_mask, vision=context)

    def tokens_in_language(self, visual: int) -> int:
        return 0

    def costs(self, text: int, visual: int) -> dict[str, Cost]:
        generators = sum(cast(AttentionDeltas, g).flops(text, visual) for g in self.generators.values())
        # Per element of a modulated norm: xhat (square, sum, product), dgamma xhat, the two sums.
        per_element = 3 * self.scale + self.scale + self.scale + self.shift
        norms = sum(len(targets) for targets in self.targets.values())
        modulation = float(per_element * norms * text * self.width)
        return {"generator": Cost(generators), "modulation": Cost(modulation, uncounted=modulation)}


@dataclass
class LaViContext(VisualContext):
    """Keys and values of the image for each modulated layer, and who may see which visual token."""

    fusion: LaViFusion = None  # type: ignore[assignment]
    visual: dict[int, Tensor] = None  # type: ignore[assignment]
    column: Tensor = None  # type: ignore[assignment]
    """(B, N): the text column each visual token stands before."""
    mask: Tensor | None = None
    """(B, T, N): which visual tokens each token of this call sees: those of the images before it."""

    def at(self, past: int, length: int) -> LaViContext:
        columns = torch.arange(past, past + length, device=self.column.device)  # (T,)
        return replace(self, mask=self.column[:, None, :] <= columns[None, :, None])

    def around(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.mask is not None
        fusion = self.fusion
        deltas = fusion.generators[str(layer)](hidden, self.visual[layer], self.mask)  # (B, T, outputs, D)
        parts = iter(deltas.unbind(2))
        norms = [target.norm for target in fusion.targets[layer]]
        pairs = [(next(parts) if fusion.scale else None, next(parts) if fusion.shift else None) for _ in norms]
        with modulated(norms, pairs):  # type: ignore[arg-type]
            return call(hidden, *args, **kwargs)

    def for_generation(self, beams: int) -> LaViContext:
        visual = {layer: kv.repeat_interleave(beams, dim=1) for layer, kv in self.visual.items()}
        return replace(self, text_columns=None, visual=visual, column=self.column.repeat_interleave(beams, dim=0))

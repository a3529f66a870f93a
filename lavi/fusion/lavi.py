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
bottleneck, ``dbeta`` also on RMS norms, several images, tiles and frames, the embeddings that tell them apart, and the
code of a visual token's row and column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count, Share
from lavi.errors import UserError
from lavi.fusion.arrangement import (
    ColumnContext,
    group_views_by_row,
    text_only_input,
    view_and_grid_code,
)
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.layers import chosen_layers
from lavi.fusion.levels import split_levels, width_of_level
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget, modulated, norm_targets, norms_of, open_decoder, open_norm
from lavi.nn.delta_generators import AttentionDeltas, DeltaGenerator
from lavi.nn.formulas import modulation_flops
from lavi.nn.grid_code import GridCode
from lavi.nn.modulated_norm import Deltas, ModulatedNorm
from lavi.nn.norm_kernel import fused
from lavi.nn.view_embedding import ViewEmbedding
from lavi.nn.visibility import Visibility
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
        generator: what makes the deltas, one for each layer; by default attention (the paper's Table 4).
        per_target: a generator for each norm, instead of one for all of its layer's.
        max_images: images of one conversation told apart by an embedding; later ones share the last.
        grid_code: tell the generators where in its image each visual token lies (chosen here). Where a reducer took
            the tokens off their grid, nothing can be told.
        levels: how many tower layers stand side by side in Dv (``model.vision.layer``), of which each modulated layer
            sees one, the shallow ones the first (chosen here); 1: all see all of Dv.
        fused_norm: on a GPU, a norm and its deltas in one kernel where the norm's formula is known
            (:mod:`lavi.nn.norm_kernel`): the same to rounding, and no longer to the last bit.

    Raises:
        UserError: no such layer, or a layer without a norm of that kind; levels that do not divide Dv, or more of them
            than layers.
    """

    packs = True
    keeps_sequence = True

    def __init__(
        self,
        *,
        every: Count = 4,
        layers: list[int] | None = None,
        fraction: Share | None = None,
        where: Literal["first", "last", "spread"] = "spread",
        targets: list[Literal["attention", "ffn", "final"]] | None = None,
        parameters: Literal["both", "scale", "shift"] = "both",
        generator: DeltaGenerator | None = None,
        per_target: bool = False,
        max_images: Count = 8,
        grid_code: bool = True,
        levels: Count = 1,
        fused_norm: bool = False,
    ) -> None:
        super().__init__()
        if layers is not None and fraction is not None:
            raise UserError("LaVi takes either 'layers' or 'fraction', not both.")
        self.every, self.wanted_layers, self.fraction, self.where = every, layers, fraction, where
        self.wanted_targets = targets or ["attention", "ffn"]
        self.scale, self.shift = parameters in ("both", "scale"), parameters in ("both", "shift")
        template = generator or AttentionDeltas()
        self.new_generator = template.bound  # the template itself is no part of the model
        self.native_resolution = template.keeps_tokens
        self.per_target, self.max_images, self.has_grid_code = per_target, max_images, grid_code
        self.levels, self.fused_norm = levels, fused_norm

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        self.width, self.grid = language.width, features.grid or (1, max(1, features.tokens))
        vision_width = width_of_level(features.width, self.levels, method="LaVi")
        norms = self._choose_norms(language)
        if self.levels > len(norms):
            raise UserError(f"LaVi modulates layers {list(norms)}, fewer than its {self.levels} levels: add layers.")
        final = len(language.layers)
        open_decoder(language.hf, [layer for layer in norms if layer != final])
        for target in (target for targets in norms.values() for target in targets):
            open_norm(target, language.width)
            cast(ModulatedNorm, target.norm).fused = fused if self.fused_norm else None
        self.view_embedding = ViewEmbedding(vision_width, images=self.max_images)
        self.grid_code = GridCode(vision_width) if self.has_grid_code and features.grid else None
        self.generators = nn.ModuleDict()
        self.level_of: dict[str, int] = {}  # by the generators' names
        for position, (layer, targets) in enumerate(norms.items()):
            shares = [1] * len(targets) if self.per_target else [len(targets)]
            for number, share in enumerate(shares):
                name = f"{layer}-{number}" if self.per_target else str(layer)
                self.level_of[name] = position * self.levels // len(norms)
                self.generators[name] = self.new_generator(
                    width=language.width,
                    vision_width=vision_width,
                    outputs=share * (self.scale + self.shift),
                )
        self.plan = ModulationPlan(norms, self.generators, final, scale=self.scale, shift=self.shift)

    def _choose_norms(self, language: LanguageModel) -> dict[int, list[NormTarget]]:
        """The norms to modulate, by layer; the one before the head under the number of layers."""
        all_norms, layers = norm_targets(language.hf), len(language.layers)
        inside = [target for target in self.wanted_targets if target != "final"]
        chosen: list[int] = []
        if inside:
            chosen = chosen_layers(
                layers,
                every=self.every,
                layers=self.wanted_layers,
                fraction=self.fraction,
                where=self.where,
                method="LaVi",
            )
        norms = {layer: norms_of(all_norms, layer, inside) for layer in chosen}
        if "final" in self.wanted_targets:
            norms[layers] = norms_of(all_norms, layers, ["final"])
        return {layer: targets for layer, targets in norms.items() if targets}

    @property
    def modulated_norms(self) -> list[NormTarget]:
        return [target for targets in self.plan.norms.values() for target in targets]

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        if not features.shape[1]:  # a control that shows no token: as without an image
            batch, features = batch.without_images(), features.new_zeros(0, 1, features.shape[2])
        seen = split_levels(features, self.levels)  # (views, N, Dv / levels) each
        code = view_and_grid_code(self.view_embedding, self.grid_code, batch, seen[0], self.grid)
        slots = {
            name: cast(DeltaGenerator, generator).visual(seen[self.level_of[name]], self.grid, code)
            for name, generator in self.generators.items()
        }
        rows = group_views_by_row(batch, next(iter(slots.values())).shape[1]).to(features.device)
        visual = {
            name: cast(DeltaGenerator, self.generators[name]).prepare(rows.gather(slot))  # of (B, M, E)
            for name, slot in slots.items()
        }
        return text_only_input(batch, LaViContext(plan=self.plan, visual=visual, **rows.stand()))

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        views = layout.views if layout else 0
        per_view = layout.tokens_of_view(per_view) if layout else per_view
        generators = 0.0
        for module in self.generators.values():
            generator = cast(DeltaGenerator, module)
            generators += generator.flops(text, views=views, per_view=per_view)
            generators += 0 if past else views * generator.slots_flops(per_view)
        modulation = modulation_flops(len(self.modulated_norms), text, self.width, scale=self.scale, shift=self.shift)
        return {"generator": Cost(generators), "modulation": Cost(modulation, uncounted=modulation)}


@dataclass(frozen=True)
class ModulationPlan:
    """Which norms are modulated, and which generators make their deltas.

    Args:
        norms: by layer; the one before the head under :attr:`final`.
        generators: named ``LAYER``, or ``LAYER-NUMBER`` of several; those of a layer make the deltas of its norms, one
            after the other.
        final: the number of layers.
        scale, shift: which deltas there are of each norm.
    """

    norms: Mapping[int, Sequence[NormTarget]]
    generators: nn.ModuleDict
    final: int
    scale: bool
    shift: bool
    generators_of: dict[int, list[tuple[str, nn.Module]]] = field(init=False)
    """By layer, with their names."""

    def __post_init__(self) -> None:
        named: dict[int, list[tuple[str, nn.Module]]] = {layer: [] for layer in self.norms}
        for name, generator in self.generators.items():
            named[int(name.partition("-")[0])].append((name, generator))
        object.__setattr__(self, "generators_of", named)

    def modules(self, layer: int) -> list[ModulatedNorm]:
        """The norms of a layer themselves."""
        return [cast(ModulatedNorm, target.norm) for target in self.norms[layer]]

    def deltas(self, layer: int, hidden: Tensor, visual: Mapping[str, Tensor], seen: Visibility) -> list[Deltas]:
        """The deltas of a layer's norms for ``hidden`` (B, T, D)."""
        parts = (part for name, one in self.generators_of[layer] for part in one(hidden, visual[name], seen))
        return [(next(parts) if self.scale else None, next(parts) if self.shift else None) for _ in self.norms[layer]]


@dataclass(kw_only=True)
class LaViContext(ColumnContext):
    """What the images left for each generator, and which of it each token may see."""

    plan: ModulationPlan

    def works_in(self, layer: int) -> bool:
        return layer in self.plan.norms

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        with modulated(self.plan.modules(layer), self.plan.deltas(layer, hidden, self.visual, self.seen)):
            return call(hidden, **kwargs)

    def during_stack(self) -> AbstractContextManager[object]:
        plan = self.plan
        if plan.final not in plan.norms:
            return nullcontext()
        # The final norm's input is known only when the norm is called.
        return modulated(
            plan.modules(plan.final), [lambda hidden: plan.deltas(plan.final, hidden, self.visual, self.seen)[0]]
        )

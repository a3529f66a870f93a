"""How the text reads the visual tokens in one of VISOR's reading layers: by cross-attention, or by deltas on its norms.

Either keeps something of V once an image, reads it before or while the layer runs, and starts as if it were not there.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from lavi.errors import UserError
from lavi.fusion.base import Cost
from lavi.language.surgery import NormTarget, modulated, norms_of, open_norm
from lavi.nn.cross_attention import GatedCrossAttention
from lavi.nn.delta_generators import AttentionDeltas, DeltaGenerator
from lavi.nn.formulas import modulation_flops
from lavi.nn.modulated_norm import Deltas, ModulatedNorm
from lavi.nn.visibility import Visibility

Kept = tuple[Tensor, ...]
"""What a reader keeps of V for the tokens to come."""


class Reader(nn.Module, ABC):
    """Built unbound from a recipe; each reading layer gets a bound copy."""

    needs_norms = False
    """Whether it works on the norms of the layer."""
    modulated_norms: Sequence[NormTarget] = ()
    """The norms that it modulates."""

    def bound(self, config: PretrainedConfig, width: int, norms: Sequence[NormTarget], layer: int) -> Self:
        """A copy with parameters of its own, for a layer of a language model of width D.

        Args:
            norms: all norms of the language model, where :attr:`needs_norms`.
        """
        reader = copy.deepcopy(self)
        reader.make(config, width, norms_of(norms, layer, ["attention", "ffn"]) if self.needs_norms else [])
        return reader

    @abstractmethod
    def make(self, config: PretrainedConfig, width: int, norms: Sequence[NormTarget]) -> None:
        """Make the parameters for a layer of width D; ``norms`` are the layer's."""

    @abstractmethod
    def keep(self, visual: Tensor) -> Kept:
        """What is kept of V (B, M, D)."""

    @abstractmethod
    def read(self, text: Tensor, kept: Kept, seen: Visibility) -> tuple[Tensor, AbstractContextManager[object]]:
        """The text (B, T, D) as the layer gets it, and what holds while the layer runs.

        Args:
            seen: which of the M visual tokens each text token sees.
        """

    @abstractmethod
    def costs(self, text: int, visual: int, *, past: int) -> dict[str, Cost]:
        """FLOPs of ``text`` tokens that read ``visual`` tokens; what is kept is there where ``past`` tokens are."""


class AttentionReader(Reader):
    """Gated cross-attention in front of the layer (the paper's; that the gate starts at zero is chosen here)."""

    def make(self, config: PretrainedConfig, width: int, norms: Sequence[NormTarget]) -> None:
        self.attention = GatedCrossAttention(width=width, vision_width=width, heads=config.num_attention_heads)

    def keep(self, visual: Tensor) -> Kept:
        return self.attention.keys_values(visual)

    def read(self, text: Tensor, kept: Kept, seen: Visibility) -> tuple[Tensor, AbstractContextManager[object]]:
        key, value = kept
        return self.attention(text, (key, value), seen), nullcontext()

    def costs(self, text: int, visual: int, *, past: int) -> dict[str, Cost]:
        once = 0.0 if past else self.attention.keys_values_flops(visual)
        return {"cross_attention": Cost(self.attention.flops(text, visual) + once)}


class ModulationReader(Reader):
    """LaVi's deltas on the norms of the layer (chosen here).

    Args:
        generator: what makes the deltas, with a slot for each visual token; by default attention.

    Raises:
        UserError: a generator that makes one vector of a view. Here all images of a row are one sequence of visual
            tokens, of which each text token sees those before it.
    """

    needs_norms = True

    def __init__(self, *, generator: DeltaGenerator | None = None) -> None:
        super().__init__()
        self.generator = generator or AttentionDeltas()
        if not self.generator.keeps_tokens:
            raise UserError(
                f"VISOR's ModulationReader reads token by token, and {type(self.generator).__name__} makes one vector "
                "of all visual tokens: take lavi.nn.delta_generators.AttentionDeltas."
            )

    def make(self, config: PretrainedConfig, width: int, norms: Sequence[NormTarget]) -> None:
        for target in norms:
            open_norm(target, width)
        self.modulated_norms, self.width = norms, width
        self.generator = self.generator.bound(width=width, vision_width=width, outputs=2 * len(norms))

    def keep(self, visual: Tensor) -> Kept:
        return (self.generator.prepare(self.generator.visual(visual, (1, visual.shape[1]))),)

    def read(self, text: Tensor, kept: Kept, seen: Visibility) -> tuple[Tensor, AbstractContextManager[object]]:
        parts = iter(self.generator(text, kept[0], seen))
        deltas: list[Deltas] = [(next(parts), next(parts)) for _ in self.modulated_norms]
        return text, modulated([cast(ModulatedNorm, target.norm) for target in self.modulated_norms], deltas)

    def costs(self, text: int, visual: int, *, past: int) -> dict[str, Cost]:
        once = 0.0 if past else self.generator.slots_flops(visual)
        modulation = modulation_flops(len(self.modulated_norms), text, self.width)
        return {
            "generator": Cost(self.generator.flops(text, views=1, per_view=visual) + once),
            "modulation": Cost(modulation, uncounted=modulation),
        }

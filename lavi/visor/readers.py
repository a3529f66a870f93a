"""How the text reads the visual tokens in one of VISOR's reading layers: by cross-attention, or by deltas on its norms.

Either keeps something of V once an image, reads it before or while the layer runs, and starts as if it were not there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor

from lavi.fusion.base import Cost
from lavi.language.surgery import NormTarget, modulated
from lavi.nn.cross_attention import GatedCrossAttention
from lavi.nn.delta_generators import AttentionDeltas
from lavi.nn.formulas import modulation_flops
from lavi.nn.modulated_norm import Deltas, ModulatedNorm


class AttentionReader(GatedCrossAttention):
    """Gated cross-attention in front of the layer (the paper's)."""

    def keep(self, visual: Tensor) -> tuple[Tensor, ...]:
        """V (B, M, D) to keys and values."""
        return self.keys_values(visual)

    def read(
        self, text: Tensor, kept: tuple[Tensor, ...], mask: Tensor
    ) -> tuple[Tensor, AbstractContextManager[object]]:
        """The text (B, T, D) after reading, and what holds while its layer runs; ``mask`` (B, T, M)."""
        key, value = kept
        return self(text, (key, value), mask), nullcontext()

    def costs(self, text: int, visual: int, *, decoding: bool) -> dict[str, Cost]:
        """FLOPs of ``text`` tokens that read ``visual`` tokens; ``decoding``: what is kept is there."""
        once = 0.0 if decoding else self.keys_values_flops(visual)
        return {"cross_attention": Cost(self.flops(text, visual) + once)}


class ModulationReader(AttentionDeltas):
    """LaVi's deltas on the norms of the layer (chosen here)."""

    targets: list[NormTarget]
    """The norms, one pair of deltas each."""

    def keep(self, visual: Tensor) -> tuple[Tensor, ...]:
        """V (B, M, D) to the generator's slots."""
        return (self.visual(visual, (1, visual.shape[1])),)

    def read(
        self, text: Tensor, kept: tuple[Tensor, ...], mask: Tensor
    ) -> tuple[Tensor, AbstractContextManager[object]]:
        """The text (B, T, D) as it is, and the deltas that hold while its layer runs; ``mask`` (B, T, M)."""
        parts = iter(self(text, kept[0], mask).unbind(2))
        deltas: list[Deltas] = [(next(parts), next(parts)) for _ in self.targets]
        return text, modulated([cast(ModulatedNorm, target.norm) for target in self.targets], deltas)

    def costs(self, text: int, visual: int, *, decoding: bool) -> dict[str, Cost]:
        """FLOPs of ``text`` tokens that read ``visual`` tokens; ``decoding``: what is kept is there."""
        once = 0.0 if decoding else self.slots_flops(visual)
        modulation = modulation_flops(len(self.targets), text, self.width)
        return {
            "generator": Cost(self.flops(text, views=1, per_view=visual) + once),
            "modulation": Cost(modulation, uncounted=modulation),
        }


Reader = AttentionReader | ModulationReader

"""DeepStack: earlier layers of the tower come in behind the first decoder layers (arXiv 2406.04334; Qwen3-VL).

    tower layer a -> merger --------------------------+
    tower layer b -> merger -----------------+        |  (0 at the start)
    tower layer c -> projector -> V          |        |
                                  |          |        |
                        [ text V V V text ] -> layer 0 -> + V  -> layer 1 -> + V  -> layer 2 -> ...

More vision at no more tokens: what is added stands where the visual tokens stand, and costs its merger alone.

The papers': groups of tokens added to the hidden states of the visual tokens, from bottom to top (DeepStack, whose
groups are the parts of a finer view); one group for each of several tower layers, a merger of its own for each, added
behind the first decoder layers (Qwen3-VL: its blocks 8, 16 and 24 behind layers 0, 1 and 2). Chosen here: mergers are
two layers, as the projector is by default, and start at zero, so that the model is concatenation of the last of these
layers, bit for bit, until it is trained; a newline and a marker get nothing added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.types import Count, CountOrZero
from lavi.errors import UserError
from lavi.fusion.base import Cost
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.levels import split_levels, width_of_level
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.surgery import open_decoder
from lavi.nn.projectors import MLPProjector, Projector
from lavi.vision.base import FeatureSpec

NOTHING = -1
"""The index of the zero vector, which is the last of what is added."""


class DeepStackFusion(ConcatFusion):
    """Concatenation of the last of several tower layers; the earlier ones are added to its tokens in the decoder.

    Args:
        levels: how many tower layers stand side by side in Dv (``model.vision.layer``); 1 is concatenation.
        layers: behind which decoder layer each but the last is added, in their order; None: the first ones.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: levels that do not divide Dv, layers that are not one for each merger, or that there are not.
    """

    def __init__(
        self,
        *,
        levels: Count,
        layers: list[CountOrZero] | None = None,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget, markers=markers)
        self.levels, self.layers = levels, list(range(levels - 1)) if layers is None else layers
        if len(set(self.layers)) != len(self.layers) or len(self.layers) != levels - 1:
            raise UserError(
                f"DeepStack adds each of {levels} levels but the last behind a layer of its own: name {levels - 1} "
                f"different layers, not {self.layers}."
            )

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        width, count = width_of_level(features.width, self.levels, method="DeepStack"), len(language.layers)
        if wrong := [layer for layer in self.layers if not 0 <= layer < count]:
            raise UserError(f"DeepStack cannot add behind layers {wrong}: the language model has 0 to {count - 1}.")
        super().bind(language, replace(features, width=width))
        self.mergers = nn.ModuleList(Merger() for _ in self.layers)
        for merger in self.mergers:
            cast(Merger, merger).bind(width, language.width)
        if self.layers:
            open_decoder(language.hf, self.layers)

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        *earlier, last = split_levels(features, self.levels)
        inputs, order = self.spliced(batch, last, language)
        if not earlier:
            return inputs
        assert inputs.inputs_embeds is not None
        merged = [merger(level.float()) for merger, level in zip(self.mergers, earlier, strict=True)]
        together = torch.cat(merged, dim=-1).to(inputs.inputs_embeds.dtype)  # (views, N, K D)
        added = self._arranged(batch, together)  # (n + 1, K D)
        of_visual = order - batch.input_ids.numel()  # text and padding are below 0
        context = DeepStackContext(
            text_columns=inputs.vision.text_columns,
            added=dict(zip(self.layers, added.split(language.width, dim=-1), strict=True)),
            index=of_visual.clamp(min=NOTHING).to(added.device),
        )
        return replace(inputs, vision=context)

    def _arranged(self, batch: Batch, merged: Tensor) -> Tensor:
        """(views, N, E), one value for each visual token of all images: (n + 1, E).

        What stands between the views gets zeros, and so is the last.
        """
        width, nothing = merged.shape[-1], None
        if ids := self.tile_arrangement.marker_ids:
            nothing = merged.new_zeros(len(ids), width)
        elif self.newline is not None:
            nothing = merged.new_zeros(width)
        # Without an image they are empty, and still in the graph, as in concatenation.
        empty = merged.flatten(0, 1)[:0]
        return torch.cat([empty, *self.by_image(batch, merged, nothing), merged.new_zeros(1, width)])

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        visual = 0 if past or layout is None else layout.views * layout.tokens_of_view(per_view)
        mergers = sum(cast(Merger, merger).flops(visual) for merger in self.mergers)
        return super().costs(text, layout, per_view, past=past) | {"merger": Cost(mergers)}


class Merger(MLPProjector):
    """A projector that gives zeros until it is trained."""

    def bind(self, vision_width: int, width: int) -> None:
        super().bind(vision_width, width)
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


@dataclass(kw_only=True)
class DeepStackContext(VisualContext):
    """What is added behind which layer, and to which columns of the prompt."""

    added: Mapping[int, Tensor]
    """By layer, (n + 1, D): for each visual token of all images, and zeros."""
    index: Tensor
    """(B, S): which of these each column of the arranged prompt gets."""
    step: Tensor | None = None
    """(B, length): the same, of the columns of this call; None: they get nothing."""

    def for_step(self, past: int, length: int) -> Self:
        here = self.index[:, past : past + length]
        if not here.shape[1]:
            return replace(self, step=None)
        behind = length - here.shape[1]  # tokens behind the prompt that are read together with it
        return replace(self, step=nn.functional.pad(here, (0, behind), value=NOTHING))

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        out = call(hidden, **kwargs)
        if layer not in self.added or self.step is None:
            return out
        return out + self.added[layer][self.step].to(out.dtype)

    def behind_prompt(self) -> Self:
        # What was added is in the cache: no later token needs the tensors.
        return replace(self, added={}, step=None, prompt_is_read=True)

    def for_generation(self, copies: int) -> Self:
        return replace(self, text_columns=None, index=self.index.repeat_interleave(copies, dim=0))

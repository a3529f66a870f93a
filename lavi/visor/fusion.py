"""VISOR: all visual tokens are kept, and few layers look at them (arXiv 2603.23495).

    image -> tower -> projector -> V (M, D), kept beside the text T

    (V, T) = layer([V ; T])                         l in SA    full self-attention, V is refined       cost O((M + T)^2)
    (V, T) = V, layer(T + CrossAttn(T, V))          l in CA    the text reads V, V stays as it is      cost O(T M)
    (V, T) = V, layer(T)                            otherwise  text alone                              cost O(T^2)

A *configuration* says which of the optional layers of SA are used; the CA layers always read. One *universal* model is
trained on configurations drawn anew each step. A *router* then picks one for each sample, before the first optional
layer; rows of a batch that go different ways are run in groups, each with its own cache.

    stage 1     train what is new, the language model frozen           configuration: full
    search      python -m lavi.visor search: which configurations are viable
    stage 2     universal training over these                          configurations: viable.json
    label       python -m lavi.visor label: the cheapest that is as good, for each training sample
    router      train the router on these labels                       router: token, labels: labels.jsonl

The paper's: the three kinds of layer, the depthwise position convolution, universal training, offline labels, the
router. Chosen here, where it is silent or unknown: which layers; gates that start at zero; V stands where the
conversation has its image, and a token has the position it has there, in every layer (without any SA layer, the
position it has in the text alone); the convolution, and an embedding of the image's number, serve the reading layers
only, which have no other position; a token reads the images before it; the routing token is the last one of the prompt;
and :class:`lavi.visor.readers.ModulationReader`, where the text reads V by LaVi's deltas on its norms instead of
cross-attention, a method that neither paper has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.config.paths import home_path
from lavi.config.types import Count
from lavi.errors import UserError
from lavi.fusion.arrangement import group_tokens_by_row, last_prompt_columns, splice, splice_tokens, visual_columns
from lavi.fusion.base import Cost, TokenCounter, no_tokens
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import DecoderInput
from lavi.language.load import LanguageModel
from lavi.language.subsequence import AttentionKind
from lavi.language.surgery import NormTarget, norm_targets, open_decoder
from lavi.nn.projectors import Projector
from lavi.vision.base import FeatureSpec
from lavi.visor.context import VisorContext, VisorPlan
from lavi.visor.files import Configuration, read_viable
from lavi.visor.layers import choose_layers, where_routes_part
from lavi.visor.positions import VisualPositions
from lavi.visor.readers import AttentionReader, Reader
from lavi.visor.router import Router, RouterLabels


class VisorFusion(ConcatFusion):
    """Text-only, cross-attention and self-attention layers.

    Args:
        cross_attention: how many layers read V, evenly spread; or which.
        self_attention: how many layers may refine V, evenly spread over the rest; or which. The upper bound.
        configuration: which of those do, where no router decides: all, none, or a list of layers.
        configurations: the viable ones, as lists of layers or as the file that ``lavi.visor search`` wrote. Without a
            router each training step draws one; with one they are what it chooses from.
        router: what decides for a sample: the last token of its prompt, or its pooled visual tokens. None: nothing.
        labels: the file that ``lavi.visor label`` wrote, to train the router on.
        reader: how the text reads V, one for each reading layer; by default gated cross-attention.
        max_images: images of one conversation that reading layers tell apart; later ones share an embedding.
        projector, newline, budget, markers: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layers, a layer that both reads and refines, or a router without configurations.
    """

    packs = False
    own_cache = True
    native_resolution = False

    def __init__(
        self,
        *,
        cross_attention: int | list[int],
        self_attention: int | list[int],
        configuration: Literal["full", "none"] | list[int] = "full",
        configurations: list[list[int]] | str | None = None,
        router: Literal["token", "pooled"] | None = None,
        labels: str | None = None,
        reader: Reader | None = None,
        max_images: Count = 8,
        projector: Projector | None = None,
        newline: bool = False,
        budget: Count | None = 9,
        markers: TileMarkers | None = None,
    ) -> None:
        super().__init__(projector=projector, newline=newline, budget=budget, markers=markers)
        if router is not None and configurations is None:
            raise UserError("VISOR's router chooses from 'configurations': name them, or the file that search wrote.")
        if labels is not None and router is None:
            raise UserError("VISOR's labels are for its router: set 'router' to token or pooled.")
        self.wanted_layers = (cross_attention, self_attention)
        self.wanted_configuration, self.wanted_configurations = configuration, configurations
        self.router_reads, self.labels_file = router, labels
        reader = reader or AttentionReader()
        self.new_reader, self.reads_norms = reader.bound, reader.needs_norms  # the template is no part of the model
        self.max_images = max_images
        self.routed: Counter[Hashable] = Counter()
        self.forced_route: Configuration | None = None
        """The configuration of all rows, whatever the router says."""

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        self.width, depth = language.width, len(language.layers)
        attention = AttentionKind.of(language.attention, language.hf.config)
        attention.check("VISOR")
        self.reading, self.refining = choose_layers(*self.wanted_layers, depth)
        self.configuration = self.configuration_of(self.wanted_configuration)
        self.viable = self._viable()
        norms = norm_targets(language.hf) if self.reads_norms else []
        open_decoder(language.hf, range(depth))
        self.readers = nn.ModuleDict(
            {str(layer): self.new_reader(language.hf.config, language.width, norms, layer) for layer in self.reading}
        )
        self.positions = VisualPositions(self.width, self.max_images) if self.reading else None
        self.router, labels = None, None
        if self.router_reads is not None:
            before = where_routes_part(self.viable, self.reading, self.refining, reads=self.router_reads)
            self.router = Router(self.width, self.viable, before_layer=before, reads=self.router_reads)
            labels = RouterLabels(home_path(self.labels_file), self.viable) if self.labels_file else None
        self.plan = VisorPlan(
            attention=attention,
            depth=depth,
            readers=self.readers,
            positions=self.positions,
            router=self.router,
            labels=labels,
            routed=self.routed,
        )

    @property
    def route_counts(self) -> Counter[Hashable]:
        """How often the router chose each configuration."""
        return self.routed

    @contextmanager
    def force_route(self, way: Hashable) -> Iterator[None]:
        before = self.configuration, self.forced_route
        self.configuration = self.forced_route = self.configuration_of(cast(Configuration, way))
        try:
            yield
        finally:
            self.configuration, self.forced_route = before

    @property
    def default_route(self) -> Configuration:
        return self.configuration

    def resolved_arguments(self) -> dict[str, Any]:
        named = isinstance(self.wanted_configurations, str)
        return {"configurations": [list(one) for one in self.viable]} if named else {}

    @property
    def modulated_norms(self) -> list[NormTarget]:
        return [target for reader in self.readers.values() for target in cast(Reader, reader).modulated_norms]

    def configuration_of(self, wanted: str | Sequence[int]) -> Configuration:
        """``full``, ``none`` or a list of layers as a configuration.

        Raises:
            UserError: a layer that may not refine.
        """
        if isinstance(wanted, str):
            return tuple(self.refining) if wanted == "full" else ()
        if wrong := sorted(set(wanted) - set(self.refining)):
            raise UserError(f"VISOR's configuration names layers {wrong}: only {self.refining} may refine.")
        return tuple(sorted(set(wanted)))

    def _viable(self) -> list[Configuration]:
        """From the cheapest to the dearest."""
        wanted = self.wanted_configurations
        if isinstance(wanted, str):
            wanted = read_viable(home_path(wanted))
        return sorted({self.configuration_of(one) for one in wanted or []}, key=lambda one: (len(one), one))

    # --- one batch ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        self._check_turns(batch)
        device, valid, text_width = batch.input_ids.device, batch.attention_mask, batch.input_ids.shape[1]
        visual, counts = self.visual_tokens(batch, self.projector(features.float()).to(language.hf.dtype), language)
        on_host = group_tokens_by_row(batch, counts)
        rows = on_host.to(device)
        context = VisorContext(
            plan=self.plan,
            configuration=self._of_this_step(counted=features.is_meta),
            is_forced=self.forced_route is not None,
            is_training=self.training,
            before=rows.column,
            visual_valid=rows.index < len(visual),
            image=rows.image,
            images=int(on_host.image.max()) + 1,
            text_valid=None if all(span == (0, text_width) for span in batch.spans) else valid,
            text_width=text_width,
            routing_column=torch.tensor(last_prompt_columns(batch), device="cpu").to(device),
            keys=batch.keys,
            tokens=batch.text_lengths,
        )
        if not self.refining:
            context.beside = rows.gather(visual)
            return DecoderInput(input_ids=batch.input_ids, attention_mask=valid, vision=context)
        order, columns = splice(batch, counts, text_width=text_width)
        embeds, mask = splice_tokens(language.embed(batch.input_ids), visual, order)
        length = order.shape[1]
        context.length = length
        context.text_columns = columns.to(device)
        context.columns = context.text_columns.masked_fill(~valid, length)
        context.visual_columns = visual_columns(order, batch.input_ids.numel(), least=on_host.index.shape[1]).to(device)
        return DecoderInput(inputs_embeds=embeds, attention_mask=mask, vision=context)

    def _check_turns(self, batch: Batch) -> None:
        """A choice is for one question: of several in a conversation, only the first would be seen when it is made."""
        rows = [answer.row for answer in batch.answers]
        if self.labels_file is not None and self.training and len(rows) != len(set(rows)):
            raise UserError(
                "VISOR's router learns from conversations of one question each, and this batch has some with more: "
                "point data.train to such data (for the scenes: python -m datamodules.scenes --turns 1)."
            )

    def _of_this_step(self, *, counted: bool) -> Configuration:
        """The configuration of rows that no router decides for; ``counted``: on meta, where none can."""
        if self.forced_route is not None:
            return self.forced_route
        if self.training and self.viable and self.router is None:
            return self.viable[int(torch.randint(len(self.viable), (1,), device="cpu"))]
        return self.configuration if self.router is None or counted else self.viable[0]

    # --- what it costs ------------------------------------------------------------------------------------------------

    @property
    def token_counter(self) -> TokenCounter:
        return super().token_counter if self.refining else no_tokens

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        return [inside if layer in self.configuration else 0 for layer in range(layers)]

    def costs(self, text: int, layout: Layout | None, per_view: int, *, past: int = 0) -> dict[str, Cost]:
        visual = self.tile_arrangement(layout, per_view) if layout else 0
        costs = super().costs(text, layout, per_view, past=past)
        for reader in self.readers.values():
            for name, cost in cast(Reader, reader).costs(text, visual, past=past).items():
                before = costs.get(name, Cost(0.0))
                costs[name] = Cost(before.flops + cost.flops, before.uncounted + cost.uncounted)
        if self.positions is not None and not past:  # once for each V that is read
            states = {max((r for r in self.configuration if r < layer), default=-1) for layer in self.reading}
            costs["position"] = Cost(len(states) * self.positions.flops(visual))
        if self.router is not None:
            costs["router"] = Cost(0.0 if past else self.router.flops())
        return costs

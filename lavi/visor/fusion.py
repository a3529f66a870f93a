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

The paper's: the three kinds of layer, zero gates, the depthwise position convolution, universal training, offline
labels, the router. Chosen here, where it is silent or unknown: which layers; V stands where the conversation has its
image, and a token has the position it has there, in every layer (without any SA layer, the position it has in the text
alone); the convolution, and an embedding of the image's number, serve the reading layers only, which have no other
position; a token reads the images before it; the routing token is the last one of the prompt; ``read: modulation``,
where the text reads V by LaVi's deltas on its norms instead of cross-attention, a method that neither paper has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lavi.batch import Batch, Layout
from lavi.config.paths import home_path
from lavi.config.types import Count
from lavi.errors import UserError
from lavi.fusion.arrangement import Rows, group_tokens_by_row, last_prompt_columns, splice, splice_tokens
from lavi.fusion.base import Cost
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.layers import spread_layers
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.subsequence import LayeredCache, Span, check_kernel, layer_kwargs_for_subset, rows_only, take
from lavi.language.surgery import NormTarget, norm_targets, norms_of, open_decoder, open_norm
from lavi.nn.formulas import linear_flops
from lavi.vision.base import FeatureSpec
from lavi.visor.files import Configuration, read_labels, read_viable
from lavi.visor.readers import AttentionReader, ModulationReader, Reader

KERNEL = 7
"""Of the position convolution, in tokens (the paper's)."""

PATIENCE = 20
"""Batches in which no sample has a label, before training a router stops."""


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
        read: how the text reads V: by gated cross-attention, or by deltas on the norms (LaVi).
        bottleneck, heads: of the deltas' generator, with ``read: modulation``.
        max_images: images of one conversation that reading layers tell apart; later ones share an embedding.
        newline, budget: as in :class:`~lavi.fusion.concat.ConcatFusion`.

    Raises:
        UserError: no such layers, a layer that both reads and refines, or a router without configurations.
    """

    packs = False

    def __init__(
        self,
        *,
        cross_attention: int | list[int],
        self_attention: int | list[int],
        configuration: Literal["full", "none"] | list[int] = "full",
        configurations: list[list[int]] | str | None = None,
        router: Literal["token", "pooled"] | None = None,
        labels: str | None = None,
        read: Literal["attention", "modulation"] = "attention",
        bottleneck: Count = 64,
        heads: Count = 4,
        max_images: Count = 8,
        newline: bool = False,
        budget: Count = 9,
    ) -> None:
        super().__init__(newline=newline, budget=budget)
        if router is not None and configurations is None:
            raise UserError("VISOR's router chooses from 'configurations': name them, or the file that search wrote.")
        if labels is not None and router is None:
            raise UserError("VISOR's labels are for its router: set 'router' to token or pooled.")
        self.wanted = (cross_attention, self_attention)
        self.wanted_configuration, self.wanted_configurations = configuration, configurations
        self.routes, self.labels_file = router, labels
        self.read_by, self.bottleneck, self.heads, self.max_images = read, bottleneck, heads, max_images
        self.routed: Counter[Hashable] = Counter()
        self.forced: Configuration | None = None
        """The way that all rows go, whatever the router says."""

    def bind(self, language: LanguageModel, features: FeatureSpec) -> None:
        super().bind(language, features)
        self.kernel, self.depth, self.width = language.attention, len(language.layers), language.width
        self.sliding = LayeredCache(language.hf.config)
        check_kernel(self.kernel, self.sliding, "VISOR")
        self._choose_layers()
        self.configuration = self.configuration_of(self.wanted_configuration)
        self.viable = self._viable()
        found = norm_targets(language.hf) if self.read_by == "modulation" else []
        open_decoder(language.hf, range(self.depth))
        self.readers = nn.ModuleDict({str(layer): self._reader(layer, language, found) for layer in self.reading})
        self.position = None
        if self.reading:
            self.position = nn.Conv1d(self.width, self.width, KERNEL, padding=KERNEL // 2, groups=self.width)
            self.images = nn.Embedding(self.max_images, self.width)
            nn.init.normal_(self.images.weight, std=0.02)
        self.router = None
        if self.routes is not None:
            self.routes_at = self._where_ways_part()
            self.router = nn.Sequential(
                nn.LayerNorm(self.width), nn.Linear(self.width, 128), nn.GELU(), nn.Linear(128, len(self.viable))
            )
        self._labels: dict[str, int] | None = None
        self.unlabelled = 0

    @property
    def route_counts(self) -> Counter[Hashable]:
        """How often the router chose each configuration."""
        return self.routed

    @contextmanager
    def force_route(self, way: Hashable) -> Iterator[None]:
        before = self.configuration, self.forced
        self.configuration = self.forced = self.configuration_of(cast(Configuration, way))
        try:
            yield
        finally:
            self.configuration, self.forced = before

    @property
    def default_route(self) -> Configuration:
        return self.configuration

    def resolved_arguments(self) -> dict[str, Any]:
        named = isinstance(self.wanted_configurations, str)
        return {"configurations": [list(one) for one in self.viable]} if named else {}

    @property
    def modulated_norms(self) -> list[NormTarget]:
        readers = [self.reader(layer) for layer in self.reading]
        return [target for reader in readers if isinstance(reader, ModulationReader) for target in reader.targets]

    def _choose_layers(self) -> None:
        reading, refining = self.wanted
        layers = range(self.depth)
        asked = reading if isinstance(reading, int) else len(reading)
        optional = refining if isinstance(refining, int) else len(refining)
        if asked + optional > self.depth or min(asked, optional) < 0:
            raise UserError(
                f"VISOR: {asked} reading and {optional} refining layers, and the language model has {self.depth}."
            )
        taken = set() if isinstance(refining, int) else set(refining)
        self.reading = _spread(reading, [layer for layer in layers if layer not in taken])
        free = [layer for layer in layers if layer not in self.reading]
        behind = [layer for layer in free if self.reading and layer > self.reading[0]]
        # A router that stands before the first of them has then read the image.
        self.refining = _spread(refining, behind if optional <= len(behind) else free)
        for names, chosen in (("cross_attention", self.reading), ("self_attention", self.refining)):
            if wrong := [layer for layer in chosen if layer not in layers]:
                raise UserError(f"VISOR's {names} names layers {wrong}: the language model has 0 to {self.depth - 1}.")
        if both := sorted(set(self.reading) & set(self.refining)):
            raise UserError(f"VISOR's layers {both} cannot both read the visual tokens and refine them.")

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

    def _where_ways_part(self) -> int:
        """The first layer in which the viable configurations differ: the router stands before it."""
        differing = [layer for layer in self.refining if len({layer in one for one in self.viable}) == 2]
        if not differing:
            raise UserError(
                f"VISOR's router has nothing to choose from: the viable configurations are {self.viable}; name two."
            )
        if self.routes == "token" and not any(layer < differing[0] for layer in (*self.reading, *self.viable[0])):
            raise UserError(
                f"VISOR's router reads a token before layer {differing[0]}, and no layer has shown it the image by "
                "then: let a layer of cross_attention stand before it, or set router: pooled."
            )
        return differing[0]

    def _reader(self, layer: int, language: LanguageModel, found: Sequence[NormTarget]) -> Reader:
        if self.read_by == "attention":
            heads = language.hf.config.num_attention_heads
            return AttentionReader(width=self.width, vision_width=self.width, heads=heads)
        targets = norms_of(found, layer, ["attention", "ffn"])
        for target in targets:
            open_norm(target, self.width)
        reader = ModulationReader(
            width=self.width,
            vision_width=self.width,
            outputs=2 * len(targets),
            bottleneck=self.bottleneck,
            heads=self.heads,
        )
        reader.targets = targets
        return reader

    def reader(self, layer: int) -> Reader:
        """Of a reading layer."""
        return cast(Reader, self.readers[str(layer)])

    # --- one batch ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        self._check_turns(batch)
        texts, device = batch.input_ids.shape[1], batch.input_ids.device
        visual, counts = self.visual_tokens(batch, self.projector(features.float()).to(language.hf.dtype))
        on_host = group_tokens_by_row(batch, counts)
        rows = on_host.to(device)
        valid = batch.attention_mask
        context = VisorContext(
            fusion=self,
            configuration=self._of_this_step(),
            before=rows.column,
            visual_valid=rows.index < len(visual),
            image=rows.image,
            images=int(on_host.image.max()) + 1,
            text_valid=None if all(span == (0, texts) for span in batch.spans) else valid,
            texts=texts,
            asking=torch.tensor(last_prompt_columns(batch), device="cpu").to(device),
            keys=batch.keys,
        )
        if not self.refining:
            context.beside = rows.gather(visual)
            return DecoderInput(input_ids=batch.input_ids, attention_mask=valid, vision=context)
        order, columns = splice(batch, counts, text_width=texts)
        embeds, mask = splice_tokens(language.embed(batch.input_ids), visual, order)
        context.length = order.shape[1]
        context.text_columns = columns.to(device)
        context.columns = context.text_columns.masked_fill(~valid, context.length)
        context.arranged = _arranged(on_host, order, batch.input_ids.numel()).to(device)
        return DecoderInput(inputs_embeds=embeds, attention_mask=mask, vision=context)

    def _check_turns(self, batch: Batch) -> None:
        """A choice is for one question: of several in a conversation, only the first would be seen when it is made."""
        rows = [answer.row for answer in batch.answers]
        if self.labels_file is not None and self.training and len(rows) != len(set(rows)):
            raise UserError(
                "VISOR's router learns from conversations of one question each, and this batch has some with more: "
                "point data.train to such data (for the scenes: python -m datamodules.scenes --turns 1)."
            )

    def _of_this_step(self) -> Configuration:
        if self.training and self.viable and self.router is None:
            return self.viable[int(torch.randint(len(self.viable), (1,), device="cpu"))]
        return self.viable[0] if self.router is not None else self.configuration

    def positioned(self, visual: Tensor, image: Tensor, images: int) -> Tensor:
        """V (B, M, D) as the reading layers see it: each token told where it stands, and in which image.

        Args:
            image: (B, M) number of its image in the row. Images keep half a kernel apart: text between two of them
                reads the first, which must not have seen the second.
            images: the most that a row has.
        """
        assert self.position is not None
        tokens = visual.to(self.position.weight.dtype)
        places = torch.arange(image.shape[1], device=image.device) + KERNEL // 2 * image  # (B, M)
        wide = tokens.new_zeros(tokens.shape[0], tokens.shape[1] + KERNEL // 2 * images, tokens.shape[2])
        spaced = wide.scatter(1, places[..., None].expand_as(tokens), tokens)
        near = take(self.position(spaced.transpose(1, 2)).transpose(1, 2), places)
        return visual + (near + self.images(image.clamp(max=self.max_images - 1))).to(visual.dtype)

    def loss(self, keys: Sequence[str], logits: Tensor) -> Tensor:
        """Cross-entropy of the router's choice (B, configurations) against the labels of the samples ``keys``.

        Raises:
            UserError: none of the samples has a label.
        """
        labels = [self.labels.get(key, -100) for key in keys]
        if not self.labels:
            raise UserError(f"{self.labels_file} holds no label: make them with python -m lavi.visor label.")
        if all(label < 0 for label in labels):
            self.unlabelled += 1
            if self.unlabelled < PATIENCE:  # one rank alone must not stop
                return 0.0 * logits.sum()
            raise UserError(
                f"{self.labels_file} has a label for none of the samples {', '.join(keys[:4])} ..., nor of the "
                f"{PATIENCE - 1} batches before: label them."
            )
        return nn.functional.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device))

    @property
    def labels(self) -> dict[str, int]:
        """Number of the configuration that each sample needs."""
        if self._labels is None:
            self._labels = read_labels(home_path(self.labels_file), self.viable) if self.labels_file else {}
        return self._labels

    # --- what it costs ------------------------------------------------------------------------------------------------

    def tokens_in_language(self, layout: Layout, per_view: int) -> int:
        return super().tokens_in_language(layout, per_view) if self.refining else 0

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        return [inside if layer in self.configuration else 0 for layer in range(layers)]

    def costs(self, text: int, layout: Layout | None, per_view: int, *, decoding: bool = False) -> dict[str, Cost]:
        visual = super().tokens_in_language(layout, per_view) if layout else 0
        costs = super().costs(text, layout, per_view, decoding=decoding)
        for layer in self.reading:
            for name, cost in self.reader(layer).costs(text, visual, decoding=decoding).items():
                before = costs.get(name, Cost(0.0))
                costs[name] = Cost(before.flops + cost.flops, before.uncounted + cost.uncounted)
        if self.reading and not decoding:  # once for each V that is read
            states = {max((r for r in self.configuration if r < layer), default=-1) for layer in self.reading}
            costs["position"] = Cost(len(states) * linear_flops(visual + KERNEL // 2, KERNEL, self.width))
        if self.router is not None:
            costs["router"] = Cost(
                0.0 if decoding else linear_flops(1, self.width, 128) + linear_flops(1, 128, len(self.viable))
            )
        return costs


def _spread(wanted: int | list[int], free: list[int]) -> list[int]:
    if isinstance(wanted, int):
        return [free[place] for place in spread_layers(len(free), wanted, "spread")] if wanted else []
    return sorted(set(wanted))


def _arranged(rows: Rows, order: Tensor, texts: int) -> Tensor:
    """(B, M): the columns that V has in the arranged sequence ``order`` (B, S), S for padding; made on the host.

    Args:
        texts: tokens of the text, which stand before the visual ones in what ``order`` counts.
    """
    places = torch.full_like(rows.index, order.shape[1])
    for row, sequence in enumerate(order):
        found = (sequence >= texts).nonzero()[:, 0]
        places[row, : len(found)] = found
    return places


# --- inside the decoder -----------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Rows that go the same way from a layer on; None: all of them."""

    rows: Tensor | None
    configuration: Configuration
    states: dict[int, Tensor] = field(default_factory=dict)
    """V (b, M, D) behind each layer that refined it; -1: as it came."""
    positioned: dict[int, Tensor] = field(default_factory=dict)
    """The same as the reading layers see it."""


@dataclass
class VisorContext(VisualContext):
    """V beside the text, and the way each row goes."""

    fusion: VisorFusion = None  # type: ignore[assignment]
    configuration: Configuration = ()
    beside: Tensor | None = None
    """(B, M, D): V as it came, where the sequence is the text alone."""
    before: Tensor = None  # type: ignore[assignment]
    """(B, M): the text column each visual token stands before."""
    visual_valid: Tensor = None  # type: ignore[assignment]
    """(B, M)."""
    image: Tensor = None  # type: ignore[assignment]
    """(B, M): the number of its image in the row."""
    images: int = 1
    """The most that a row has."""
    text_valid: Tensor | None = None
    """(B, T); None: no padding."""
    texts: int = 0
    """T, of the prompt."""
    asking: Tensor = None  # type: ignore[assignment]
    """(B,): the text column of the routing token."""
    length: int | None = None
    """S, of the arranged prompt; None: the sequence is the text alone."""
    columns: Tensor = None  # type: ignore[assignment]
    """(B, T): where the text stands in the arranged sequence (S: padding)."""
    arranged: Tensor = None  # type: ignore[assignment]
    """(B, M): where V stands in it (S: padding)."""
    keys: list[str] = field(default_factory=list)
    copies: int = 1
    """Of each sample among the rows, side by side."""
    routing: list[Tensor] = field(default_factory=list)
    """(B, configurations): what the router said, of each reading of the prompt."""
    past: int = 0
    now: int = 0
    groups: list[Group] = field(default_factory=list)
    """Of this call: one for all rows, and behind the router those that it made."""
    mask: Tensor | None = None
    """(B, text tokens of this call, M)."""

    def for_step(self, past: int, length: int) -> Self:
        prompt = self.texts if self.length is None else self.length
        said = past + length - prompt  # tokens behind the prompt, up to the end of this call
        stop = self.texts + said
        start = stop - length if past else 0
        columns = torch.arange(start, stop, device=self.before.device)
        mask = self.before[:, None, :] <= columns[None, :, None]
        groups = [Group(None, self.configuration, {} if self.beside is None else {-1: self.beside})]
        return replace(self, past=past, now=length, mask=mask, groups=groups)

    def new_cache(self, config: PretrainedConfig) -> LayeredCache:
        return LayeredCache(config)

    def for_generation(self, copies: int) -> Self:
        names = ["beside", "before", "visual_valid", "text_valid", "image", "asking", "columns", "arranged"]
        held = {name: getattr(self, name) for name in names}
        repeated = {name: part.repeat_interleave(copies, dim=0) for name, part in held.items() if part is not None}
        return replace(self, text_columns=None, copies=copies, **repeated)

    def cached_tensors(self) -> list[Tensor]:
        return [] if self.beside is None else [self.beside]

    def losses(self) -> dict[str, Tensor]:
        if self.fusion.router is None or not self.routing:
            return {}
        logits = self.routing[0]
        if self.fusion.labels_file is None:  # not trained here, and still in the graph
            return {"router": 0.0 * logits.sum()}
        return {"router": self.fusion.loss(self.keys, logits)}

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        reads_prompt = self.length is not None and not self.past
        out = self._grouped(layer, call, self._split(hidden) if layer == 0 and reads_prompt else hidden, kwargs)
        # Behind the layers the stack wants the sequence that it gave (GPT-2): the text in its places, and nothing else.
        return (
            self._joined([(out, self._text_columns(None))]) if layer == self.fusion.depth - 1 and reads_prompt else out
        )

    def _grouped(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """One layer, for each group of rows by itself; text (B, T, D) to text."""
        fusion = self.fusion
        cache: LayeredCache | None = kwargs.get("past_key_values")
        if fusion.router is not None and layer == fusion.routes_at and not self.past:
            self._route(hidden, layer, cache)
        if fusion.router is None or layer < fusion.routes_at:
            return self._layer(layer, call, hidden, self.groups[0], kwargs)
        groups = cache.kept["groups"] if self.past and cache is not None else self.groups[1:]
        if len(groups) == 1:
            return self._layer(layer, call, hidden, groups[0], self._of_group(kwargs, 0, None))
        out = torch.empty_like(hidden)
        for number, group in enumerate(groups):
            own = self._of_group(kwargs, number, group.rows)
            out = out.index_copy(0, group.rows, self._layer(layer, call, hidden[group.rows], group, own))
        return out

    def _split(self, hidden: Tensor) -> Tensor:
        """The arranged sequence (B, S, D), positions of learned kind added, to the text; V is kept aside."""
        self.groups[0].states[-1] = self._visual_of(hidden, None)
        return take(hidden, self._text_columns(None))

    def _visual_of(self, arranged: Tensor, rows: Tensor | None) -> Tensor:
        columns, valid = index_rows(self.arranged, rows), index_rows(self.visual_valid, rows)
        return take(arranged, columns) * valid[..., None]

    def _text_columns(self, rows: Tensor | None) -> Tensor:
        """(b, text tokens): columns of the prompt's text and, while nothing is cached, of what was said behind it."""
        columns = index_rows(self.columns, rows)
        assert self.length is not None
        if self.past or self.now == self.length:
            return columns
        behind = torch.arange(self.length, self.now, device=columns.device).expand(len(columns), -1)
        return torch.cat([columns.masked_fill(columns == self.length, self.now), behind], dim=1)

    def _places(self, rows: Tensor | None) -> Tensor:
        """(b, M): the columns of V in this call (its length: padding)."""
        places = index_rows(self.arranged, rows)
        return places.masked_fill(places == self.length, self.now)

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Parts (b, n, D) at their columns (b, n) of one sequence (b, S, D), zero where none is."""
        first = parts[0][0]
        joined = first.new_zeros(first.shape[0], self.now + 1, first.shape[2])  # the last column takes the padding
        for part, columns in parts:
            joined = joined.scatter(1, columns[..., None].expand_as(part), part)
        return joined[:, : self.now]

    def _text_valid(self, rows: Tensor | None) -> Tensor | None:
        valid = index_rows(self.text_valid, rows)
        said = 0 if self.past or self.length is None else self.now - self.length
        return valid if valid is None or not said else torch.cat([valid, valid.new_ones(len(valid), said)], dim=1)

    def _route(self, hidden: Tensor, layer: int, cache: LayeredCache | None) -> None:
        """Choose a configuration for each row, and group the rows by it."""
        fusion = self.fusion
        assert fusion.router is not None
        whole = self.groups[0]
        if fusion.routes == "token":
            asking = hidden[torch.arange(len(hidden), device=hidden.device), self.asking]  # (B, D)
        else:
            count = self.visual_valid.sum(1, keepdim=True).clamp(min=1)
            asking = _before(layer, whole).sum(1) / count  # padding is 0
        logits = fusion.router(asking.to(next(fusion.router.parameters()).dtype))  # (B, configurations)
        self.routing.append(logits)
        if fusion.forced is not None or logits.is_meta:
            chosen = [fusion.configuration] * len(hidden)
        elif fusion.training:  # its choice has no gradient, so while it learns the cheapest way serves
            chosen = [fusion.viable[0]] * len(hidden)
        else:
            chosen = [fusion.viable[number] for number in logits.argmax(-1).tolist()]
            fusion.routed.update(chosen[:: self.copies])
        made = []
        for configuration in dict.fromkeys(chosen):
            rows = torch.tensor([row for row, own in enumerate(chosen) if own == configuration], device="cpu")
            rows = rows.to(hidden.device)
            states = {refined: index_rows(state, rows) for refined, state in whole.states.items()}
            made.append(Group(rows, configuration, states))
        del self.groups[1:]
        self.groups += made
        if cache is not None:
            cache.part([group.rows for group in made if group.rows is not None])
            cache.kept["groups"] = [Group(group.rows, group.configuration) for group in made]

    @staticmethod
    def _of_group(kwargs: dict[str, Any], number: int, rows: Tensor | None) -> dict[str, Any]:
        own = kwargs if rows is None else rows_only(kwargs, rows)
        cache: LayeredCache | None = kwargs.get("past_key_values")
        return own if cache is None else own | {"past_key_values": cache.groups[number][1]}

    def _layer(
        self, layer: int, call: Callable[..., Tensor], text: Tensor, group: Group, kwargs: dict[str, Any]
    ) -> Tensor:
        """One layer for the rows of one group; ``text`` (b, T, D)."""
        fusion, rows = self.fusion, group.rows if text.shape[0] != len(self.before) else None
        cache: LayeredCache | None = kwargs.get("past_key_values")
        holds: AbstractContextManager[object] = nullcontext()
        if layer in fusion.reading:
            assert self.mask is not None
            seen = self._seen(layer, group, rows, cache)
            text, holds = fusion.reader(layer).read(text, seen, index_rows(self.mask, rows))
        if layer in group.configuration:
            return self._refined(layer, call, text, group, rows, kwargs)
        if self.length is not None:
            kwargs = layer_kwargs_for_subset(
                kwargs,
                self._text_columns(rows),
                self._text_valid(rows),
                Span(self.length, self.past, self.now),
                cache=fusion.sliding,
                layer=layer,
                kernel=fusion.kernel,
                dtype=text.dtype,
            )
        with holds:
            return call(text, **kwargs)

    def _seen(self, layer: int, group: Group, rows: Tensor | None, cache: LayeredCache | None) -> tuple[Tensor, ...]:
        if self.past:
            assert cache is not None
            return cache.cross[layer]
        state = max(refined for refined in group.states if refined < layer)
        # With gradients each layer makes its own: a layer that is recomputed must do what it did before.
        if torch.is_grad_enabled() or state not in group.positioned:
            group.positioned[state] = self.fusion.positioned(
                group.states[state], index_rows(self.image, rows), self.images
            )
        seen = self.fusion.reader(layer).keep(group.positioned[state])
        if cache is not None:
            cache.cross[layer] = seen
        return seen

    def _refined(
        self,
        layer: int,
        call: Callable[..., Tensor],
        text: Tensor,
        group: Group,
        rows: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Text and V in one sequence again; behind a cached prompt they are there already."""
        if self.past:
            return call(text, **kwargs)
        columns = self._text_columns(rows)
        out = call(self._joined([(text, columns), (_before(layer, group), self._places(rows))]), **kwargs)
        group.states[layer] = self._visual_of(out, rows)
        return take(out, columns)


def _before(layer: int, group: Group) -> Tensor:
    """V as it enters a layer."""
    return group.states[max(refined for refined in group.states if refined < layer)]


def index_rows(tensor: Any, rows: Tensor | None) -> Any:
    return tensor if tensor is None or rows is None else tensor[rows]

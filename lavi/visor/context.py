"""VISOR inside the decoder: which rows refine the visual tokens in a layer, which read them, and what is kept.

    one layer, for each group of rows with one configuration:
        in the configuration    [V ; T] in one sequence -> layer -> V, T
        a reading layer         T reads V -> layer
        any other               T -> layer

Up to the router there is one group of all rows; it makes one for each configuration that it chose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lavi.language.context import VisualContext
from lavi.language.subsequence import ArrangedCall, AttentionKind, LayeredCache, rows_only, take
from lavi.nn.visibility import Visibility
from lavi.visor.files import Configuration
from lavi.visor.positions import VisualPositions
from lavi.visor.readers import Kept, Reader
from lavi.visor.router import Router, RouterLabels


@dataclass(frozen=True, kw_only=True)
class VisorPlan:
    """What a context needs of the fusion and the language model.

    Args:
        attention: how masks are made for the language model.
        depth: L.
        readers: by the number of the reading layer.
        positions: tells reading layers where the visual tokens stand; None: none reads.
        router: None: no row is routed.
        labels: what the router is trained on; None: it is not.
        routed: counts how often the router chose each configuration.
    """

    attention: AttentionKind
    depth: int
    readers: nn.ModuleDict
    positions: VisualPositions | None
    router: Router | None
    labels: RouterLabels | None
    routed: Counter[Hashable]

    def reader(self, layer: int) -> Reader | None:
        """Of a layer that reads."""
        return cast(Reader, self.readers[str(layer)]) if str(layer) in self.readers else None


@dataclass
class Group:
    """Rows with one configuration from a layer on; ``rows`` None: all of them."""

    rows: Tensor | None
    configuration: Configuration
    states: dict[int, Tensor] = field(default_factory=dict)
    """V (b, M, D) behind each layer that refined it; -1: as it came."""
    positioned: dict[int, Tensor] = field(default_factory=dict)
    """The same as the reading layers see it."""

    def state_before(self, layer: int) -> int:
        """The last layer before this one that refined V; -1: none did."""
        return max(refined for refined in self.states if refined < layer)


@dataclass(kw_only=True)
class VisorContext(VisualContext):
    """V beside the text, and the configuration of each row."""

    plan: VisorPlan
    configuration: Configuration
    """Of rows that no router decides for."""
    is_forced: bool
    """The router is not asked."""
    is_training: bool
    before: Tensor
    """(B, M): the text column each visual token stands before."""
    visual_valid: Tensor
    """(B, M)."""
    image: Tensor
    """(B, M): the number of its image in the row."""
    images: int
    """The most that a row has."""
    text_valid: Tensor | None
    """(B, T); None: no padding."""
    text_width: int
    """T, of the prompt."""
    routing_column: Tensor
    """(B,): the text column of the token that a router reads."""
    keys: list[str]
    tokens: list[int]
    """Of text, of each sample."""
    beside: Tensor | None = None
    """(B, M, D): V as it came, where the sequence is the text alone."""
    length: int | None = None
    """S, of the arranged prompt; None: the sequence is the text alone."""
    columns: Tensor | None = None
    """(B, T): where the text stands in the arranged sequence (S: padding)."""
    visual_columns: Tensor | None = None
    """(B, M): where V stands in it (S: padding)."""
    copies: int = 1
    """Of each sample among the rows, side by side."""
    router_logits: list[Tensor] = field(default_factory=list)
    """(B, configurations) of each reading of the prompt."""
    past: int = 0
    new_tokens: int = 0
    groups: list[Group] = field(default_factory=list)
    """Of this call: one for all rows, and behind the router those that it made."""
    step: Visibility | None = None
    """Which visual tokens each text token of this call reads."""

    # --- one call -----------------------------------------------------------------------------------------------------

    def for_step(self, past: int, length: int) -> Self:
        prompt = self.text_width if self.length is None else self.length
        stop = self.text_width + past + length - prompt  # text columns up to the end of this call
        start = stop - length if past else 0
        columns = torch.arange(start, stop, device=self.before.device)
        mask = self.before[:, None, :] <= columns[None, :, None]
        groups = [Group(None, self.configuration, {} if self.beside is None else {-1: self.beside})]
        return replace(self, past=past, new_tokens=length, groups=groups, step=Visibility.by(mask))

    @property
    def seen(self) -> Visibility:
        """What the text tokens of a call that has begun read."""
        assert self.step is not None
        return self.step

    def new_cache(self, config: PretrainedConfig) -> LayeredCache:
        return LayeredCache(config)

    def for_generation(self, copies: int) -> Self:
        names = ["beside", "before", "visual_valid", "text_valid", "image", "routing_column", "columns"]
        tensors = {name: getattr(self, name) for name in (*names, "visual_columns")}
        repeated = {name: part.repeat_interleave(copies, dim=0) for name, part in tensors.items() if part is not None}
        return replace(self, text_columns=None, copies=copies, **repeated)

    def cached_tensors(self) -> list[Tensor]:
        return [] if self.beside is None else [self.beside]

    def losses(self) -> dict[str, Tensor]:
        if not self.router_logits:
            return {}
        logits = self.router_logits[0]
        if self.plan.labels is None:  # not trained here, and still in the graph
            return {"router": 0.0 * logits.sum()}
        return {"router": self.plan.labels.loss(self.keys, self.tokens, logits)}

    @property
    def arranged(self) -> ArrangedCall | None:
        """This call on the arranged sequence; None: the sequence is the text alone."""
        if self.length is None:
            return None
        return ArrangedCall(length=self.length, past=self.past, new_tokens=self.new_tokens)

    # --- one layer ----------------------------------------------------------------------------------------------------

    def run_layer(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
        arranged = self.arranged
        if arranged is None or self.past:
            return self._run_groups(layer, call, hidden, kwargs)
        columns = arranged.columns(_rows(self.columns, None))
        if layer == 0:  # V is kept aside; positions of learned kind have been added to it
            self.groups[0].states[-1] = self._visual_of(hidden, None)
            hidden = take(hidden, columns)
        text = self._run_groups(layer, call, hidden, kwargs)
        # Behind the layers the stack wants the sequence that it gave (GPT-2): the text in its columns, nothing else.
        return arranged.join((text, columns)) if layer == self.plan.depth - 1 else text

    def _run_groups(self, layer: int, call: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """One layer, for each group of rows by itself; text (B, T, D) to text."""
        router = self.plan.router
        cache: LayeredCache | None = kwargs.get("past_key_values")
        if router is None or layer < router.before_layer:
            return self._run_group(layer, call, hidden, self.groups[0], kwargs)
        if layer == router.before_layer and not self.past:
            self._route(router, hidden, layer, cache)
        groups = cache.kept["groups"] if self.past and cache is not None else self.groups[1:]
        if len(groups) == 1:
            return self._run_group(layer, call, hidden, groups[0], _kwargs_of_group(kwargs, 0, None))
        out = torch.empty_like(hidden)
        for number, group in enumerate(groups):
            of_group = _kwargs_of_group(kwargs, number, group.rows)
            part = self._run_group(layer, call, _rows(hidden, group.rows), group, of_group)
            out = out.index_copy(0, group.rows, part)
        return out

    def _run_group(
        self, layer: int, call: Callable[..., Tensor], text: Tensor, group: Group, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """One layer for the rows of one group; ``text`` (b, T, D)."""
        rows = group.rows if text.shape[0] != len(self.before) else None
        during_layer: AbstractContextManager[object] = nullcontext()
        if (reader := self.plan.reader(layer)) is not None:
            kept = self._kept(reader, layer, group, rows, kwargs.get("past_key_values"))
            text, during_layer = reader.read(
                text, kept, self.seen if rows is None else Visibility.by(_rows(self.seen.mask, rows))
            )
        arranged = self.arranged
        if arranged is not None and layer in group.configuration:
            return self._refine(arranged, layer, call, text, group, rows, kwargs)
        if arranged is not None:
            kwargs = arranged.layer_kwargs(
                dict(kwargs),
                arranged.columns(_rows(self.columns, rows)),
                None if self.text_valid is None else arranged.valid(_rows(self.text_valid, rows)),
                attention=self.plan.attention,
                layer=layer,
                dtype=text.dtype,
            )
        with during_layer:
            return call(text, **kwargs)

    def _refine(
        self,
        arranged: ArrangedCall,
        layer: int,
        call: Callable[..., Tensor],
        text: Tensor,
        group: Group,
        rows: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Text and V in one sequence again; behind a cached prompt they are there already."""
        if self.past:
            return call(text, **kwargs)
        columns = arranged.columns(_rows(self.columns, rows))
        visual = (group.states[group.state_before(layer)], arranged.with_padding(_rows(self.visual_columns, rows)))
        out = call(arranged.join((text, columns), visual), **kwargs)
        group.states[layer] = self._visual_of(out, rows)
        return take(out, columns)

    def _visual_of(self, arranged: Tensor, rows: Tensor | None) -> Tensor:
        """V (b, M, D) out of an arranged sequence (b, S, D); padding is 0."""
        return take(arranged, _rows(self.visual_columns, rows)) * _rows(self.visual_valid, rows)[..., None]

    def _kept(self, reader: Reader, layer: int, group: Group, rows: Tensor | None, cache: LayeredCache | None) -> Kept:
        """What a reading layer keeps of V; behind a cached prompt it is in the cache."""
        if self.past:
            assert cache is not None
            return cache.cross[layer]
        positions, state = self.plan.positions, group.state_before(layer)
        assert positions is not None
        # With gradients each layer makes its own: a layer that is recomputed must do what it did before.
        if torch.is_grad_enabled() or state not in group.positioned:
            group.positioned[state] = positions(group.states[state], _rows(self.image, rows), self.images)
        kept = reader.keep(group.positioned[state])
        if cache is not None:
            cache.cross[layer] = kept
        return kept

    # --- routing ------------------------------------------------------------------------------------------------------

    def _route(self, router: Router, hidden: Tensor, layer: int, cache: LayeredCache | None) -> None:
        """Choose a configuration for each row, and group the rows by it."""
        whole = self.groups[0]
        if router.reads == "token":
            state = hidden[torch.arange(len(hidden), device=hidden.device), self.routing_column]  # (B, D)
        else:
            count = self.visual_valid.sum(1, keepdim=True).clamp(min=1)
            state = whole.states[whole.state_before(layer)].sum(1) / count  # (B, D); padding is 0
        logits = router(state)  # (B, configurations)
        self.router_logits.append(logits)
        # A choice has no gradient, so while a router learns the cheapest way, this context's own, serves.
        chosen = [self.configuration] * len(hidden)
        if not (self.is_forced or self.is_training or logits.is_meta):
            chosen = [router.viable[number] for number in logits.argmax(-1).tolist()]
            self.plan.routed.update(chosen[:: self.copies])
        groups = []
        for configuration in dict.fromkeys(chosen):
            of_group = [row for row, of_row in enumerate(chosen) if of_row == configuration]
            rows = torch.tensor(of_group, device="cpu").to(hidden.device)
            states = {refined: _rows(state, rows) for refined, state in whole.states.items()}
            groups.append(Group(rows, configuration, states))
        self.groups[1:] = groups
        if cache is not None:
            cache.part([group.rows for group in groups if group.rows is not None])
            cache.kept["groups"] = [Group(group.rows, group.configuration) for group in groups]


def _kwargs_of_group(kwargs: dict[str, Any], number: int, rows: Tensor | None) -> dict[str, Any]:
    """A layer's arguments for a group of rows (None: all), with the group's own cache."""
    of_rows = kwargs if rows is None else rows_only(kwargs, rows)
    cache: LayeredCache | None = kwargs.get("past_key_values")
    return of_rows if cache is None else of_rows | {"past_key_values": cache.groups[number][1]}


def _rows(tensor: Tensor | None, rows: Tensor | None) -> Tensor:
    """Some rows of a tensor; None: all of them."""
    assert tensor is not None
    return tensor if rows is None else tensor.index_select(0, rows)

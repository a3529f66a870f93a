"""Decoder layers that read visual tokens without updating them, through their own norm, keys and values.

    V (B, M, D) -> input norm -> key and value projections -> keys, values of V              (and no further)
    T (B, T, D) -> the whole layer; its attention over the keys and values of T and V, in the arranged order -> T

The layer's own forward does both, with a stand-in for its cache: attention of any family hands its keys and values to
the cache before it uses them, and goes on with what it gets back. Once to take those of V out, then to put them among
those of the text. Queries of V are needed by nobody: an attention with a ``q_proj`` of its own computes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lavi.errors import UserError
from lavi.language.context import VisualContext
from lavi.language.subsequence import ArrangedCall, AttentionKind
from lavi.language.surgery import decoder_of, dummy_forward, takes_attention_mask

KeysValues = tuple[Tensor, Tensor]
"""(B, heads, n, width) each."""


class _Taken(Exception):
    """Ends a layer's call where its attention has keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys_values = keys, values


class _NotTaken(Exception):
    """A layer ran to its end, and its attention handed nothing to a cache."""


class _TakingCache:
    """Takes keys and values out of the layer that would cache them."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        raise _Taken(keys, values)


@dataclass(frozen=True, kw_only=True)
class _JoiningCache:
    """Puts keys and values of V among those of the text; whatever the layer caches it then caches of all."""

    arranged: ArrangedCall
    columns: Tensor
    """(B, T) of the text."""
    visual_columns: Tensor
    """(B, M)."""
    visual: KeysValues
    cache: Cache | None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        joined = self._join(keys, self.visual[0]), self._join(values, self.visual[1])
        return joined if self.cache is None else self.cache.update(*joined, *args, **kwargs)

    def _join(self, text: Tensor, visual: Tensor) -> Tensor:
        """(B, heads, T, width) and (B, heads, M, width) to (B, heads, S, width)."""
        parts = ((text, self.columns), (visual, self.visual_columns))
        joined = self.arranged.join(*((part.transpose(1, 2).flatten(2), columns) for part, columns in parts))
        return joined.unflatten(2, text.shape[1::2]).transpose(1, 2)


@torch.compiler.disable  # a call that ends in its middle is no graph
def keys_and_values(layer: nn.Module, call: Callable[..., Any], visual: Tensor, kwargs: dict[str, Any]) -> KeysValues:
    """Those that ``layer``, run by ``call``, has of V (B, M, D); nothing else of it is run.

    Args:
        kwargs: the layer's arguments at V's columns.

    Raises:
        _NotTaken: its attention keeps nothing in a cache.
    """
    with without_queries(layer):
        try:
            call(visual, **kwargs | {"past_key_values": _TakingCache()})
        except _Taken as taken:
            return taken.keys_values
    raise _NotTaken


def read(
    layer: nn.Module,
    call: Callable[..., Tensor],
    text: tuple[Tensor, Tensor],
    visual: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
    *,
    arranged: ArrangedCall,
    valid: Tensor | None,
    attention: AttentionKind,
    number: int,
) -> Tensor:
    """A layer's output of the text (B, T, D), which attends to V beside itself.

    Args:
        text: (B, T, D), and its columns (B, T); padding as :meth:`ArrangedCall.join` wants it.
        visual: (B, M, D), and its columns (B, M); the same.
        kwargs: what the stack made for the arranged sequence.
        valid: (B, S): which of its columns are no padding; None: all.
        number: of the layer.
    """
    hidden, columns = text
    joining = _JoiningCache(
        arranged=arranged,
        columns=columns,
        visual_columns=visual[1],
        visual=keys_and_values(layer, call, visual[0], arranged.kwargs_at(kwargs, visual[1])),
        cache=kwargs.get("past_key_values"),
    )
    # Padding asks as the row's first token does: a softmax over nothing is no number.
    queries = columns.where(columns < arranged.new_tokens, columns.amin(1, keepdim=True))
    mask = arranged.mask_over_all(queries, valid, attention=attention, layer=number, dtype=hidden.dtype)
    return call(hidden, **arranged.kwargs_at(kwargs, columns) | {"attention_mask": mask, "past_key_values": joining})


# --- queries that nobody needs ----------------------------------------------------------------------------------------


def query_projections(layer: nn.Module) -> list[Any]:
    """The modules of a layer that make queries and nothing else, as far as they can be told."""
    found = [getattr(child, "q_proj", None) for child in layer.children() if takes_attention_mask(child)]
    # A forward that somebody else put in the place of the module's own stays.
    return [one for one in found if isinstance(getattr(one, "out_features", None), int) and "forward" not in vars(one)]


def _no_queries(projection: Any, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], projection.out_features)


@contextmanager
def without_queries(layer: nn.Module) -> Iterator[None]:
    """While it holds, queries of ``layer`` are zeros that cost nothing."""
    projections = query_projections(layer)
    for projection in projections:
        projection.forward = partial(_no_queries, projection)
    try:
        yield
    finally:
        for projection in projections:
            del projection.forward


# --- what a language model must be like -------------------------------------------------------------------------------


@dataclass
class _Probe(VisualContext):
    """Takes keys and values out of ``layers`` once, and notes what was run for them."""

    layers: dict[int, nn.Module] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    """Of each layer that can read, the numbers of all matrices that a visual token meets."""

    def run_layer(self, layer: int, call: Callable[..., Any], hidden: Tensor, **kwargs: Any) -> Any:
        if layer in self.layers:
            with _matrices_run(self.layers[layer]) as run, suppress(_NotTaken, AttributeError, TypeError):
                taken = keys_and_values(self.layers[layer], call, hidden, kwargs)
                if all(part.ndim == 4 and part.shape[::2] == hidden.shape[:2] for part in taken):
                    self.sizes[layer] = sum(map(_size, {*run, *_behind_cache(self.layers[layer])}))
        return call(hidden, **kwargs)


def _behind_cache(layer: nn.Module) -> list[nn.Module]:
    """What makes keys and values of all that is cached: cached are latents (DeepSeek)."""
    return [module for name, module in layer.named_modules() if name.endswith("kv_b_proj")]


def _size(module: nn.Module) -> int:
    """Numbers in a module's own matrix; a quantized one may be packed, and a linear layer still knows its size."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.ndim == 2)


@contextmanager
def _matrices_run(layer: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules of a layer with matrices of their own that are run meanwhile."""
    run: list[nn.Module] = []
    skipped = query_projections(layer)
    watched = [module for module in layer.modules() if _size(module) and module not in skipped]
    hooks = [module.register_forward_pre_hook(lambda module, _: run.append(module)) for module in watched]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def check_reading(
    model: PreTrainedModel, layers: Sequence[int], attention: AttentionKind, method: str
) -> dict[int, int]:
    """Try once whether ``layers`` of an opened model can read visual tokens.

    Returns:
        Of each layer, the numbers of all matrices that a visual token meets in it.

    Raises:
        UserError: flash attention, whose mask leaves out no single columns; or a family whose attention does not hand
            keys and values to its cache, token by token.
    """
    if layers and attention.kernel == "flash_attention_2":
        raise UserError(
            f"{method} has layers whose text reads tokens that ask nothing, which flash attention cannot mask: set "
            "language.attention=sdpa."
        )
    stack = decoder_of(model)[1]
    probe = _Probe(layers={layer: stack[layer] for layer in layers})
    dummy_forward(model, vision=probe)
    if missing := sorted(set(layers) - set(probe.sizes)):
        raise UserError(
            f"{method} takes keys and values of visual tokens where a layer hands them to its cache, which layers "
            f"{missing} of {type(model).__name__} do otherwise: take a family such as qwen2 or llama."
        )
    return probe.sizes

"""What a run does, operator by operator, without a device: FLOPs, bytes moved, and the memory that stands at once.

A model on the meta device has shapes and no numbers. Where attention is asked for, a fused kernel is put in its place,
which stores no scores; and where an operator is dispatched, its inputs and outputs are counted, and storages are
followed from the operator that makes them to the moment that nothing holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

GATHERS = ("embedding", "index", "index_select", "gather")
"""Operators that read of their first input only what they give."""
OVERWRITES = ("copy_", "fill_", "zero_")
"""Operators that do not read what they write to."""


@dataclass(frozen=True)
class Operator:
    """One operator that computes or copies; views are none."""

    name: str
    flops: float
    bytes: float
    """Read and written, each input and output once."""
    dtype: torch.dtype
    """Of its first output."""
    skipped: float = 0.0
    """Of the FLOPs those that a causal kernel of attention leaves out."""


@dataclass
class Trace:
    """The operators of a run, in order, and its memory."""

    operators: list[Operator] = field(default_factory=list)
    peak: float = 0.0
    """Bytes of the storages that the run made, at their most."""

    @property
    def flops(self) -> float:
        return sum(operator.flops for operator in self.operators)


def trace(run: Callable[[], Any]) -> Trace:
    """What ``run`` does on the meta device, all attention by a fused kernel."""
    watch = _Watch()
    with patch.object(nn.functional, "scaled_dot_product_attention", _attend), watch:
        run()
    return watch.trace


class _Watch(TorchDispatchMode):
    """Notes each operator, and follows the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.now = 0.0
        self.alive: dict[int, float] = {}
        """Bytes of each storage that was made and is still held, by its address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs)))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in before]
        changed = [tensor for tensor in _tensors(out) if any(tensor is one for one in given)]
        for tensor in made:
            self._follow(tensor.untyped_storage())
        if made or changed:
            self._note(func, args, kwargs or {}, out, given, made or changed)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage until nothing holds it."""
        address = storage._cdata
        if address not in self.alive:
            self.alive[address] = float(storage.nbytes())
            self.now += storage.nbytes()
            self.trace.peak = max(self.trace.peak, self.now)
            weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.now -= self.alive.pop(address, 0.0)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], result: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in GATHERS:
            given = [tensor for tensor in given[1:] if not tensor.is_floating_point()] + result
        elif name in OVERWRITES:
            given = given[1:]
        moved = sum(map(_bytes, given)) + sum(map(_bytes, result))
        packet = func._overloadpacket
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
        causal = packet is torch.ops.lavi.fused_attention and args[3]
        skipped = flops * (1 - 1 / args[0].shape[-2]) / 2 if causal else 0.0  # of n keys a query sees (n + 1) / 2
        self.trace.operators.append(Operator(name, flops, moved, result[0].dtype, skipped))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> float:
    """Of a tensor; of one that repeats itself (an expanded one) what it is stored as."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


# --- attention as one operator ----------------------------------------------------------------------------------------


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """In the place of ``scaled_dot_product_attention``: on meta torch would take it apart, and store its scores."""
    out: Tensor = torch.ops.lavi.fused_attention(query, key, value, is_causal)
    return out


@torch.library.custom_op("lavi::fused_attention", mutates_args=())
def fused_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """What a fused kernel of attention takes and gives, and not its numbers: only shapes are ever asked for."""
    raise NotImplementedError("lavi::fused_attention is counted on the meta device, and never run")


@fused_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    if query.dim() != 4:
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as kernels lay it out


@torch.library.custom_op("lavi::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`fused_attention`: its gradients' shapes."""
    raise NotImplementedError("lavi::fused_attention_backward is counted on the meta device, and never run")


@fused_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out = ctx.saved_tensors
    return *torch.ops.lavi.fused_attention_backward(grad, query, key, value, out), None


fused_attention.register_autograd(_backward, setup_context=_keep)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> float:
    """Queries with keys, and weights with values."""
    *rows, length, width = query
    return 2.0 * torch.Size(rows).numel() * length * key[-2] * (width + value[-1])


WITHOUT_A_FORMULA = [
    packet
    for packet in (torch.ops.lavi.fused_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    if packet not in flop_registry  # torch 2.11 has none for the latter
]


@register_flop_formula(WITHOUT_A_FORMULA)  # type: ignore[untyped-decorator]
def _(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> float:
    return _attention_flops(query, key, value)


@register_flop_formula(torch.ops.lavi.fused_attention_backward)  # type: ignore[untyped-decorator]
def _(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> float:
    return 2.5 * _attention_flops(query, key, value)  # the scores anew, and four products

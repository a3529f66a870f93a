"""The FLOPs of a vision tower, from the shapes of its linear maps, convolutions and attentions.

It serves towers of every kind, whatever their layers are called: each call counts by the formula of its operation.
Norms, activations and pooling count as 0. 1 multiply-add = 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from lavi.nn.formulas import linear_flops


class ShapeFlops(TorchFunctionMode):
    """Adds up in :attr:`total` the FLOPs of what is computed within it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in FORMULAS:
            self.total += FORMULAS[function](out, *args, **(kwargs or {}))
        return out


def forward_on_meta(
    module: nn.Module, pixel_shape: Sequence[int], *arguments: Any, views: int = 1
) -> tuple[Any, float]:
    """The output and the FLOPs of a module for views (views, C, H, W) on the meta device; the module is not changed.

    Args:
        arguments: what its forward takes behind the pixels.
    """
    state = state_on_meta(module)
    with evaluating(module), torch.device("meta"), torch.no_grad(), ShapeFlops() as counter:
        out = functional_call(module, state, (torch.zeros(views, *pixel_shape), *arguments))
    return out, counter.total


def state_on_meta(module: nn.Module, *, grad: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers without their numbers; with ``grad`` the parameters take gradients, frozen ones too."""
    state = {name: t.detach().to("meta") for name, t in [*module.named_parameters(), *module.named_buffers()]}
    for name, _ in module.named_parameters():
        state[name].requires_grad_(grad)
    return state


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and back: in training, a tower may drop patches."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _linear(out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> float:
    return linear_flops(input.shape[:-1].numel(), *weight.T.shape)


def _convolution(out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> float:
    """Each output value is a product with one window of its group's input channels."""
    return 2.0 * out.numel() * weight[0].numel()


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * out.numel() * left.shape[-1]


def _einsum(out: Tensor, equation: str, *operands: Tensor, **__: Any) -> float:
    """Of two operands: a product for each combination of all their indices."""
    terms = equation.split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        sizes |= dict(zip(term, operand.shape, strict=True))
    return 2.0 * math.prod(sizes.values())


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    """Scores, then the weighted sum; (..., heads, tokens, width of a head) each."""
    return 2.0 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _multi_head(out: Any, query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any, **__: Any) -> float:
    """Attention with its four projections; (tokens, B, width) each."""
    queries, keys = query.shape[:-1].numel(), key.shape[:-1].numel()
    projections = 2 * linear_flops(queries, width, width) + 2 * linear_flops(keys, width, width)
    return projections + 4.0 * queries * key.shape[0] * width


FORMULAS: dict[Any, Callable[..., float]] = {
    nn.functional.linear: _linear,
    nn.functional.conv2d: _convolution,
    nn.functional.scaled_dot_product_attention: _attention,
    nn.functional.multi_head_attention_forward: _multi_head,
    torch.matmul: _product,
    torch.bmm: _product,
    torch.einsum: _einsum,
    Tensor.matmul: _product,  # and the operator @
    Tensor.bmm: _product,
}

"""What is read while a model runs: the strength of modulation, what is attended to, how layers' states compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lavi.batch import Batch
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import DeltaGenerator
from lavi.nn.modulated_norm import ModulatedNorm, normalise


class Target(NamedTuple):
    """A modulated norm: its layer, and the branch that it belongs to."""

    layer: int
    role: str

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.role}"


@dataclass
class Readings:
    """Of one pass over a batch of B rows of T text tokens."""

    strength: dict[Target, Tensor] = field(default_factory=dict)
    """(B, T) of each modulated norm: the length of what the image adds to its output, over the length of the output
    without it."""
    shares: dict[int, Tensor] = field(default_factory=dict)
    """(B, T, M) of each layer whose generator attends: how much of what a token reads is from each visual token."""
    states: list[Tensor] = field(default_factory=list)
    """(B, length, D) behind the embeddings and behind each layer, as long as the layer's own sequence."""


@contextmanager
def reading(model: VisionLanguageModel) -> Iterator[Readings]:
    """While it holds, a forward pass of ``model`` fills the readings."""
    readings = Readings()
    with ExitStack() as hooks:
        for name, module in model.fusion.named_modules():
            if isinstance(module, DeltaGenerator):
                layer = next(int(part) for part in re.split(r"[.-]", name) if part.isdigit())
                hooks.enter_context(_hooked(module, _shares_into(readings, layer)))
        for target in model.fusion.modulated_norms:
            into = _strength_into(readings, Target(target.layer, target.role))
            hooks.enter_context(_hooked(target.norm, into))
        for index, decoder_layer in enumerate(model.language.layers):
            hooks.enter_context(_hooked(decoder_layer, _states_into(readings, first=index == 0)))
        yield readings


Hook = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def _hooked(module: nn.Module, hook: Hook) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _strength_into(readings: Readings, target: Target) -> Hook:
    def hook(norm: ModulatedNorm, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if norm.deltas is None:
            return
        (x,) = inputs
        dgamma, dbeta = norm.deltas(x) if callable(norm.deltas) else norm.deltas
        xhat = normalise(x, norm.kind.eps, centred=norm.kind.centred)
        added = torch.zeros_like(xhat)
        added = added if dgamma is None else added + dgamma * xhat
        added = added if dbeta is None else added + dbeta
        plain = (output.float() - added).norm(dim=-1)
        readings.strength[target] = (added.norm(dim=-1) / plain.clamp(min=1e-6)).detach()

    return cast(Hook, hook)


def _shares_into(readings: Readings, layer: int) -> Hook:
    def hook(generator: DeltaGenerator, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            shares = generator.shares(*inputs, **kwargs)
        if shares is not None:
            before = readings.shares.get(layer)  # of several generators of a layer, their mean
            readings.shares[layer] = shares if before is None else (before + shares) / 2

    return cast(Hook, hook)


def _states_into(readings: Readings, *, first: bool) -> Hook:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if first:
            readings.states.append((inputs[0] if inputs else kwargs["hidden_states"]).detach())
        readings.states.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook


def relevance(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """How much each visual token has to do with the true answers: (views, N), each row's sum over its views 1.

    The size of the inner product of a token's feature and the gradient of the answers' log probability: it works for
    every fusion, attention or not.
    """
    with torch.enable_grad():
        features = model.features_of(batch).detach().clone().requires_grad_()
        scores = model.token_scores(replace(batch, features=features))
        wanted = scores.log_probability.sum()
        (gradient,) = torch.autograd.grad(wanted, features, materialize_grads=True)  # zeros where nothing depends on it
    size = (gradient * features.detach()).sum(-1).abs()  # (views, N)
    row = torch.tensor([slot.row for slot in batch.image_slots for _ in range(slot.views)], device=size.device)
    total = torch.zeros(len(batch), device=size.device).index_add_(0, row, size.sum(-1))
    return size / total[row, None].clamp(min=1e-12)


def linear_cka(states: list[Tensor]) -> Tensor:
    """How alike layers represent the same tokens: (L + 1, L + 1), from 0 to 1.

    Centred kernel alignment with linear kernels (Kornblith et al., 2019, arXiv 1905.00414), which is 1 where one
    representation is a rotation of the other.

    Args:
        states: (tokens, D) of each layer, of the same tokens.
    """
    grams = []
    for state in states:
        centred = (state - state.mean(0)).double()
        gram = centred @ centred.T  # (tokens, tokens)
        grams.append((gram / gram.norm().clamp(min=1e-12)).flatten())
    stacked = torch.stack(grams)  # (L + 1, tokens^2)
    return (stacked @ stacked.T).float()

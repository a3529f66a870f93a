"""Opening a Hugging Face decoder for vision, and closing it again. Nothing is copied or patched by name.

The class of a module is swapped for a subclass of it, as FSDP2 does, so parameters keep their names, the original
checkpoint still loads, and undoing is swapping back:

    CausalLM       knows the keyword ``vision``, so ``generate`` lets it pass
      decoder      tells the context which tokens these are; keeps only the text's hidden states for the head
        layer i    hands its own call to ``vision.around(i, ...)``
          norm     adds ``dgamma * xhat(x) + dbeta`` to its output, when a layer bound deltas to it

With ``vision=None`` every one of them is exactly the original.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lavi.errors import UserError
from lavi.language.context import VisualContext
from lavi.nn.modulated_norm import ModulatedNorm, normalise

# --- swapping classes -------------------------------------------------------------------------------------------------


@cache
def _subclass(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"_swapped_from": base})


def swap(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the module's class; a second time changes nothing."""
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]


def close(model: nn.Module) -> None:
    """Undo every :func:`swap` inside ``model``."""
    for module in model.modules():
        if "_swapped_from" in type(module).__dict__:
            module.__class__ = type(module).__dict__["_swapped_from"]


class FusedLayer(nn.Module):
    """A decoder layer that asks the context how it is to be run."""

    fused_index: int

    def forward(self, hidden_states: Tensor, *args: Any, vision: VisualContext | None = None, **kwargs: Any) -> Tensor:
        if vision is None:
            return super().forward(hidden_states, *args, **kwargs)
        return vision.around(self.fused_index, super().forward, hidden_states, *args, **kwargs)


class FusedDecoder(nn.Module):
    """A stack of layers that places the context in time, and keeps only the hidden states that get logits."""

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, vision: VisualContext | None = None, **kwargs: Any
    ) -> Any:
        if vision is None:
            return super().forward(input_ids, *args, **kwargs)
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        out = super().forward(input_ids, *args, vision=vision.at(past, tokens.shape[1]), **kwargs)
        if vision.text_columns is not None:
            index = vision.text_columns[..., None].expand(-1, -1, out.last_hidden_state.shape[-1])  # (B, T, D)
            out.last_hidden_state = out.last_hidden_state.gather(1, index)
        return out


class FusedCausalLM(nn.Module):
    """A causal language model that names ``vision`` in its signature: ``generate`` refuses unknown keywords."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original = cls.__mro__[2].forward  # type: ignore[attr-defined]
        signature = inspect.signature(original)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        vision = inspect.Parameter("vision", inspect.Parameter.KEYWORD_ONLY, default=None)

        def forward(self: nn.Module, *args: Any, vision: VisualContext | None = None, **kwargs: Any) -> Any:
            if vision is not None:
                kwargs["vision"] = vision
            return original(self, *args, **kwargs)

        forward.__signature__ = signature.replace(parameters=[*named, vision])  # type: ignore[attr-defined]
        cls.forward = forward  # type: ignore[method-assign]


# --- finding the parts ------------------------------------------------------------------------------------------------


def decoder_of(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder stack of a causal language model, and its layers.

    Raises:
        UserError: it has none that can be told apart.
    """
    stack = model.get_decoder()
    count = model.config.num_hidden_layers
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder layers that vision could enter.")
    return stack, lists[0]


def open_decoder(model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
    """Let the keyword ``vision`` in, down to ``layers``, and check that it arrives.

    Raises:
        UserError: the family drops unknown keywords on the way.
    """
    stack, stack_layers = decoder_of(model)
    swap(model, FusedCausalLM)
    swap(stack, FusedDecoder)
    for index in layers:
        swap(stack_layers[index], FusedLayer)
        stack_layers[index].fused_index = index  # type: ignore[assignment]
    reached = _Canary()
    _dummy_forward(model, vision=reached)
    if missing := sorted(set(layers) - reached.layers):
        close(model)
        raise UserError(
            f"{type(model).__name__} drops unknown keywords before its layers {missing}: vision cannot enter it. "
            "Choose a family that passes them on (Qwen2, Llama, Mistral, Gemma, Phi, OLMo, ...)."
        )


class _Canary(VisualContext):
    """Notes which layers it was carried to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: set[int] = set()

    def around(self, layer: int, call: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.layers.add(layer)
        return call(hidden, *args, **kwargs)


def _dummy_forward(model: PreTrainedModel, vision: VisualContext | None = None) -> None:
    """Run two tokens through the model, changing nothing of it. With a cache: on meta, masks need one."""
    training = model.training
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    extra = {} if vision is None else {"vision": vision}
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **extra)
    model.train(training)


# --- norms ------------------------------------------------------------------------------------------------------------

Role = Literal["attention", "ffn", "both"]


@dataclass(frozen=True)
class NormTarget:
    """A norm of a decoder layer and what it feeds, found by probing, never by name."""

    layer: int
    name: str
    role: Role
    norm: nn.Module


def norm_targets(model: PreTrainedModel) -> list[NormTarget]:
    """Which norms feed the attention and the feed-forward part of each layer.

    One dummy forward: a norm whose output *is* the input of a sibling feeds that sibling; a sibling that takes an
    attention mask is an attention. So a ``post_attention_layernorm`` that feeds the MLP (Llama) is told from one that
    closes the attention's branch (Gemma-2), and a norm that feeds both (Phi, Cohere) is found once, as "both".
    """
    _, layers = decoder_of(model)
    outputs: dict[int, tuple[int, str, nn.Module]] = {}  # id of an output -> the norm it came from
    alive: list[Tensor] = []  # keeps outputs from being freed, so that no id is used twice
    feeds: dict[tuple[int, str], set[str]] = {}
    norms: dict[tuple[int, str], nn.Module] = {}
    hooks = []

    def after_norm(index: int, name: str, norm: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[id(output)] = (index, name, norm)
            alive.append(output)

        return hook

    def before_sibling(index: int, role: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if (found := outputs.get(id(value))) and found[0] == index:
                    feeds.setdefault(found[:2], set()).add(role)
                    norms[found[:2]] = found[2]

        return hook

    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if _is_norm(child, model.config.hidden_size):
                hooks.append(child.register_forward_hook(after_norm(index, name, child)))
            else:
                role = "attention" if takes_attention_mask(child) else "ffn"
                hooks.append(child.register_forward_pre_hook(before_sibling(index, role), with_kwargs=True))
    try:
        _dummy_forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    roles: dict[tuple[int, str], Role] = {
        key: "both" if len(found) == 2 else ("attention" if "attention" in found else "ffn")
        for key, found in feeds.items()
    }
    return [NormTarget(*key, role=role, norm=norms[key]) for key, role in sorted(roles.items())]


def takes_attention_mask(module: nn.Module) -> bool:
    """Whether a child of a decoder layer is its attention."""
    return "attention_mask" in inspect.signature(module.forward).parameters


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)


def open_norm(target: NormTarget) -> None:
    """Let a norm take deltas.

    Raises:
        UserError: what the norm computes is neither a layer norm nor a root-mean-square norm.
    """
    norm = target.norm
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
    if eps is None:
        raise UserError(
            f"norm '{target.name}' of layer {target.layer} has no eps that can be read: it cannot be modulated."
        )
    centred = _centres(norm, float(eps))
    if centred is None:
        kind = type(norm).__name__
        raise UserError(
            f"norm '{target.name}' of layer {target.layer} ({kind}) is neither a layer norm nor an RMS norm."
        )
    swap(norm, ModulatedNorm)
    assert isinstance(norm, ModulatedNorm)
    norm.eps_of_xhat, norm.centred = float(eps), centred


def _centres(norm: nn.Module, eps: float) -> bool | None:
    """Whether a norm subtracts the mean, by feeding it numbers: a copy on the host, so weights may be on meta."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in probe.named_parameters():
        nn.init.zeros_(parameter) if "bias" in name else nn.init.ones_(parameter)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, probe.get_parameter("weight").numel(), generator=generator, device="cpu") + 1.0
    with torch.no_grad(), torch.device("cpu"):
        y = probe(x)
        for centred in (True, False):
            xhat = normalise(x, eps, centred=centred)
            factor = (y * xhat).sum() / xhat.square().sum()  # 1, or 2 where the weight means (1 + w)
            if torch.allclose(y, factor * xhat, atol=1e-4):
                return centred
    return None


@contextmanager
def modulated(norms: Sequence[ModulatedNorm], deltas: Sequence[tuple[Tensor | None, Tensor | None]]) -> Iterator[None]:
    """Bind one (dgamma, dbeta) pair, each (B, T, D) or None, to each norm for the time of one layer's call."""
    for norm, pair in zip(norms, deltas, strict=True):
        norm.deltas = pair
    try:
        yield
    finally:
        for norm in norms:
            norm.deltas = None

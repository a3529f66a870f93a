"""Opening a Hugging Face decoder for vision, and closing it again. Nothing is copied or patched by name.

The class of a module is swapped for a subclass of it, as FSDP2 does, so parameters keep their names, the original
checkpoint still loads, and undoing is swapping back:

    CausalLM       knows the keyword ``vision``, so ``generate`` lets it pass
      decoder      tells the context which tokens these are; keeps only the text's hidden states for the head
        layer i    hands its own call to ``vision.run_layer(i, ...)``
          norm     adds ``dgamma * xhat(x) + dbeta`` to its output, when a layer bound deltas to it

With ``vision=None`` every one of them is exactly the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lavi.errors import UserError
from lavi.language.compiled import call_of
from lavi.language.context import HeadAlone, VisualContext
from lavi.language.sequence import experts_by_operators
from lavi.language.subsequence import LayeredCache
from lavi.nn.modulated_norm import Deltas, ModulatedNorm, NormKind
from lavi.nn.norm_kinds import kind_of

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
    fused_names: tuple[str, ...]
    """What the layer's own forward takes, behind the hidden states."""

    def forward(self, hidden_states: Tensor, *args: Any, vision: VisualContext | None = None, **kwargs: Any) -> Tensor:
        if vision is None or not vision.works_in(self.fused_index):
            return super().forward(hidden_states, *args, **kwargs)
        # Some families hand arguments on by position (GPT-2): a context gets them by name.
        named = dict(zip(self.fused_names, args, strict=False)) | kwargs
        call = super().forward
        if "layer_past" in named:  # what GPT-NeoX calls its cache
            named["past_key_values"] = named.pop("layer_past")
            return vision.run_layer(self.fused_index, partial(_with_layer_past, call), hidden_states, **named)
        return vision.run_layer(self.fused_index, call, hidden_states, **named)


def _with_layer_past(call: Callable[..., Any], hidden: Tensor, *, past_key_values: Any = None, **kwargs: Any) -> Any:
    return call(hidden, layer_past=past_key_values, **kwargs)


@dataclass
class StackOutput(MoeModelOutputWithPast):
    """Of any family's stack of layers: its last hidden states alone."""

    cross_attentions: None = None
    shared_kv_states: None = None


class FusedDecoder(nn.Module):
    """A stack of layers that tells the context which tokens these are, and keeps the hidden states that get logits."""

    config: PretrainedConfig

    def forward(
        self, input_ids: Tensor | None = None, *args: Any, vision: VisualContext | None = None, **kwargs: Any
    ) -> Any:
        if vision is None:
            return super().forward(input_ids, *args, **kwargs)
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        if isinstance(vision, HeadAlone):
            return StackOutput(last_hidden_state=tokens)
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache"):
            kwargs["past_key_values"] = cache = vision.new_cache(self.config)
        if not vision.prompt_is_read:
            past = int(cache.get_seq_length()) if cache is not None else 0
            vision = vision.for_step(past, tokens.shape[1])
        with vision.during_stack():
            out = super().forward(input_ids, *args, vision=vision, **kwargs)
        if isinstance(cache, LayeredCache):
            cache.arranged += tokens.shape[1]
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

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What ``generate`` runs behind a prompt, where it compiles."""
        return super().get_compiled_call(None) if compile_config is None else call_of(self, compile_config)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """What ``generate`` calls behind each step: from the first on the prompt is in the cache, if there is one."""
        vision = model_kwargs.get("vision")
        in_cache = model_kwargs.get("past_key_values") is not None
        if vision is not None and in_cache and not vision.prompt_is_read:
            model_kwargs["vision"] = vision.behind_prompt()
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)  # type: ignore[misc]


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
    if stack is model:  # Llama 4: transformers does not see which part it is
        stack = next(child for child in model.children() if lists[0] in child.children())
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
        layer: Any = stack_layers[index]
        if not isinstance(layer, FusedLayer):
            layer.fused_names = tuple(inspect.signature(layer.forward).parameters)[1:]
            swap(layer, FusedLayer)
        layer.fused_index = index
    reached = _Canary()
    dummy_forward(model, vision=reached)
    if reached.several:
        close(model)
        raise UserError(
            f"the layers of {type(model).__name__} hand on several versions of each hidden state (Gemma 3n's AltUp), "
            "which vision cannot enter: take a family such as qwen2 or llama."
        )
    missing = sorted(set(layers) - reached.layers)
    if missing or not reached.stack:
        where = f"layers {missing}" if missing else "decoder"
        close(model)
        raise UserError(
            f"{type(model).__name__} drops unknown keywords before its {where}: vision cannot enter it. "
            "Choose a family that passes them on (Qwen2, Llama, Mistral, Gemma, Phi, OLMo, ...)."
        )


class _Canary(VisualContext):
    """Notes where it was carried to."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = False
        self.layers: set[int] = set()
        self.several = False

    def for_step(self, past: int, length: int) -> Self:
        self.stack = True
        return self

    def run_layer(self, layer: int, call: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.layers.add(layer)
        self.several = self.several or hidden.ndim > 3
        return call(hidden, **kwargs)


def dummy_forward(model: PreTrainedModel, vision: VisualContext | None = None) -> None:
    """Run two tokens through the model, changing nothing of it. With a cache: on meta, masks need one.

    Raises:
        UserError: on meta, where a family reads numbers on the way (BioGPT those of its mask).
    """
    training = model.training
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    extra = {} if vision is None else {"vision": vision}
    experts = experts_by_operators(model.config) if ids.is_meta else nullcontext()
    config: Any = model.config
    kernel = config._attn_implementation
    try:
        if kernel not in ("sdpa", "eager"):  # one that may run on a GPU alone, or in half precision
            config._attn_implementation = "eager"
        with torch.no_grad(), experts:
            model(input_ids=ids, use_cache=True, **extra)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        raise UserError(
            f"{type(model).__name__} reads numbers on its way, which a model without weights does not have: it can be "
            "trained, and not counted."
        ) from error
    finally:
        config._attn_implementation = kernel
        model.train(training)


# --- norms ------------------------------------------------------------------------------------------------------------

Role = Literal["attention", "ffn", "both", "final"]


@dataclass(frozen=True)
class NormTarget:
    """A norm of a decoder layer (or the final one) and what it belongs to, known by probing, never by name."""

    layer: int
    """The layer's index; the number of layers for the final norm."""
    name: str
    role: Role
    position: Literal["feeds", "closes"]
    """Whether the norm feeds its branch, or closes it (the only norms that post-norm families such as OLMo-2 have)."""
    norm: nn.Module
    flattened: bool
    """Whether its input is (B T, D) and no longer (B, T, D), as in OPT: then rows and tokens cannot be told apart."""


def norm_targets(model: PreTrainedModel) -> list[NormTarget]:
    """Which norms feed, and which close, the attention and the feed-forward part of each layer; and the final norm.

    One dummy forward: a norm whose output *is* the input of a sibling feeds that sibling, one whose input is a
    sibling's output closes it; a sibling that takes an attention mask is an attention. So a
    ``post_attention_layernorm`` that feeds the MLP (Llama) is told from one that closes the attention's branch
    (Gemma-2), and a norm that feeds both (Phi, Cohere) is listed once, as "both".
    """
    stack, layers = decoder_of(model)
    probe = _NormProbe()
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if _is_norm(child, model.config.hidden_size):
                probe.watch_norm(index, name, child)
            elif any(True for _ in child.parameters()):  # not a dropout, which hands its input on
                probe.watch_branch(index, "attention" if takes_attention_mask(child) else "ffn", child)
    for name, child in stack.named_children():
        if _is_norm(child, model.config.hidden_size):
            probe.watch_norm(len(layers), name, child, final=True)
    with probe.watching():
        dummy_forward(model)
    return probe.targets()


def norms_of(targets: Sequence[NormTarget], layer: int, wanted: Sequence[str]) -> list[NormTarget]:
    """For each wanted role the norm of a layer that feeds it, else the one that closes it.

    Raises:
        UserError: it has neither.
    """
    of_layer = [target for target in targets if target.layer == layer]
    chosen: dict[str, NormTarget] = {}
    for want in wanted:
        fitting = [target for target in of_layer if target.role in (want, "both")]
        if not fitting:
            roles = {target.name: target.role for target in of_layer}
            raise UserError(f"layer {layer} has no norm for target '{want}'; it has: {roles}.")
        best = max(fitting, key=lambda target: target.position)  # "feeds" before "closes"
        chosen[best.name] = best
    return list(chosen.values())


class _NormProbe:
    """Matches the tensors that go into and come out of norms and branches, by identity."""

    def __init__(self) -> None:
        self.norms: dict[tuple[int, str], nn.Module] = {}
        self.roles: dict[tuple[int, str, str], set[str]] = {}  # (layer, norm, position) -> what it feeds or closes
        self.out_of_norm: dict[int, tuple[int, str]] = {}  # id of an output -> the norm
        self.out_of_branch: dict[int, tuple[int, str]] = {}  # id of an output -> (layer, role)
        self.flattened: set[tuple[int, str]] = set()
        self.alive: list[Tensor] = []  # keeps tensors from being freed, so that no id is used twice
        self.hooks: list[Any] = []

    def watch_norm(self, layer: int, name: str, norm: nn.Module, *, final: bool = False) -> None:
        self.norms[layer, name] = norm

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.out_of_norm[id(output)] = (layer, name)
            if output.ndim != 3:
                self.flattened.add((layer, name))
            self.alive.append(output)
            closed = self.out_of_branch.get(id(args[0])) if args else None
            if final and self.out_of_branch:  # after the layers, and not on the embeddings
                self.roles[layer, name, "feeds"] = {"final"}
            elif closed and closed[0] == layer:
                self.roles.setdefault((layer, name, "closes"), set()).add(closed[1])

        self.hooks.append(norm.register_forward_hook(hook))

    def watch_branch(self, layer: int, role: str, branch: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            for value in (*args, *kwargs.values()):
                if (norm := self.out_of_norm.get(id(value))) and norm[0] == layer:
                    self.roles.setdefault((*norm, "feeds"), set()).add(role)
            first = output[0] if isinstance(output, tuple) else output
            self.out_of_branch[id(first)] = (layer, role)
            self.alive.append(first)

        self.hooks.append(branch.register_forward_hook(hook, with_kwargs=True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        finally:
            for hook in self.hooks:
                hook.remove()

    def targets(self) -> list[NormTarget]:
        targets = []
        for (layer, name, position), roles in sorted(self.roles.items()):
            role = "both" if len(roles) == 2 else next(iter(roles))
            norm, flat = self.norms[layer, name], (layer, name) in self.flattened
            targets.append(NormTarget(layer, name, role, position, norm, flat))  # type: ignore[arg-type]
        return targets


def takes_attention_mask(module: nn.Module) -> bool:
    """Whether a child of a decoder layer is its attention."""
    return "attention_mask" in inspect.signature(module.forward).parameters


def _is_norm(module: nn.Module, width: int) -> bool:
    """A norm over the whole width; its weight has that shape, or it has none (OLMo)."""
    weight = getattr(module, "weight", None)
    fits = weight is None or (isinstance(weight, Tensor) and weight.shape == (width,))
    return "norm" in type(module).__name__.lower() and fits


def open_norm(target: NormTarget, width: int) -> None:
    """Let a norm take deltas.

    Raises:
        UserError: it cannot (:func:`kind_of_norm`).
    """
    kind = kind_of_norm(target, width)
    swap(target.norm, ModulatedNorm)
    assert isinstance(target.norm, ModulatedNorm)
    target.norm.kind = kind


def kind_of_norm(target: NormTarget, width: int) -> NormKind:
    """What a norm computes that can be modulated.

    Raises:
        UserError: rows and tokens cannot be told apart at the norm, or what it computes is neither a layer norm nor a
            root-mean-square norm.
    """
    if target.flattened:
        raise UserError(
            f"layer {target.layer} flattens rows and tokens before its norm '{target.name}' (as OPT does), which then "
            f"cannot be modulated token by token: leave '{target.role}' out of the targets, or take another family."
        )
    kind = kind_of(target.norm, width)
    if kind is None:
        name = type(target.norm).__name__
        raise UserError(
            f"norm '{target.name}' of layer {target.layer} ({name}) is neither a layer norm nor an RMS norm: it cannot "
            "be modulated."
        )
    return kind


@contextmanager
def modulated(norms: Sequence[ModulatedNorm], deltas: Sequence[Deltas | Callable[[Tensor], Deltas]]) -> Iterator[None]:
    """Bind deltas, or what gives them, to each norm for the time of one call."""
    for norm, pair in zip(norms, deltas, strict=True):
        norm.deltas = pair
    try:
        yield
    finally:
        for norm in norms:
            norm.deltas = None

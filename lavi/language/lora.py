"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a language model, by peft; the model itself is changed.

    x --+-- W (frozen) ------------------------+--> y        language: {lora: {rank: 128, alpha: 256}}
        |                                      |
        +-- dropout -- A (r, in) -- B (out, r) -- alpha / r

B starts at zero: at step 0 the model is the bare one, bit for bit. The model keeps its class, so that ``generate`` and
both doors of a fusion work as before. Only the names of the adapted weights change (``q_proj.weight`` becomes
``q_proj.base_layer.weight``); an export merges the adapters and writes the original names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lavi.config.types import Range
from lavi.errors import UserError, nearest

BASE = ".base_layer"
"""What peft puts into the name of an adapted weight."""


@dataclass(frozen=True)
class LoRA:
    """The settings; the defaults are LLaVA-1.5's.

    Args:
        rank: r of each adapter.
        alpha: adapters are scaled by alpha / r.
        dropout: on the adapters' input.
        targets: which linear layers of the decoder layers, by their last name or more of it (``q_proj``,
            ``self_attn.q_proj``); None: all of them.
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    targets: list[str] | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> LoRA:
        """Read the settings of a recipe.

        Raises:
            UserError: an unknown key, or a value that is none.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise UserError(f"language.lora has no '{key}': {nearest(key, known)}")
        lora = cls(**settings)
        if type(lora.rank) is not int or lora.rank < 1:
            raise UserError(f"language.lora.rank is a whole number from 1, not {lora.rank!r}.")
        if type(lora.alpha) not in (int, float) or lora.alpha not in Range(0, above=True):
            raise UserError(f"language.lora.alpha is a number above 0, not {lora.alpha!r}.")
        if type(lora.dropout) not in (int, float) or not 0 <= lora.dropout < 1:
            raise UserError(f"language.lora.dropout is a share from 0 to below 1, not {lora.dropout!r}.")
        if lora.targets is not None and (not isinstance(lora.targets, list) or not lora.targets):
            raise UserError("language.lora.targets is a list of linear layers, such as [q_proj, v_proj]; null: all.")
        return lora


def add_lora(model: nn.Module, layers: nn.ModuleList, lora: LoRA) -> frozenset[str]:
    """Put adapters into ``model``'s decoder ``layers``; the names of their parameters.

    Raises:
        UserError: a target that no decoder layer has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    before = {name for name, _ in model.named_parameters()}
    chosen = _targets(layers, lora.targets)
    transposed = any(isinstance(linear, Conv1D) for linear in chosen.values())  # GPT-2's linear layers
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(chosen),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, layers)  # in the whole model peft would take shared experts for the others
    added = {name: p for name, p in model.named_parameters() if original_name(name) not in before}
    for parameter in added.values():
        parameter.data = parameter.data.float()  # small steps would be rounded away in bf16
    return frozenset(added)


def original_name(name: str) -> str:
    """The name of a weight without adapters around it."""
    return name.replace(f"{BASE}.", ".")


def merged_state(model: nn.Module, adapters: frozenset[str]) -> dict[str, Tensor]:
    """The state of ``model`` under its original names: each adapter is added to the weight it adapts, in fp32."""
    state = {original_name(name): tensor for name, tensor in model.state_dict().items() if name not in adapters}
    if not adapters:
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"]
            with torch.no_grad():
                delta = module.get_delta_weight("default")  # type: ignore[attr-defined]
                state[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return state


def _targets(layers: nn.ModuleList, names: list[str] | None) -> dict[str, nn.Module]:
    """The linear layers that are meant, by their names in ``layers``."""
    linear_layers = {
        (index, name): module
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if _is_linear(module)
    }
    ends = {end for _, name in linear_layers for end in _endings(name)}
    for target in names or ():
        if target not in ends:
            raise UserError(
                f"language.lora.targets names '{target}', which no decoder layer has: {nearest(str(target), ends)}"
            )
    return {
        f"{index}.{name}": module
        for (index, name), module in linear_layers.items()
        if names is None or any(end in names for end in _endings(name))
    }


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, and no router that is one with more behind it (Llama 4, Phi-MoE)."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _endings(name: str) -> list[str]:
    """``c``, ``b.c`` and ``a.b.c`` of ``a.b.c``."""
    words = name.split(".")
    return [".".join(words[start:]) for start in range(len(words))]

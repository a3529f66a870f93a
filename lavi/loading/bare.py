"""Configurations of transformers written out in a recipe: keys that are known, numbers that a model can have.

Transformers takes any key, and builds without it; a checkpoint's own ``config.json`` may hold what it likes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import MODEL_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from lavi.errors import UserError, nearest, one_line

ROPE = ("rope_parameters", "rope_scaling")
ROPE_KEYS = {*RopeParameters.__annotations__, "type"}
ROPE_TYPES = {*ROPE_INIT_FUNCTIONS, "default", "axial"}

OF_THE_COMPONENT = ("dtype", "torch_dtype", "attn_implementation")
"""What a component has arguments of its own for, or decides itself."""

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_channels",
    "image_size",
    "patch_size",
)


def bare_configuration(keys: Mapping[str, Any], kinds: Iterable[str], *, what: str) -> PretrainedConfig:
    """The configuration of ``model_type`` and its keys; an unknown one at None is left out.

    Args:
        kinds: the model types to name the nearest of.
        what: is configured, such as ``vision tower``.

    Raises:
        UserError: no such model type, a key it does not have, or a value it cannot have.
    """
    rest = dict(keys)
    kind = rest.pop("model_type")
    try:
        default = AutoConfig.for_model(kind)
    except (ValueError, TypeError):
        raise UserError(f"transformers knows no {what} '{kind}': {nearest(kind, kinds)}") from None
    known = _known(default)
    rest = {key: value for key, value in rest.items() if value is not None or key in known}
    whole = f"the {what} '{kind}'"
    _check_keys(rest, default, whole)
    try:
        config = AutoConfig.for_model(kind, **rest)
    except Exception as error:
        raise UserError(f"the configuration of {whole} is wrong: {one_line(error)}.") from error
    _check_numbers(config, whole)
    return config


def _known(default: PretrainedConfig) -> set[str]:
    names = {name.removeprefix("_") for name in default.to_dict()} | set(default.attribute_map)
    return (names | _looked_for(type(default))) - set(OF_THE_COMPONENT)


def _looked_for(kind: type[PretrainedConfig]) -> set[str]:
    """Keys that the family's code uses where its configuration has them, such as ``head_dim`` of Qwen2."""
    if kind not in MODEL_MAPPING:
        return set()
    source = inspect.getsource(sys.modules[MODEL_MAPPING[kind].__module__])
    return set(re.findall(r"getattr\(\s*(?:self\.)?config,\s*['\"](\w+)['\"]", source))


def _check_keys(keys: Mapping[str, Any], default: PretrainedConfig, whole: str) -> None:
    known = _known(default)
    for key, value in keys.items():
        if key not in known and not _is_old_name(key, value, default):
            raise UserError(f"{whole} has no key '{key}': {nearest(key, known)}")
        part = default.sub_configs.get(key)
        if key in ROPE and isinstance(value, dict):
            _check_rope(value, getattr(default, "rope_parameters", None) or {}, f"{key} of {whole}")
        elif part is not None and isinstance(value, dict):
            inner = getattr(default, key, None)
            if "model_type" in value or not isinstance(inner, PretrainedConfig):
                inner = AutoConfig.for_model(value["model_type"]) if part is AutoConfig else part()
            _check_keys({k: v for k, v in value.items() if k != "model_type"}, inner, f"{key} of {whole}")


def _is_old_name(key: str, value: Any, default: PretrainedConfig) -> bool:
    """Whether the configuration reads a key that is no attribute of it, such as ``rope_theta``."""
    if key in OF_THE_COMPONENT or key in GenerationConfig().to_dict() or not isinstance(key, str):
        return False
    try:
        return key not in vars(type(default)(**{key: value}))
    except Exception:  # noqa: BLE001 -- it reads the key and refuses the value, as it will again
        return True


def _check_rope(rope: Mapping[str, Any], default: Mapping[str, Any], whole: str) -> None:
    layer_types = {name for name, value in default.items() if isinstance(value, dict)}
    for key, value in rope.items():
        if key in layer_types and isinstance(value, dict):
            _check_rope(value, {}, f"{key} of {whole}")
        elif key not in ROPE_KEYS:
            raise UserError(f"{whole} has no key '{key}': {nearest(key, ROPE_KEYS | layer_types)}")
        elif key in ("rope_type", "type") and value not in ROPE_TYPES:
            raise UserError(f"{whole} knows no {key} '{value}': {nearest(value, ROPE_TYPES)}")


def _check_numbers(config: PretrainedConfig, whole: str) -> None:
    for name in COUNTS:
        value = _of_all_layers(config, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{whole} cannot have {name}={value}: it is a whole number from 1.")
    width, heads, groups = (
        _of_all_layers(config, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    own_width = config.to_dict().get("head_dim") is not None
    if isinstance(heads, int) and isinstance(width, int) and not own_width and width % heads:
        raise UserError(f"{whole}: hidden_size={width} is no multiple of num_attention_heads={heads}.")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(f"{whole}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}.")


def _of_all_layers(config: PretrainedConfig, name: str) -> Any:
    """What a configuration says of all layers alike; None where layers differ (Gemma 4's heads)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' answer where each layer has its own
        return None

"""Published vision-language models of transformers, and the parts of them: tower, language model, connector.

    LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision     vision_tower -> multi_modal_projector -> language_model, lm_head
    Idefics3, SmolVLM                          vision_model -> connector             -> text_model,     lm_head

A backbone or a language model whose ``source`` is such a checkpoint takes its part of it. Where several parts of one
are wanted, :func:`opened_once` reads the checkpoint once for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from lavi.errors import UserError, one_line
from lavi.loading.published import check_loaded, configuration_of
from lavi.loading.without_weights import weights_wanted

TILED_BY_GRID = ("llava_next", "llava_onevision")
TILED_WITH_MARKERS = ("idefics3", "smolvlm")
VLM_KINDS = ("llava", *TILED_BY_GRID, *TILED_WITH_MARKERS)
"""Model types of the published vision-language models that come in."""

CONNECTOR = {
    "multi_modal_projector.linear_1.weight": "projector.layers.0.weight",
    "multi_modal_projector.linear_1.bias": "projector.layers.0.bias",
    "multi_modal_projector.linear_2.weight": "projector.layers.2.weight",
    "multi_modal_projector.linear_2.bias": "projector.layers.2.bias",
    "image_newline": "newline",
    "connector.modality_projection.proj.weight": "projector.layer.weight",
}
"""Parameters of what joins the halves: their names in ``model`` of transformers' classes, and in a concatenation."""

_opened: ContextVar[dict[str, PreTrainedModel] | None] = ContextVar("opened_vlms", default=None)


def is_vlm(config: PretrainedConfig) -> bool:
    """Whether a configuration is of one of the :data:`VLM_KINDS`."""
    return config.model_type in VLM_KINDS


def vlm_config(source: str) -> PretrainedConfig:
    """The configuration of a published vision-language model.

    Raises:
        UserError: nothing there, or a checkpoint of another class.
    """
    try:
        config = AutoConfig.from_pretrained(configuration_of(source))
    except Exception as error:
        raise UserError(
            f"no vision-language model at '{source}' (neither a local folder nor a reachable hub name): "
            f"{one_line(error)}."
        ) from error
    if not is_vlm(config):
        raise UserError(
            f"'{source}' is a '{config.model_type}', no vision-language model that comes in here: take one of "
            f"{', '.join(VLM_KINDS)}."
        )
    return config


def names_vlm(source: str) -> bool:
    """Whether a folder, or what lies under a hub name, is a published vision-language model."""
    folder = Path(source).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        return False
    try:
        return is_vlm(AutoConfig.from_pretrained(configuration_of(source)))
    except Exception:  # noqa: BLE001 -- whatever the reason: it is another thing, which the caller asks for
        return False


@contextmanager
def opened_once() -> Iterator[None]:
    """Within it a checkpoint is read once, however many parts of it are taken."""
    token = _opened.set({})
    try:
        yield
    finally:
        _opened.reset(token)


def open_vlm(source: str) -> PreTrainedModel:
    """A published vision-language model in the precision of its files; without weights where none are wanted.

    Raises:
        UserError: nothing there, a checkpoint of another class, or one that lacks weights.
    """
    source, opened = os.path.expanduser(source), _opened.get()
    if opened is not None and source in opened:
        return opened[source]
    model = _read(source, vlm_config(source))
    if opened is not None:
        opened[source] = model
    return model


def _read(source: str, config: PretrainedConfig) -> PreTrainedModel:
    try:
        if not weights_wanted():
            return AutoModelForImageTextToText.from_config(config)
        keys: Any = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype="auto", **keys)
    except Exception as error:
        raise UserError(f"no '{config.model_type}' model can be read from '{source}': {one_line(error)}.") from error
    model, loading_info = loaded
    check_loaded(loading_info, source, f"'{config.model_type}' model")
    read: PreTrainedModel = model
    return read


def language_model_of(vlm: PreTrainedModel, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The language model of a published one, as a causal language model of its own family; its weights are moved."""
    inner = vlm.model.text_model if hasattr(vlm.model, "text_model") else vlm.model.language_model
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(inner.config)
    setattr(causal, causal.base_model_prefix, inner)
    head, embeddings = vlm.get_output_embeddings(), inner.get_input_embeddings()
    causal.set_output_embeddings(head)
    causal.config.tie_word_embeddings = head.weight is embeddings.weight
    causal.generation_config = vlm.generation_config
    causal.set_attn_implementation(attention)
    for parameter in causal.parameters():  # buffers stay: rotary frequencies are of fp32 in every precision
        parameter.data = parameter.data.to(dtype)
    language: PreTrainedModel = causal
    return language


def tower_state(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the tower of a published vision-language model, under the names of its own class."""
    tower: nn.Module = vlm.model.vision_model if hasattr(vlm.model, "vision_model") else vlm.model.vision_tower
    return tower.state_dict()


def connector_state(vlm: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of what joins the halves, under the names of :class:`lavi.fusion.concat.ConcatFusion`."""
    parameters = dict(vlm.model.named_parameters())
    return {CONNECTOR[name]: parameters[name] for name in CONNECTOR if name in parameters}

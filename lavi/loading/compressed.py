"""Weights in fewer bits: GGUF files, opened to ordinary weights, and quantization while a checkpoint is loaded."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

from lavi.errors import UserError

Quantization = Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"]
"""Libraries and what they make of the weights of a language model's linear layers, its head excepted."""


def gguf_arguments(file: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes to read a GGUF file and open its blocks of weights."""
    kind = getattr(transformers, "GgufConfig", None)  # an older transformers opens them always
    return {"gguf_file": file} | ({} if kind is None else {"quantization_config": kind(dequantize=True)})


def as_ordinary(model: PreTrainedModel) -> None:
    """Of a model from a GGUF file: its weights are ordinary ones, and it can be saved as any other."""
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, key):
            delattr(model.config, key)
    model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What transformers takes as ``quantization_config``.

    Args:
        name: a :data:`Quantization`.
        dtype: of what is computed.

    Raises:
        UserError: the library is not installed.
    """
    library, _, kind = name.partition("-")
    if importlib.util.find_spec(library) is None:
        raise UserError(f"language.quantization={name} needs the package {library}: pip install 'lavi[quantization]'.")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    logging.getLogger(library).setLevel(logging.ERROR)  # it tells of a cast at each layer of each call
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)

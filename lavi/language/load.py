"""Language models of transformers: from a hub name, a local folder or a bare configuration, with their tokenizer."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lavi.configurations import configuration_of, weights_wanted
from lavi.errors import UserError, nearest
from lavi.language.context import DecoderInput
from lavi.language.lora import LoRA, add_lora, merged_state
from lavi.language.surgery import decoder_of, refuse_recurrent


class LanguageModel(nn.Module):
    """A causal language model and its tokenizer. ``hf`` is the transformers model, under its original names.

    Args:
        source: hub name or local folder of a checkpoint.
        config: instead of ``source``, a bare configuration: ``model_type`` and its keys; weights start random.
            ``vocab_size`` defaults to the tokenizer's.
        tokenizer: hub name or folder of the tokenizer; with ``source``, that by default.
        dtype: of the weights.
        attention: the attention kernel, the same for every method that is to be compared.
        lora: put adapters into the decoder layers: keys of :class:`lavi.language.lora.LoRA` (``rank``, ``alpha``,
            ``dropout``, ``targets``); what trains of this part is then the adapters alone.

    Raises:
        UserError: neither or both of ``source`` and ``config``; nothing there; no tokenizer; an unknown LoRA target.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (source is None) == (config is None):
            raise UserError("a language model takes either 'source' (a checkpoint) or 'config' (a bare configuration).")
        name = tokenizer or source
        if name is None:
            raise UserError("a language model from a bare configuration needs 'tokenizer' (a folder or a hub name).")
        self._tokenizer = name
        if config is not None and "vocab_size" not in config:
            config = {"vocab_size": len(self.tokenizer)} | config
        settings = _config(source, config)
        kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        try:
            if source is not None and weights_wanted():
                self.hf = AutoModelForCausalLM.from_pretrained(source, config=settings, **kwargs)
            else:
                self.hf = AutoModelForCausalLM.from_config(settings, **kwargs)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if "attention implementation" in reason:  # Gemma-2 caps its scores, which no fused kernel does
                raise UserError(
                    f"'{settings.model_type}' has no attention kernel '{attention}': set language.attention=eager."
                ) from None
            if "Unrecognized configuration class" in reason:
                raise UserError(
                    f"'{settings.model_type}' is no decoder-only language model: choose one such as qwen2 or llama."
                ) from None
            raise
        refuse_recurrent(self.hf)
        self.attention = attention
        added = add_lora(self.hf, self.layers, LoRA.of(lora)) if lora is not None else frozenset()
        self.adapters = frozenset(f"hf.{name}" for name in added)
        """Names of the adapters' parameters."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded on first use: a model that is only counted needs none."""
        return _load_tokenizer(self._tokenizer)

    @property
    def width(self) -> int:
        """D."""
        return int(self.hf.config.hidden_size)

    @property
    def attention_width(self) -> int:
        """Of all query heads together."""
        config = self.hf.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_attention_heads * head)

    @property
    def layers(self) -> nn.ModuleList:
        """The L decoder layers."""
        return decoder_of(self.hf)[1]

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.hf.config.max_position_embeddings)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D) embeddings."""
        return self.hf.get_input_embeddings()(ids)

    def forward(self, inputs: DecoderInput) -> Tensor:
        """Logits (B, T, vocabulary) at the text tokens.

        Raises:
            UserError: rows of several conversations, for a decoder that would not keep them apart.
        """
        if inputs.conversation is not None and not self._masks_by_position:
            raise UserError(
                f"'{self.hf.config.model_type}' with attention '{self.attention}' would let the conversations of a row "
                "see each other: set language.attention=sdpa, or data.packing=null."
            )
        out = self.hf(**inputs.sequence(), position_ids=inputs.position_ids, vision=inputs.vision, use_cache=False)
        return out.logits

    @property
    def _masks_by_position(self) -> bool:
        """Whether its masks are transformers' own, which keep apart what begins at position 0 anew.

        Not with flash attention: there that is looked for in batches of one row alone.
        """
        if self.attention == "flash_attention_2":
            return False
        rooms = (sys.modules[kind.__module__] for kind in type(self.hf).__mro__)
        return any(hasattr(room, "create_causal_mask") for room in rooms)

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary transformers checkpoint, tokenizer and all: original names and class, adapters merged."""
        adapters = frozenset(name.removeprefix("hf.") for name in self.adapters)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.hf.config, attn_implementation=self.attention)
        plain.load_state_dict(merged_state(self.hf, adapters), assign=True)
        plain.generation_config = self.hf.generation_config
        if hasattr(self.hf, "_weight_conversions"):  # how transformers renamed a checkpoint's keys as it read them
            plain._weight_conversions = self.hf._weight_conversions
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no tokenizer at '{name}' (for the built-in data run `python -m datamodules.scenes` first): {reason}"
        ) from None


def _config(source: str | None, config: dict[str, Any] | None) -> PretrainedConfig:
    if source is not None:
        try:
            return AutoConfig.from_pretrained(configuration_of(source))
        except (OSError, ValueError) as error:
            raise UserError(f"no language model at '{source}': {str(error).splitlines()[0]}") from None
    assert config is not None
    keys = dict(config)
    kind = keys.pop("model_type", None)
    if kind is None:
        raise UserError("a bare language-model configuration needs 'model_type', such as qwen2 or llama.")
    try:
        return AutoConfig.for_model(kind, **keys)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        raise UserError(f"transformers knows no model type '{kind}': {nearest(kind, CONFIG_MAPPING.keys())}") from None

"""Language models of transformers: from a hub name, a local folder or a bare configuration, with their tokenizer."""

from __future__ import annotations

import json
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from lavi.config.types import Check
from lavi.errors import UserError, one_line
from lavi.language import fused_cross_entropy
from lavi.language.attention_widths import AttentionWidths
from lavi.language.compiled import DecodeCompiler
from lavi.language.context import DecoderInput, HeadAlone
from lavi.language.fused_cross_entropy import is_plain_linear
from lavi.language.lora import LoRA, add_lora, merged_state
from lavi.language.sequence import recurrent_layers, refuse_recurrent
from lavi.language.surgery import decoder_of
from lavi.language.token_scores import MOST_LOGITS, TokenScores, score_tokens
from lavi.loading.bare import bare_configuration
from lavi.loading.compressed import Quantization, as_ordinary, gguf_arguments, quantization_config
from lavi.loading.published import check_loaded, configuration_of
from lavi.loading.vlm import VLM_KINDS, is_vlm, language_model_of, open_vlm
from lavi.loading.without_weights import weights_wanted

NO_LANGUAGE_MODEL = "'{}' is no decoder-only language model: choose one such as qwen2 or llama."

NO_KERNEL = "'{}' has no attention kernel '{}': set language.attention=eager."

NOT_PACKED = ("biogpt", "gpt_oss")
"""Families that let the conversations of a row see each other, as the tests of packing have found.

BioGPT makes a mask of ones where it is given none, and gpt-oss makes its masks without looking at positions.
"""


def check_config(config: dict[str, Any]) -> None:
    """Of a bare configuration.

    Raises:
        UserError: no such model type, or a key or a value that it cannot have.
    """
    _config(None, config)


class LanguageModel(nn.Module):
    """A causal language model and its tokenizer. ``hf`` is the transformers model, under its original names.

    Args:
        source: hub name or local folder of a checkpoint: a language model, or a vision-language model that holds one.
        config: instead of ``source``, a bare configuration: ``model_type`` and its keys; weights start random.
            ``vocab_size`` defaults to the tokenizer's.
        gguf_file: the GGUF file in ``source``, tokenizer and all; its weights are opened to ``dtype`` (extra ``gguf``).
        tokenizer: hub name or folder of the tokenizer; with ``source``, that by default.
        dtype: of the weights.
        quantization: of the weights of a checkpoint's linear layers while it is loaded; they stay frozen. Flops are
            counted as without it.
        attention: the attention kernel, the same for every method that is to be compared.
        lora: put adapters into the decoder layers: keys of :class:`lavi.language.lora.LoRA` (``rank``, ``alpha``,
            ``dropout``, ``targets``); what trains of this part is then the adapters alone.
        compile: ``decode`` compiles the step that answers are made of (:mod:`lavi.language.compiled`): the first one
            takes half a minute; what is won behind it is most of all the time between operators.

    Raises:
        UserError: neither or both of ``source`` and ``config``; nothing there; no tokenizer, or one with more tokens
            than the model has; an unknown LoRA target; quantization of what is no checkpoint of a language model, or
            whose library is not there.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        config: Annotated[dict[str, Any], Check(check_config)] | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
        quantization: Quantization | None = None,
        lora: Annotated[dict[str, Any], Check(LoRA.of)] | None = None,
        compile: Literal["decode"] | None = None,
    ) -> None:
        super().__init__()
        self.compiled = None if compile is None else DecodeCompiler()
        if (source is None) == (config is None):
            raise UserError("a language model takes either 'source' (a checkpoint) or 'config' (a bare configuration).")
        if source is None and (gguf_file is not None or quantization is not None):
            raise UserError("gguf_file and quantization are of a checkpoint: name it as 'source'.")
        if quantization is not None and (gguf_file is not None or lora is not None):
            raise UserError("quantization goes neither with gguf_file nor with lora: leave one of them out.")
        adapters = None if lora is None else LoRA.of(lora)
        source = None if source is None else os.path.expanduser(source)
        name = tokenizer or source
        if name is None:
            raise UserError("a language model from a bare configuration needs 'tokenizer' (a folder or a hub name).")
        self._tokenizer = os.path.expanduser(name)
        self._tokenizer_file = gguf_file if tokenizer is None else None
        if config is not None and "vocab_size" not in config:
            config = {"vocab_size": len(self.tokenizer)} | config
        settings = _config(source, config, gguf_file)
        if weights_wanted() and self._tokenizer != source:
            self._check_vocabulary(settings)
        self.hf = _language_model(
            source,
            settings,
            dtype=getattr(torch, dtype),
            attention=attention,
            gguf_file=gguf_file,
            quantization=quantization,
        )
        refuse_recurrent(self.hf)
        if weights_wanted():
            self._stop_behind_answers()
        self.attention, self.quantization = attention, quantization
        added = add_lora(self.hf, self.layers, adapters) if adapters is not None else frozenset()
        self.adapters = frozenset(f"hf.{name}" for name in added)
        """Names of the adapters' parameters."""

    @classmethod
    def wrap(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
        """A causal language model of transformers that is there already, as it is, with its tokenizer.

        Raises:
            UserError: one with a recurrent state.
        """
        language = cls.__new__(cls)
        nn.Module.__init__(language)
        refuse_recurrent(hf)
        language.hf, language.tokenizer = hf, tokenizer  # type: ignore[misc]
        language.attention, language.adapters = hf.config._attn_implementation, frozenset()
        language.quantization = language.compiled = None
        return language

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loaded on first use: a model that is only counted needs none."""
        return _load_tokenizer(self._tokenizer, self._tokenizer_file)

    def _stop_behind_answers(self) -> None:
        """End generation at the token that the tokenizer's template ends answers with, beside the checkpoint's own.

        Base models such as Qwen2.5-0.5B come with a template for chats, and stop at the end of a document alone.
        """
        token, ends = _answer_end(self.tokenizer), self.hf.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if token is not None and token not in (*ends, self.tokenizer.eos_token_id):
            self.hf.generation_config.eos_token_id = [*ends, token]

    def _check_vocabulary(self, settings: PretrainedConfig) -> None:
        """Of a tokenizer that is not the checkpoint's own: that each token has an embedding.

        Raises:
            UserError: some have none.
        """
        tokens, embeddings = len(self.tokenizer), getattr(settings.get_text_config(), "vocab_size", None)
        if embeddings is not None and tokens > embeddings:
            raise UserError(
                f"the tokenizer at '{self._tokenizer}' has {tokens} tokens, and the language model has only vocab_size="
                f"{embeddings} embeddings: leave language.config.vocab_size out, or take the model's own tokenizer."
            )

    @property
    def width(self) -> int:
        """D."""
        return int(self.hf.config.hidden_size)

    def attention_widths(self, layer: int) -> AttentionWidths:
        """Of one decoder layer."""
        return AttentionWidths.of(self.hf.config, layer)

    @property
    def layers(self) -> nn.ModuleList:
        """The L decoder layers."""
        return decoder_of(self.hf)[1]

    @property
    def context_length(self) -> int:
        """The positions that the model has."""
        return int(self.hf.config.max_position_embeddings)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D) embeddings."""
        return self.hf.get_input_embeddings()(ids)

    def forward(self, inputs: DecoderInput) -> Tensor:
        """Logits (B, T, vocabulary) at the text tokens.

        Raises:
            UserError: rows of several conversations, for a decoder that would not keep them apart.
        """
        self._check_conversations(inputs)
        out = self.hf(**inputs.sequence(), position_ids=inputs.position_ids, vision=inputs.vision, use_cache=False)
        return out.logits

    def token_scores(self, inputs: DecoderInput, labels: Tensor, *, most_logits: int = MOST_LOGITS) -> TokenScores:
        """The scores of the trained tokens; ``labels`` (B, T) are those of the text.

        Raises:
            UserError: as :meth:`forward`.
        """
        chunk = max(1, most_logits // self.hf.config.vocab_size)
        hidden = self.hidden(inputs)
        linear = self._linear_head if fused_cross_entropy.runs_kernel(hidden) else None
        return score_tokens(linear or self.head, hidden, labels, chunk=chunk)

    def hidden(self, inputs: DecoderInput) -> Tensor:
        """(B, T, D): behind the final norm, at the text tokens; what :meth:`head` reads.

        Raises:
            UserError: as :meth:`forward`.
        """
        self._check_conversations(inputs)
        stack, _ = decoder_of(self.hf)
        given = inputs.sequence() | {"position_ids": inputs.position_ids}
        return stack(**given, vision=inputs.vision, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, D) to logits (n, vocabulary), scaled and capped as the family does it."""
        return self.hf(inputs_embeds=hidden[None], vision=HeadAlone(), use_cache=False).logits[0]

    @property
    def _linear_head(self) -> nn.Linear | None:
        """The head as a layer whose cross-entropy a kernel may take, where it is no more than that."""
        head = self.hf.get_output_embeddings()
        return head if is_plain_linear(head) and self._logits_are_the_layers else None

    @cached_property
    def _logits_are_the_layers(self) -> bool:
        """Whether the family neither scales nor caps what its output layer gives."""
        layer = self.hf.get_output_embeddings()
        far = torch.linspace(-100, 100, self.width).to(layer.weight)[None]  # (1, D): where a cap would show
        with torch.no_grad():
            return torch.equal(self.head(far), layer(far))

    def _check_conversations(self, inputs: DecoderInput) -> None:
        """Of rows that hold several: that the decoder keeps them apart.

        Raises:
            UserError: it would not.
        """
        if inputs.conversation is not None and not self._masks_by_position:
            raise UserError(
                f"'{self.hf.config.model_type}' with attention '{self.attention}' would let the conversations of a row "
                "see each other: set data.packing=null, or language.attention=sdpa if it has no recurrent layers."
            )

    @property
    def _masks_by_position(self) -> bool:
        """Whether its masks are transformers' own, which keep apart what begins at position 0 anew.

        Not with flash attention: there that is looked for in batches of one row alone.
        """
        if self.attention == "flash_attention_2" or recurrent_layers(self.hf):
            return False
        if self.hf.config.model_type in NOT_PACKED:
            return False
        rooms = (sys.modules[kind.__module__] for kind in type(self.hf).__mro__)
        return any(hasattr(room, "create_causal_mask") for room in rooms)

    def merged_state(self) -> dict[str, Tensor]:
        """Its weights under the names of its class, adapters merged.

        Raises:
            UserError: they are quantized.
        """
        if self.quantization is not None:
            raise UserError(
                f"weights in {self.quantization} are no ordinary checkpoint: load the language model without "
                "quantization to write it."
            )
        return merged_state(self.hf, frozenset(name.removeprefix("hf.") for name in self.adapters))

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary transformers checkpoint, tokenizer and all: original names and class, adapters merged.

        Raises:
            UserError: its weights are quantized.
        """
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(self.hf.config, attn_implementation=self.attention)
        plain.load_state_dict(self.merged_state(), assign=True)
        plain.generation_config = self.hf.generation_config
        if hasattr(self.hf, "_weight_conversions"):  # how transformers renamed a checkpoint's keys as it read them
            plain._weight_conversions = self.hf._weight_conversions
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _load_tokenizer(name: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **({} if gguf_file is None else {"gguf_file": gguf_file}))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _template_beside(name)
        return tokenizer
    except Exception as error:
        readers = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
        lacking = [package for package, there in readers.items() if not there]
        if lacking and _file_beside(name, "tokenizer.model") and not _file_beside(name, "tokenizer.json"):
            raise UserError(
                f"the tokenizer at '{name}' is a tokenizer.model without a tokenizer.json, which transformers reads "
                f"by other packages: pip install {' '.join(lacking)}."
            ) from error
        raise UserError(
            f"no tokenizer at '{name}' (for the built-in data run `python -m datamodules.scenes` first): "
            f"{one_line(error)}."
        ) from error


def _answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token that a tokenizer's own template ends an answer with; None: none, or it has no template."""
    turns = [{"role": "user", "content": "1729"}, {"role": "assistant", "content": "1729"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template is a program from elsewhere, and may take no such conversation
        return None
    _, words, behind = text.rpartition("1729")
    ids = tokenizer(behind.strip(), add_special_tokens=False)["input_ids"] if words else []
    token = tokenizer.added_tokens_decoder.get(ids[-1]) if ids else None
    return ids[-1] if token is not None and token.special else None


def _template_beside(name: str) -> str | None:
    """The chat template in the file that a vision-language model of 2024 has for its processor; None: it has none."""
    file = _file_beside(name, "chat_template.json")
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]


def _file_beside(name: str, file: str) -> str | None:
    """A file of a folder or a hub name; None: it has none, or cannot be reached, or there is no such thing."""
    if Path(name).is_dir():
        return str(Path(name) / file) if (Path(name) / file).is_file() else None
    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    try:
        path: str | None = cached_file(name, file, **missing)
    except OSError:  # it is neither a folder nor a name that a hub could have
        return None
    return path


def _config(source: str | None, config: dict[str, Any] | None, gguf_file: str | None = None) -> PretrainedConfig:
    if source is not None:
        try:
            return AutoConfig.from_pretrained(configuration_of(source), gguf_file=gguf_file)
        except Exception as error:
            raise UserError(f"no language model at '{source}': {one_line(error)}.") from error
    assert config is not None
    kind = config.get("model_type")
    if kind is None:
        raise UserError("a bare language-model configuration needs 'model_type', such as qwen2 or llama.")
    if kind in list(CONFIG_MAPPING) and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(NO_LANGUAGE_MODEL.format(kind))
    return bare_configuration(config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, what="language model")


def _language_model(
    source: str | None,
    settings: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    gguf_file: str | None,
    quantization: Quantization | None,
) -> Any:
    """The model of a checkpoint, or of a configuration where there is none or its weights are not wanted.

    Raises:
        UserError: transformers cannot build it, or weights are missing.
    """
    if is_vlm(settings):
        if quantization is not None or gguf_file is not None:
            raise UserError(
                f"'{source}' is a vision-language model: quantization and gguf_file take a language model's checkpoint."
            )
        return language_model_of(open_vlm(str(source)), dtype=dtype, attention=attention)
    if attention == "sdpa" and getattr(settings, "attn_logit_softcapping", None):
        # Its scores are capped, which sdpa does not do: newer versions of transformers say so, older ones leave it out.
        raise UserError(NO_KERNEL.format(settings.model_type, attention))
    kwargs: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    origin = "a bare configuration" if source is None else f"'{source}'"
    loading_info: dict[str, Any] | None = None
    try:
        if source is None or not weights_wanted():
            model = AutoModelForCausalLM.from_config(settings, **kwargs)
        else:
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            if gguf_file is not None:
                kwargs |= gguf_arguments(gguf_file)
            if quantization is not None:
                kwargs["quantization_config"] = quantization_config(quantization, dtype)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, config=settings, **kwargs)
            model, loading_info = loaded
    except UserError:
        raise
    except Exception as error:
        kind, reason = settings.model_type, one_line(error)
        if "attention implementation" in reason:
            raise UserError(NO_KERNEL.format(kind, attention)) from error
        if "Unrecognized configuration class" in reason:
            raise UserError(NO_LANGUAGE_MODEL.format(kind)) from error
        raise UserError(f"no '{kind}' language model can be built from {origin}: {reason}.") from error
    if not hasattr(model.config, "hidden_size"):
        raise UserError(
            f"{origin} is a '{settings.model_type}', which holds a language model inside another one, and is none of "
            f"those that are taken apart here ({', '.join(VLM_KINDS)}): name a checkpoint of its text model alone."
        )
    if loading_info is not None:
        check_loaded(loading_info, str(source), f"'{settings.model_type}' language model")
    if gguf_file is not None:
        as_ordinary(model)
    return model

"""The arguments of ``generate``, checked before the language model runs; what is refused, is so in one sentence.

How tokens are chosen is transformers' own, and so are the names. Refused is what would read the prompt without its
images, what transformers itself no longer has, and what does not go with the prompt or the fusion at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    TextStreamer,
)

from lavi.errors import UserError, nearest

DEFAULTS = {"max_new_tokens": 32, "num_beams": 1, "num_return_sequences": 1, "do_sample": False, "use_cache": True}
"""The likeliest answer, of at most 32 tokens."""

UNLESS_NAMED: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}
"""What a checkpoint's own generation settings must not change where nobody asked for it.

Qwen2-Instruct penalizes repetition, and with it the words of the question: its answers would not be the likeliest ones.
How much is drawn from (``temperature``, ``top_p``, ``top_k``) stays the checkpoint's, and matters with ``do_sample``.
"""

COUNTS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "prefill_chunk_size": 1,
    "prompt_lookup_num_tokens": 1,
}
"""Whole numbers, and the least that each may be."""

BESIDE = frozenset(
    {
        "logits_processor",
        "past_key_values",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "synced_gpus",
        "tokenizer",
    }
)
"""What transformers' ``generate`` takes that is not in a ``GenerationConfig``, and handed on to it."""

NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "min_length": 0,
    "num_beam_groups": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "penalty_alpha": 0,
    "token_healing": False,
}
"""Values that ask for nothing, of arguments that may be refused."""

REFUSED = {
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "assistant_early_exit", "speculation_type", "use_mtp"),
        "drafts answers without seeing the images: set prompt_lookup_num_tokens instead",
    ),
    **dict.fromkeys(
        ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask", "token_healing"),
        "runs the language model a second time, without the images: leave it out",
    ),
    **dict.fromkeys(
        ("constraints", "diversity_penalty", "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha"),
        "asks for a way of decoding that transformers no longer has: set num_beams or do_sample instead",
    ),
    **dict.fromkeys(
        ("custom_generate", "continuous_batching_config", "is_assistant"),
        "asks for another loop than this one, which knows nothing of the images: leave it out",
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states"),
        "asks for what the layers do, which is not recorded of a decoder that images enter: set output_logits instead",
    ),
    "max_length": "counts the prompt, which is as long as the fusion makes it: set max_new_tokens instead",
    "min_length": "counts the prompt, which is as long as the fusion makes it: set min_new_tokens instead",
}

DRAFTS_BEHIND_EMBEDDINGS = Version(transformers.__version__) >= Version("5.18")

OF_THE_CACHE = ("cache_implementation", "cache_config", "max_cache_len", "past_key_values")

OF_THE_IDS = ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "prefill_chunk_size")
"""What takes the ids of a prompt for all of it."""


class TextRepetitionPenalty(LogitsProcessor):  # type: ignore[misc]
    """transformers' repetition penalty, of the words of the prompt and the answer; padding is neither.

    Args:
        starts: the column at which the text of each row begins.
        prompt: (B, T) the ids of a prompt that is read as embeddings alone; None: transformers has them.
    """

    def __init__(self, penalty: float, starts: Sequence[int], prompt: Tensor | None = None) -> None:
        self.plain, self.starts, self.prompt = RepetitionPenaltyLogitsProcessor(penalty), starts, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt is not None:
            copies = len(input_ids) // len(self.prompt)
            input_ids = torch.cat([self.prompt.repeat_interleave(copies, dim=0).to(input_ids), input_ids], dim=1)
        starts = torch.tensor(self.starts, device="cpu").to(input_ids.device)[:, None]  # (B, 1)
        is_padding = torch.arange(input_ids.shape[1], device=input_ids.device) < starts  # (B, T)
        words = torch.where(is_padding, input_ids.gather(1, starts), input_ids)  # (B, T): a word of the prompt instead
        penalized: Tensor = self.plain(words, scores)
        return penalized


@dataclass(frozen=True)
class Decoding:
    """The arguments of one call, as transformers names them, with the defaults of what it leaves out."""

    settings: dict[str, Any]

    @classmethod
    def read(cls, arguments: Mapping[str, Any], *, ends: Sequence[int], pad: int) -> Decoding:
        """Check names and values.

        Args:
            arguments: by name; a ``generation_config`` among them says what the others leave open.
            ends: the tokens that end an answer, if no argument says.
            pad: the token behind the end of an answer, likewise.

        Raises:
            UserError: an argument that there is not, that is refused, or whose value is.
        """
        config = arguments.get("generation_config")
        if not isinstance(config, GenerationConfig | None):
            raise UserError(f"generation_config must be a transformers.GenerationConfig, not {type(config).__name__}.")
        named = ({} if config is None else _public(config)) | {n: v for n, v in arguments.items() if v is not None}
        named = {n: v for n, v in named.items() if n != "generation_config" and not _asks_for_nothing(n, v)}
        settings: dict[str, Any] = DEFAULTS | {"eos_token_id": ends, "pad_token_id": pad} | named
        if "eos_token_id" in arguments and arguments["eos_token_id"] is None:
            settings["eos_token_id"] = ()
        settings["eos_token_id"] = _listed(settings["eos_token_id"])
        _check_names(settings)
        _check_values(settings)
        return cls(settings)

    def for_transformers(self, starts: Sequence[int], prompt: Tensor | None) -> dict[str, Any]:
        """The settings as its ``generate`` takes them.

        Args:
            starts: the column at which the text of each row begins, behind its padding.
            prompt: (B, T) ids that transformers is not given; None: it is given them.
        """
        ends = self.settings["eos_token_id"]
        # With no list at all it would not pad a row that stops for another reason; beam search takes no empty one.
        settings = (
            UNLESS_NAMED | self.settings | {"eos_token_id": ends or (None if self.settings["num_beams"] > 1 else [])}
        )
        penalty = settings["repetition_penalty"]
        if penalty not in (None, 1):  # transformers takes the padding from the mask, which has the visual tokens, too
            settings["repetition_penalty"] = 1.0
            of_copies = [start for start in starts for _ in range(self.copies)]
            own = TextRepetitionPenalty(float(penalty), of_copies, prompt)
            settings["logits_processor"] = LogitsProcessorList([own, *(settings.get("logits_processor") or ())])
        return settings

    @property
    def copies(self) -> int:
        """Rows of the decoder for each row of the prompt, side by side."""
        return max(self.settings["num_beams"], self.settings["num_return_sequences"])

    @property
    def may_compile(self) -> bool:
        """Whether one compiled step can serve: a token at a time, on a cache that nobody named and nobody keeps."""
        named = [*OF_THE_CACHE, "prompt_lookup_num_tokens", "prefill_chunk_size", "return_dict_in_generate"]
        one_beam = self.settings["num_beams"] == 1  # transformers does not compile more, and reorders their cache
        return one_beam and bool(self.settings["use_cache"]) and not any(self.settings.get(name) for name in named)

    def check_rows(self, rows: int, *, room: int) -> None:
        """Refuse what does not go with a batch.

        Args:
            room: for tokens of an answer, behind the longest prompt.

        Raises:
            UserError: more rows than a drafting or a streaming can take, or an answer that may outgrow the positions.
        """
        for name, value in (
            ("prompt_lookup_num_tokens", self.settings.get("prompt_lookup_num_tokens")),
            ("a TextStreamer", isinstance(self.settings.get("streamer"), TextStreamer)),
        ):
            if value and rows * self.copies > 1:
                raise UserError(
                    f"{name} serves one answer at a time, and {rows * self.copies} grow here: pass a batch of one row, "
                    "with num_beams=1 and num_return_sequences=1."
                )
        tokens = self.settings["max_new_tokens"]
        if room < 1:
            raise UserError("the prompt alone fills the positions of the language model: ask with less text or images.")
        if tokens > room:
            raise UserError(
                f"max_new_tokens={tokens} would lead beyond the positions of the language model: behind this prompt "
                f"there is room for {room}; set max_new_tokens to at most that."
            )

    def check_fusion(self, fusion: str, *, own_cache: bool, ids_alone: bool, device: str) -> None:
        """Refuse what does not go with the sequence that a fusion arranged.

        Args:
            own_cache: its layers keep what no other cache can hold.
            ids_alone: the sequence is the text's ids and nothing between them.
            device: that the language model is on.

        Raises:
            UserError: a cache that cannot serve, or what needs a prompt of ids.
        """
        cache, kind = self.settings.get("past_key_values"), self.settings.get("cache_implementation", "dynamic")
        chosen = [name for name in OF_THE_CACHE if self.settings.get(name, "dynamic") != "dynamic"]
        if own_cache and chosen:
            raise UserError(f"{fusion} keeps what its layers read in a cache of its own: leave out {chosen[0]}.")
        if kind == "paged":
            raise UserError("cache_implementation=paged would read the prompt without its images: leave it out.")
        if kind.startswith("offloaded") and device == "cpu":
            raise UserError(f"cache_implementation={kind} needs a GPU, and the model is on the CPU: leave it out.")
        if isinstance(cache, StaticCache):
            raise UserError(
                "past_key_values is a StaticCache, which may be too small: set cache_implementation=static instead, "
                "which makes one that fits."
            )
        if isinstance(cache, Cache) and cache.get_seq_length():
            raise UserError(
                f"past_key_values holds {cache.get_seq_length()} tokens already, and each prompt is read from its "
                "start: pass an empty cache, or none."
            )
        if "prompt_lookup_num_tokens" in self.settings and not ids_alone and not DRAFTS_BEHIND_EMBEDDINGS:
            raise UserError(
                f"{fusion} puts visual tokens into the sequence, behind which transformers before 5.18 loses drafts: "
                "leave prompt_lookup_num_tokens out, or take a newer one."
            )
        for name in OF_THE_IDS:
            if name in self.settings and not ids_alone:
                raise UserError(
                    f"{fusion} puts visual tokens into the sequence, and {name} works on text alone: leave it out."
                )

    def cut(self, new: Tensor) -> list[list[int]]:
        """The ids of each answer, of (answers, tokens) behind the prompt: without its end token and padding."""
        return [self._cut(row) for row in new.tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        end = next((column for column, token in enumerate(ids) if token in self.settings["eos_token_id"]), len(ids))
        ids = ids[:end]
        if "stop_strings" in self.settings or "stopping_criteria" in self.settings:  # it may have stopped without one
            padding = (self.settings["pad_token_id"], -1)  # beams that no token ends are padded with -1
            while ids and ids[-1] in padding:
                ids.pop()
        return ids


def _public(config: GenerationConfig) -> dict[str, Any]:
    """What a configuration says, by name."""
    return {name: v for name, v in vars(config).items() if not name.startswith("_") and name != "transformers_version"}


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value is None or (name in NEUTRAL and value == NEUTRAL[name])


def _listed(ids: Any) -> list[int]:
    """One id, or any sequence of them."""
    return [int(ids)] if isinstance(ids, Integral) else [int(token) for token in ids]


def _check_names(settings: Mapping[str, Any]) -> None:
    known = BESIDE | set(_public(GenerationConfig())) - set(REFUSED)
    for name in settings:
        if name in REFUSED:
            raise UserError(f"{name} {REFUSED[name]}.")
        if name not in known:
            raise UserError(f"generate takes no argument '{name}': {nearest(name, known)}")


def _check_values(settings: Mapping[str, Any]) -> None:
    for name, least in COUNTS.items():
        value = settings.get(name, least)
        if not isinstance(value, Integral) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}.")
    penalty = settings.get("repetition_penalty", 1.0)
    if not isinstance(penalty, int | float) or penalty <= 0:
        raise UserError(f"repetition_penalty must be a number above 0, not {penalty!r}.")
    if settings.get("min_new_tokens", 0) > settings["max_new_tokens"]:
        raise UserError(
            f"an answer of at least min_new_tokens={settings['min_new_tokens']} tokens cannot have at most "
            f"max_new_tokens={settings['max_new_tokens']}: raise the one or lower the other."
        )
    config = GenerationConfig()
    for name in settings.keys() & _public(config).keys():
        setattr(config, name, settings[name])
    with refusals_of_transformers():
        config.validate(strict=True)


@contextmanager
def refusals_of_transformers() -> Iterator[None]:
    """What transformers refuses of the arguments of ``generate`` becomes one sentence; all other errors go through.

    Raises:
        UserError: it refused.
    """
    try:
        yield
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        if not _raised_by_generation(error):
            raise
        raise UserError(f"generate: {_one_sentence(str(error))}") from error


def _raised_by_generation(error: BaseException) -> bool:
    """Whether the line that raised is one of transformers' generation or caches, and not of a model or a callback."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__")).startswith(
        ("transformers.generation", "transformers.cache_utils")
    )


def _one_sentence(text: str) -> str:
    """The first paragraph of a message, or the first of its list of points, as one sentence."""
    lines = [line.strip() for line in text.strip().splitlines()]
    points = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    joined = re.sub(r"\.\s+(\w)", lambda match: f"; {match[1].lower()}", (points or lines)[0])
    return joined.rstrip(".:") + "."

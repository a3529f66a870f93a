"""VisionLanguageModel: vision -> reducer -> fusion -> language; forward and generate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lavi.arguments import Check, Count
from lavi.batch import Batch
from lavi.chat import Chat, check_template
from lavi.configurations import weights_wanted
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.language.context import VisualContext
from lavi.language.load import LanguageModel
from lavi.processor import Processor
from lavi.reduction.base import Reducer
from lavi.vision.base import VisionBackbone
from lavi.vision.tiles import OneView, Tiling


class VisionLanguageModel(nn.Module):
    """A vision backbone and a language model, brought together by a fusion.

    Args:
        vision: pixels (views, C, H, W) to features (views, N, Dv).
        language: the language model and its tokenizer.
        fusion: how they meet; bound here.
        reducer: makes fewer visual tokens of a view's before they meet; None: all of them.
        tiling: how an image becomes views; by default one view an image.
        chat_template: a named template, or None for the tokenizer's own.
        context_length: the most tokens of a conversation; by default, and at most, the language model's positions.
        timestamps: the model is told how long a video is and when its frames are shown.
    """

    def __init__(
        self,
        *,
        vision: VisionBackbone,
        language: LanguageModel,
        fusion: Fusion,
        reducer: Reducer | None = None,
        tiling: Tiling | None = None,
        chat_template: Annotated[str, Check(check_template)] | None = None,
        context_length: Count | None = None,
        timestamps: bool = False,
    ) -> None:
        super().__init__()
        self.vision, self.reducer, self.language, self.fusion = vision, reducer, language, fusion
        self.seen = reducer.bind(vision) if reducer is not None else vision.seen
        fusion.bind(language, self.seen)
        self.tiling = tiling or OneView()
        self.context_length = min(context_length or language.context_length, language.context_length)
        self._template, self.timestamps = chat_template, timestamps
        if weights_wanted():  # else it is only counted or timed, and its tokenizer need not be at hand
            _ = self.chat

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer and its template."""
        return Chat(self.language.tokenizer, self._template)

    @cached_property
    def processor(self) -> Processor:
        """What a data module needs: samples to batches."""
        return Processor(
            chat=self.chat,
            vision=self.vision,
            tiling=self.tiling,
            tokens_of=partial(self.fusion.tokens_in_language, per_view=self.seen.tokens),
            context_length=self.context_length,
            timestamps=self.timestamps,
        )

    def features(self, pixels: Tensor) -> Tensor:
        """(views, C, H, W) to (views, N, Dv), reduced; of a frozen tower, without a graph."""
        if len(pixels):
            trained = any(parameter.requires_grad for parameter in self.vision.parameters())
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                features = self.vision(pixels)
        else:
            features = pixels.new_zeros(0, self.vision.tokens, self.vision.width)
        return features if self.reducer is None else self.reducer(features)

    def forward(self, batch: Batch, losses: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, T, vocabulary) at the text tokens, whatever the fusion put between them.

        Args:
            losses: takes what the fusion adds to the loss, by name.

        Raises:
            UserError: rows of several conversations, and a fusion that would not keep them apart.
        """
        if batch.packed is not None and not self.fusion.packs:
            raise UserError(
                f"{type(self.fusion).__name__} reads rows of one conversation each: set data.packing=null "
                "(concatenation, LaVi and cross-attention read packed rows)."
            )
        inputs = self.fusion(batch, self.features(batch.pixels), self.language)
        logits = self.language(inputs)
        if losses is not None:
            losses |= inputs.vision.losses()
        return logits

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int = 32, num_beams: int = 1, **decoding: Any
    ) -> list[list[int]]:
        """Continue each row of a left-padded batch; the ids of each answer, without its end token and padding.

        Args:
            decoding: what transformers' ``generate`` takes besides: ``streamer``, ``do_sample``, ``temperature`` ...
        """
        inputs = self.fusion(batch, self.features(batch.pixels), self.language)
        settings: dict[str, Any] = {
            "eos_token_id": self.end_ids(),
            "pad_token_id": self.chat.pad_id,
            "do_sample": False,
        }
        settings |= {"max_new_tokens": max_new_tokens, "num_beams": num_beams} | decoding
        vision = inputs.vision.for_generation(num_beams)
        out: Any = self.language.hf.generate(**inputs.sequence(), vision=vision, **settings)  # type: ignore[misc]
        prompt = inputs.input_ids.shape[1] if inputs.input_ids is not None else 0  # embeddings are not given back
        return [_until(row, settings["eos_token_id"] or ()) for row in out[:, prompt:].tolist()]

    def prefill(self, batch: Batch, features: Tensor) -> tuple[Any, VisualContext]:
        """From features to the first token: the decoder's output (last-token logits, cache), and the context."""
        inputs = self.fusion(batch, features, self.language)
        vision = inputs.vision.for_generation(beams=1)
        out = self.language.hf(
            **inputs.sequence(), position_ids=inputs.position_ids, vision=vision, use_cache=True, logits_to_keep=1
        )
        return out, vision

    def answer(self, batch: Batch, **decoding: Any) -> list[str]:
        """:meth:`generate`, as text."""
        return [self.chat.decode(ids) for ids in self.generate(batch, **decoding)]

    def end_ids(self) -> list[int]:
        """The ids that end an answer."""
        end = self.language.hf.generation_config.eos_token_id
        own = self.language.tokenizer.eos_token_id
        ids = {own} if own is not None else set()
        return sorted(ids | set(end if isinstance(end, list) else [end] if end is not None else []))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model as a folder; its layout is at the head of ``lavi/pretrained.py``."""
        from lavi import pretrained

        pretrained.save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust: bool = False) -> VisionLanguageModel:
        """The model of such a folder, ready to answer; with ``trust``, whatever its recipe names is built."""
        from lavi import pretrained

        return pretrained.from_pretrained(Path(folder), trust=trust)


def _until(ids: Sequence[int], end: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    for at, token in enumerate(ids):
        if token in end:
            return list(ids[:at])
    return list(ids)

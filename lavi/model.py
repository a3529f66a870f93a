"""VisionLanguageModel: vision -> reducer -> fusion -> language; forward and generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from lavi.batch import Batch, Layout, Sample, Visual, VisualState, grids_of_views, question_about
from lavi.config.types import Check, Count
from lavi.data.chat import Chat, check_template
from lavi.data.images import upright
from lavi.data.processor import Processor
from lavi.data.tiling import OneView, Tiling
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.language.compiled import refusals_of_the_compiler
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.decoding import Decoding, refusals_of_transformers
from lavi.language.load import LanguageModel
from lavi.language.sequence import refuse_other_sequence, refuse_own_cache
from lavi.language.token_scores import TokenScores
from lavi.loading.without_weights import weights_wanted
from lavi.reduction.base import Reducer
from lavi.vision.base import VisionBackbone

Messages = list[dict[str, Any]]
"""Of one conversation, as :class:`lavi.batch.Sample` has them."""

LONGEST_ANSWER = 64
"""Tokens of an answer to :meth:`VisionLanguageModel.ask`, unless the call says otherwise."""


class VisionLanguageModel(nn.Module):
    """A vision backbone and a language model, brought together by a fusion.

    Args:
        vision: pixels (views, C, H, W) to features (views, N, Dv).
        language: the language model and its tokenizer.
        fusion: how they meet; bound here.
        reducer: makes fewer visual tokens of a view's before they meet; None: all of them.
        tiling: how an image becomes views; by default one view an image.
        chat_template: a named template, or None for the tokenizer's own.
        media_tokens: what the tokenizer's own template writes where an ``image`` or a ``video`` stands, where it writes
            a token (:class:`lavi.data.chat.Chat`): that of a published vision-language model.
        context_length: the most tokens of a conversation; by default, and at most, the language model's positions.
        timestamps: the model is told how long a video is and when its frames are shown.
        image_numbers: the model is told before each of several images which it is.
        built_from: the section of a recipe that names these parts, for a copy in a folder
            (:mod:`lavi.checkpoints.model_folder`); None for a model that was put together by hand.
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
        media_tokens: dict[str, str] | None = None,
        context_length: Count | None = None,
        timestamps: bool = False,
        image_numbers: bool = False,
        built_from: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.built_from = built_from
        check_native_resolution(vision, tiling, reducer, fusion)
        if language.compiled is not None and fusion.own_cache:
            raise UserError(
                f"{type(fusion).__name__} keeps what its layers read in a cache of its own, which cannot be compiled: "
                "set model.language.compile=null."
            )
        self.vision, self.reducer, self.language, self.fusion = vision, reducer, language, fusion
        self.feature_spec = reducer.bind(vision) if reducer is not None else vision.feature_spec
        if vision.question_width not in (None, language.width):
            raise UserError(
                f"{type(vision).__name__} reads questions of width {vision.question_width}, and this language model's "
                f"have {language.width}: it was trained with another one."
            )
        if not fusion.keeps_sequence:
            refuse_other_sequence(language.hf, type(fusion).__name__)
        if fusion.own_cache:
            refuse_own_cache(language.hf, type(fusion).__name__)
        fusion.bind(language, self.feature_spec)
        self.tiling = tiling or OneView()
        self.context_length = min(context_length or language.context_length, language.context_length)
        self._template, self.media_tokens = chat_template, media_tokens
        self.timestamps, self.image_numbers = timestamps, image_numbers
        if weights_wanted():  # else it is only counted or timed, and its tokenizer need not be at hand
            _ = self.chat

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer and its template."""
        return Chat(self.language.tokenizer, self._template, media_tokens=self.media_tokens)

    @cached_property
    def processor(self) -> Processor:
        """What a data module needs: samples to batches."""
        return Processor(
            chat=self.chat,
            preprocessing=self.vision.preprocessing,
            tiling=self.tiling,
            count_visual_tokens=partial(self.fusion.token_counter, per_view=self.feature_spec.tokens),
            context_length=self.context_length,
            timestamps=self.timestamps,
            image_numbers=self.image_numbers,
        )

    def encode(
        self, pixels: Tensor, layouts: Sequence[Layout], questions: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """(views, C, H, W) of images of these layouts, one after the other, through the backbone alone.

        Args:
            questions: (T, D) of each image, for a backbone that reads them; None: not known.
        """
        if self.vision.reads_questions:
            features: Tensor = self.vision(pixels, layouts, questions)
        elif self.vision.reads_layouts:
            features = self.vision(pixels, layouts)
        elif self.vision.native_resolution:
            features = self.vision(pixels, grids_of_views(layouts))
        else:
            features = self.vision(pixels)
        return features

    def features(
        self,
        pixels: Tensor,
        layouts: Sequence[Layout] = (),
        questions: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """(views, C, H, W) to (views, N, Dv), reduced; of a frozen tower, without a graph.

        Args:
            layouts: of each image in turn; none: each view is an image of its own.
            questions: as in :meth:`encode`.
        """
        return self._reduced(self._backbone_features(pixels, layouts, questions))

    def _backbone_features(
        self, pixels: Tensor, layouts: Sequence[Layout], questions: Sequence[Tensor | None] | None
    ) -> Tensor:
        if not len(pixels):
            return pixels.new_zeros(0, self.vision.tokens, self.vision.width)
        trained = any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.encode(pixels, layouts, questions)

    def _reduced(self, features: Tensor) -> Tensor:
        return features if self.reducer is None else cast(Tensor, self.reducer(features))

    def features_of(self, batch: Batch) -> Tensor:
        """(views, N, Dv), reduced: what a batch brings with it, or else :meth:`features` of its pixels."""
        return batch.features if batch.features is not None else self._reduced(self.backbone_features_of(batch))

    def backbone_features_of(self, batch: Batch) -> Tensor:
        """(views, N, Dv), not reduced yet: what a batch brings with it, or else the backbone's of its pixels."""
        if batch.backbone_features is not None:
            return batch.backbone_features.float()
        questions = self._questions(batch) if self.vision.reads_questions else None
        return self._backbone_features(batch.pixels, batch.layouts, questions)

    def with_backbone_features(self, batch: Batch) -> Batch:
        """A batch that brings what :meth:`backbone_features_of` gives of it."""
        return replace(batch, backbone_features=self.backbone_features_of(batch))

    @torch.no_grad()
    def _questions(self, batch: Batch) -> list[Tensor | None]:
        """Of each image the embeddings (T, D) of what is asked about it."""
        asked = [(slot.row, *batch.asked_columns(slot)) for slot in batch.image_slots]
        return [self.language.embed(batch.input_ids[row, start:stop]) for row, start, stop in asked]

    def forward(self, batch: Batch, losses: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, T, vocabulary) at the text tokens, whatever the fusion put between them.

        Args:
            losses: takes what the fusion adds to the loss, by name.

        Raises:
            UserError: rows of several conversations, and a fusion that would not keep them apart.
        """
        inputs = self._arranged(batch)
        logits = self.language(inputs)
        if losses is not None:
            losses |= inputs.vision.losses()
        return logits

    def token_scores(self, batch: Batch, losses: dict[str, Tensor] | None = None) -> TokenScores:
        """How likely the trained tokens are, without the logits of the others.

        Args:
            losses: as in :meth:`forward`.

        Raises:
            UserError: as :meth:`forward`.
        """
        inputs = self._arranged(batch)
        scores = self.language.token_scores(inputs, batch.labels)
        if losses is not None:
            losses |= inputs.vision.losses()
        return scores

    def _arranged(self, batch: Batch) -> DecoderInput:
        if batch.packed is not None and not self.fusion.packs:
            raise UserError(
                f"{type(self.fusion).__name__} reads rows of one conversation each: set data.packing=null "
                "(concatenation, LaVi and cross-attention are among those that read packed rows)."
            )
        return self.fusion(batch, self.features_of(batch), self.language)

    @torch.no_grad()
    def generate(self, batch: Batch, **decoding: Any) -> list[list[int]] | ModelOutput:
        """Continue each row of a left-padded batch.

        Args:
            decoding: what transformers' ``generate`` takes, under its names: ``max_new_tokens`` (by default 32),
                ``num_beams``, ``num_return_sequences`` (1), ``do_sample`` (False), ``streamer``, ``generation_config``.

        Returns:
            The ids of each answer, without its end token and padding; those of one row stand side by side. With
            ``return_dict_in_generate`` transformers' own output instead, whose ``sequences`` hold the new tokens alone.

        Raises:
            UserError: what :mod:`lavi.language.decoding` refuses, or a batch that is no left-padded prompt.
        """
        if batch.packed is not None or any(stop != batch.input_ids.shape[1] for _, stop in batch.spans):
            raise UserError("only prompts that end together can be continued: collate them with pad_left=True.")
        plan = self._read_decoding(decoding)
        plan.check_rows(len(batch), room=self.room_behind(max(self._lengths(batch))))
        inputs = self.fusion(batch, self.features_of(batch), self.language)
        hf, vision = self.language.hf, inputs.vision.for_generation(plan.copies)
        cache = vision.new_cache(hf.config)
        plan.check_fusion(
            type(self.fusion).__name__,
            own_cache=cache is not None,
            ids_alone=inputs.input_ids is not None,
            device=hf.device.type,
        )
        # Stop strings and streamers read ids, beside embeddings, too; prompt lookup would add drafts to them at once.
        sequence = inputs.sequence()
        if "prompt_lookup_num_tokens" not in plan.settings:
            sequence["input_ids"] = batch.input_ids
        ids = None if "input_ids" in sequence else batch.input_ids
        settings = plan.for_transformers([start for start, _ in batch.spans], ids)
        if inputs.input_ids is None:  # embeddings are read once
            settings["use_cache"] = True
        if cache is not None and settings["use_cache"]:
            settings |= {"past_key_values": cache, "cache_implementation": None}
        compiled = self.language.compiled
        if compiled is not None and cache is None and plan.may_compile and compiled.serves(hf):
            columns = inputs.attention_mask.shape[1] + settings["max_new_tokens"]
            settings |= compiled.settings(hf, rows=len(batch) * plan.copies, columns=columns)
        if settings["stop_strings"]:
            settings.setdefault("tokenizer", self.chat.tokenizer)
        with refusals_of_transformers(), refusals_of_the_compiler(type(hf).__name__):
            out: Any = hf.generate(**sequence, vision=vision, **settings)  # type: ignore[misc]
        prompt = sequence["input_ids"].shape[1] if "input_ids" in sequence else 0
        if isinstance(out, ModelOutput):
            out["sequences"] = out["sequences"][:, prompt:]
            return out
        return plan.cut(out[:, prompt:])

    def room_behind(self, length: int) -> int:
        """How many tokens an answer may have behind a prompt of so many; the last of them is never read."""
        return self.language.context_length - length + 1

    def _lengths(self, batch: Batch) -> list[int]:
        """Tokens of each row in the language model's sequence, the visual ones among them."""
        lengths = batch.text_lengths
        for slot in batch.image_slots:
            lengths[slot.row] += self.processor.count_visual_tokens(slot.layout)
        return lengths

    def prefill(self, batch: Batch, features: Tensor, cache: Cache | None = None) -> tuple[Any, VisualContext]:
        """From features to the first token: the decoder's output (last-token logits, cache), and the context of the
        tokens behind it.

        Args:
            cache: an empty one; None: one of its own.
        """
        inputs = self.fusion(batch, features, self.language)
        vision = inputs.vision.for_generation(copies=1)
        out = self.language.hf(
            **inputs.sequence(),
            position_ids=inputs.position_ids,
            past_key_values=cache,
            vision=vision,
            use_cache=True,
            logits_to_keep=1,
        )
        return out, vision.behind_prompt()

    def answer(self, batch: Batch, **decoding: Any) -> list[str]:
        """:meth:`generate`, as text.

        Raises:
            UserError: also for ``return_dict_in_generate``, which text has no room for.
        """
        if self._read_decoding(decoding).settings.get("return_dict_in_generate"):
            raise UserError("answer gives text alone: call generate for what return_dict_in_generate gives besides.")
        answers = cast(list[list[int]], self.generate(batch, **decoding))
        return [self.chat.decode(ids) for ids in answers]

    def prompt(self, question: str, *visuals: Visual) -> Batch:
        """A question about images and videos, which stand before it in their order, on the model's device.

        Images are read as from a file: turned upright as their EXIF says, transparency on white.

        Raises:
            UserError: it is longer than the context.
        """
        shown = [upright(visual) for visual in visuals]
        sample = Sample("question", question_about(shown, question), shown)
        return self.processor.collate([self.processor.encode(sample, prompt=True)], pad_left=True).to(
            self.language.hf.device
        )

    @torch.no_grad()
    def see(self, *visuals: Visual, known: VisualState | None = None) -> VisualState:
        """What depends on images and videos alone, computed once for all that is asked about them.

        Images are read as in :meth:`prompt`. A backbone that reads questions encodes them when they are asked.

        Args:
            known: an earlier state; what it holds of the same pixels, laid out alike, is taken from it.

        Raises:
            UserError: the tiling cannot cut one.
        """
        shown = [upright(visual) for visual in visuals]
        views = self.processor.views(shown)
        pixels, layouts = [pixels for pixels, _ in views], [layout for _, layout in views]
        if self.vision.reads_questions:  # each question has features of its own
            return VisualState(tuple(shown), tuple(layouts), tuple(pixels), ())
        features = [None if known is None else known.features_of(one, layout) for one, layout in views]
        new = [one for one, its_features in zip(pixels, features, strict=True) if its_features is None]
        if new:  # all in one call
            unseen = [one for one, its_features in zip(layouts, features, strict=True) if its_features is None]
            together = self.features(torch.cat(new).to(self.language.hf.device), unseen)  # (views, N, Dv)
            computed = iter(together.split([len(one) for one in new]))
            features = [next(computed) if one is None else one for one in features]
        return VisualState(tuple(shown), tuple(layouts), tuple(pixels), cast(tuple[Tensor, ...], tuple(features)))

    def prompts(self, conversations: Sequence[Messages], state: VisualState) -> Batch:
        """Conversations that wait for an answer, each about all that a state holds, as one batch on the model's device.

        Args:
            conversations: the messages of each, with a part for each image and video, as :class:`lavi.batch.Sample`
                has them.

        Raises:
            UserError: one is longer than the context, or has parts for more or fewer images.
        """
        samples = [Sample("question", messages, state.visuals) for messages in conversations]
        encoded = [self.processor.encode_seen(sample, state.layouts) for sample in samples]
        batch = self.processor.collate(encoded, pad_left=True)
        if self.vision.reads_questions and state.pixels:
            batch = replace(batch, pixels=torch.cat(state.pixels * len(samples)))  # (views, C, H, W)
        elif state.features:
            batch = replace(batch, features=torch.cat(state.features * len(samples)))  # (views, N, Dv)
        return batch.to(self.language.hf.device)

    def ask(self, question: str, *visuals: Visual, state: VisualState | None = None, **decoding: Any) -> str:
        """The answer to a question about PIL images and videos.

        Args:
            state: what :meth:`see` has computed of them, in their place.
            decoding: as in :meth:`generate`. Without ``max_new_tokens`` and ``generation_config`` the answer has at
                most :data:`LONGEST_ANSWER` tokens, or as many as there is room for. A ``streamer`` gets the words as
                they come.

        Raises:
            UserError: as :meth:`prompt` and :meth:`generate`; images and a state together.
        """
        if state is not None and visuals:
            raise UserError("ask takes images or the state of them, not both: give all of them to see.")
        return self.ask_all([question], self.see(*visuals) if state is None else state, **decoding)[0]

    def ask_all(self, questions: Sequence[str], state: VisualState, **decoding: Any) -> list[str]:
        """The answers to several questions about the same images and videos, read as one batch.

        Args:
            state: what :meth:`see` has computed of them.
            decoding: as in :meth:`ask`.

        Raises:
            UserError: as :meth:`ask`.
        """
        conversations = [question_about(state.visuals, question) for question in questions]
        if not conversations:
            return []
        return self.reply(self.prompts(conversations, state), **decoding)

    def reply(self, batch: Batch, *, longest: int = LONGEST_ANSWER, **decoding: Any) -> list[str]:
        """:meth:`answer`, with answers of at most ``longest`` tokens, or as many as there is room for.

        Args:
            longest: unless ``max_new_tokens`` or a ``generation_config`` says otherwise.

        Raises:
            UserError: as :meth:`answer`.
        """
        if decoding.get("generation_config") is None:
            decoding = {"max_new_tokens": min(longest, self.room_behind(max(self._lengths(batch)))), **decoding}
        return self.answer(batch, **decoding)

    def _read_decoding(self, decoding: dict[str, Any]) -> Decoding:
        return Decoding.read(decoding, ends=self.end_ids(), pad=self.chat.pad_id)

    def end_ids(self) -> list[int]:
        """The ids that end an answer."""
        end = self.language.hf.generation_config.eos_token_id
        of_tokenizer = self.language.tokenizer.eos_token_id
        ids = {of_tokenizer} if of_tokenizer is not None else set()
        return sorted(ids | set(end if isinstance(end, list) else [end] if end is not None else []))


def check_native_resolution(
    vision: VisionBackbone, tiling: Tiling | None, reducer: Reducer | None, fusion: Fusion
) -> None:
    """That all parts take views whose grids differ, where the backbone gives such.

    Raises:
        UserError: one does not.
    """
    if not vision.native_resolution:
        return
    what = f"{type(vision).__name__} gives each image a grid of its own"
    if tiling is not None and not tiling.native_resolution:
        raise UserError(
            f"{what}, and {type(tiling).__name__} cuts images into tiles of one size: set model.tiling=null."
        )
    if reducer is not None:
        raise UserError(f"{what}, and {type(reducer).__name__} reduces views of one grid: set model.reducer=null.")
    if not fusion.native_resolution:
        raise UserError(
            f"{what}, and {type(fusion).__name__} as it is set needs one for all: take, for example, concatenation, "
            "cross-attention, or LaVi with its attention generator."
        )

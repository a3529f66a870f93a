"""Scoring a model: answers to held-out questions, beside the controls.

    samples, one at a time -> a few at a time -+-> their questions -> answered, and answered without images
                                               +-> the same questions about each other's images -> answered
                                               +-> about noisy images, where that is asked for  -> answered

Of a sample that was scored its scores are kept alone, so that memory does not grow with images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from lavi.batch import Batch, Layout, Sample, references_of, text_of
from lavi.data.collator import EncodedSample
from lavi.data.processor import one_bad_sample
from lavi.efficiency.scenario import Prompt, Scenario
from lavi.errors import UserError
from lavi.evaluation.controls import (
    LARGEST_WINDOW,
    NO_IMAGE,
    SHUFFLED,
    noise_control,
    with_images_of_others,
    with_noise,
)
from lavi.evaluation.intervals import Interval, figure_intervals, intervals
from lavi.metrics.base import AnswerMetric, Prediction
from lavi.model import VisionLanguageModel

RGB = 3
BEHIND_TRUTH = 4
"""Tokens that an answer may have behind a true one before it is cut: blanks, or what makes it another one."""


class AnswerLimits(NamedTuple):
    """How many prompts are answered at a time, and how far."""

    batch_size: int = 128
    max_new_tokens: int = 64
    """Of an answer that the metric reads to its end; others are cut behind the longest true one."""


USUAL_LIMITS = AnswerLimits()


class Expected(NamedTuple):
    """The true answers to a question, the first of them the one to train on, and the groups that it counts in."""

    references: tuple[str, ...]
    family: str = "all"
    level: str = "all"
    question: str = ""


def prompts_of(sample: Sample) -> Iterator[tuple[Sample, Expected]]:
    """For each answer of a conversation the conversation before it, with its images, and the answer."""
    for index in sample.answers:
        answer = sample.messages[index]
        family, level = answer.get("family", "all"), answer.get("level", "all")
        question = text_of(sample.messages[index - 1]["content"]) if index else ""
        yield sample.until(index), Expected(references_of(answer), family, level, question)


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Answers prompts, many at a time, and scores the answers.

    Args:
        metric: scores the answers; not shared with another scorer.
        metric_without_images: scores the answers to the same prompts without images; None: those are not answered.
        noise: deviation of noise on the images (:func:`lavi.evaluation.controls.with_noise`).
    """

    model: VisionLanguageModel
    metric: AnswerMetric
    device: torch.device
    metric_without_images: AnswerMetric | None = None
    noise: float = 0.0
    limits: AnswerLimits = USUAL_LIMITS
    route_counts: Counter[Hashable] = field(default_factory=Counter)
    """How many samples took each route through the decoder, as they were answered with their images."""
    prompts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Samples that could not be encoded, by cause."""
    sizes: PromptSizes = field(default_factory=lambda: PromptSizes())
    samples: int = 0
    """Added so far, and left out: their numbers tell them apart, since keys may begin anew in each shard."""
    _waiting: list[tuple[EncodedSample, Expected, int, int]] = field(default_factory=list)
    """With the number of their sample and the tokens that their answer may need."""

    def add(self, sample: Sample) -> bool:
        """Answer all questions of a conversation; False for one that cannot be encoded, which is counted."""
        encode = self.model.processor.encode
        encoded = None
        number = self.samples
        self.samples += 1
        with one_bad_sample(lambda cause: self.left_out.update([cause])):
            shown = self._with_noise(sample, number) if self.noise else sample
            encoded = [(encode(prompt, prompt=True), expected) for prompt, expected in prompts_of(shown)]
        if encoded is None:
            return False
        for prompt, expected in encoded:
            self.sizes.add(prompt)
            self.prompts += 1
            needed, room = self._needed(expected), self.model.room_behind(prompt.length)
            if self._waiting:
                least_room = min(room, self.model.room_behind(max(waiting.length for waiting, *_ in self._waiting)))
                if least_room < max(needed, *(tokens for *_, tokens in self._waiting)):
                    self.finish()  # one that fills the context shortens no other answer
            self._waiting.append((prompt, expected, number, needed))
            size = sum(tensor_bytes(waiting) for waiting, *_ in self._waiting)
            if len(self._waiting) >= self.limits.batch_size or size > LARGEST_WINDOW:
                self.finish()
        return True

    def _with_noise(self, sample: Sample, number: int) -> Sample:
        channels, *cells = self.model.processor.preprocessing.pixel_shape
        of_a_view = (cells[0], cells[1]) if channels == RGB else None  # at native resolution views are patches
        return with_noise(sample, self.noise, seed=number, cells=of_a_view)

    def _needed(self, expected: Expected) -> int:
        """Tokens after which an answer cannot become right any more, or the most that there may be."""
        if self.metric.wants_whole_answers:
            return self.limits.max_new_tokens
        tokenizer = self.model.processor.chat.tokenizer
        tokens = [len(tokenizer(truth, add_special_tokens=False)["input_ids"]) for truth in expected.references]
        return max(tokens) + BEHIND_TRUTH

    def finish(self) -> None:
        """Answer the prompts that are waiting."""
        if not self._waiting:
            return
        prompts, expected, samples, needed = zip(*self._waiting, strict=True)
        tokens = min(max(needed), *(self.model.room_behind(prompt.length) for prompt in prompts))
        batch = self.model.processor.collate(list(prompts), pad_left=True)
        self._waiting = []
        self.model.fusion.route_counts.clear()
        self._score(expected, samples, batch, tokens, self.metric)
        self.route_counts.update(self.model.fusion.route_counts)
        if (metric := self.metric_without_images) is not None:
            self._score(expected, samples, batch.without_images(), tokens, metric)

    def _score(
        self, expected: Sequence[Expected], samples: Sequence[int], batch: Batch, tokens: int, metric: AnswerMetric
    ) -> None:
        try:
            answers = self.model.answer(batch.to(self.device), max_new_tokens=tokens)
        except Exception as error:
            error.add_note(f"It was in samples {', '.join(batch.keys[:8])} ...")
            raise
        metric.update(
            Prediction(answer, e.references, str(sample), e.family, e.level, e.question)
            for answer, e, sample in zip(answers, expected, samples, strict=True)
        )


def tensor_bytes(prompt: EncodedSample) -> int:
    """Bytes of its pixels, or of the features in their place."""
    return prompt.pixels.nbytes + (0 if prompt.backbone_features is None else prompt.backbone_features.nbytes)


@dataclass
class PromptSizes:
    """How large the prompts of a split are, to name a typical one."""

    text: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    layouts: Counter[Layout] = field(default_factory=Counter)
    prompts: Counter[Prompt] = field(default_factory=Counter)
    """Those with one image or video at most."""

    def add(self, prompt: EncodedSample) -> None:
        """Count one prompt."""
        self.note(len(prompt.encoded.ids), prompt.layouts)

    def note(self, text: int, layouts: Sequence[Layout]) -> None:
        """Count a prompt of so many text tokens, with images and videos of these layouts."""
        if len(layouts) < 2:
            self.prompts[text, next(iter(layouts), None)] += 1
        self.text.append(text)
        self.images.append(len(layouts))
        self.views.append(sum(layout.views for layout in layouts))
        self.layouts.update(layouts)

    def typical(self, tokens: int) -> Scenario:
        """The median prompt: its text tokens, and an image of the median size or a video of the median length.

        Where prompts have no image or several: the visual tokens of the median number of views instead.

        Args:
            tokens: visual tokens of a view, as the tower gives them.
        """
        text = int(median(self.text))
        if int(median(self.images)) != 1:
            return Scenario(text, visual_tokens=int(median(self.views)) * tokens)
        frames = [layout.views for layout in self.layouts.elements() if layout.video]
        if 2 * len(frames) > self.layouts.total():
            return Scenario(text, frames=int(median(frames)))
        sizes = [layout.size for layout in self.layouts.elements() if not layout.video]
        width, height = (int(median(size[side] for size in sizes)) for side in (1, 0))
        return Scenario(text, image=(width, height))


@dataclass
class Scores:
    """The result of an evaluation: percent by group, of the samples and of the controls."""

    metric: str
    """Name of the metric."""
    label: str
    """What the percents are of, in a sentence."""
    accuracy: dict[str, float]
    controls: dict[str, dict[str, float]]
    route_counts: Counter[Hashable]
    """How many samples took each route through the decoder; empty: there is one route."""
    samples: int
    answers: int
    shuffled_answers: int
    """Answers of the control with other images; fewer where nobody has images to exchange, or theirs do not fit."""
    left_out: Counter[str]
    """Samples that could not be encoded, by cause."""
    typical: Scenario
    prompts: Counter[Prompt] = field(default_factory=Counter)
    """The sizes of the prompts with one image or video at most."""
    accuracy_intervals: dict[str, Interval] = field(default_factory=dict)
    """95 % intervals [low, high] of ``accuracy``, by bootstrap over samples (:mod:`lavi.evaluation.intervals`)."""
    control_intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """The same of ``controls``."""

    def __str__(self) -> str:
        fewer = self.answers - self.shuffled_answers
        control = f" (in the control with {SHUFFLED} {self.shuffled_answers})" if fewer else ""
        return f"{self.accuracy['all']:.1f} % {self.label} of {self.answers} answers{control} in {self.samples} samples"


def metric_intervals(metric: AnswerMetric) -> dict[str, Interval]:
    """95 % intervals of all that a metric says of the answers it has."""
    predictions = metric.predictions()
    return intervals(predictions) | figure_intervals(metric, predictions)


def noise_left_out(noisy: Mapping[float, Scorer]) -> Counter[str]:
    """Samples that controls with noise could not encode, by cause."""
    causes: Counter[str] = Counter()
    for deviation, scorer in noisy.items():
        causes.update({f"{noise_control(deviation)}: {cause}": count for cause, count in scorer.left_out.items()})
    return causes


def evaluate(
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    *,
    metric: AnswerMetric,
    device: torch.device,
    noise: Sequence[float] = (),
    limits: AnswerLimits = USUAL_LIMITS,
) -> Scores:
    """Score a model on samples and on the controls: their images exchanged among them, none at all, noisy ones.

    Args:
        metric: scores the answers; it is copied, not changed.
        noise: deviations, a control each (:func:`lavi.evaluation.controls.with_noise`).

    Raises:
        UserError: there is not one question.
    """

    scorer_of = partial(Scorer, model, device=device, limits=limits)
    plain = scorer_of(metric=deepcopy(metric), metric_without_images=deepcopy(metric))
    shuffled = scorer_of(metric=deepcopy(metric))
    noisy = {deviation: scorer_of(metric=deepcopy(metric), noise=deviation) for deviation in noise}
    count = 0

    def scored() -> Iterator[Sample]:
        nonlocal count
        for sample in samples:
            if not plain.add(sample):
                continue
            for scorer in noisy.values():
                scorer.samples = plain.samples - 1  # the number that the sample has there
                scorer.add(sample)
            count += 1
            yield sample

    for sample in with_images_of_others(scored()):
        shuffled.add(sample)
    for scorer in (plain, shuffled, *noisy.values()):
        scorer.finish()
    if not plain.prompts:
        raise UserError("there is not one question to score: the data have no usable sample.")
    assert plain.metric_without_images is not None
    controls = {SHUFFLED: shuffled.metric, NO_IMAGE: plain.metric_without_images}
    controls |= {noise_control(deviation): scorer.metric for deviation, scorer in noisy.items()}
    return Scores(
        metric=metric.name,
        label=metric.label or metric.name,
        accuracy=plain.metric.compute(),
        controls={name: metric.compute() for name, metric in controls.items()},
        accuracy_intervals=metric_intervals(plain.metric),
        control_intervals={name: metric_intervals(metric) for name, metric in controls.items()},
        route_counts=plain.route_counts,
        samples=count,
        answers=plain.prompts,
        shuffled_answers=shuffled.prompts,
        left_out=plain.left_out + noise_left_out(noisy),
        typical=plain.sizes.typical(model.vision.tokens),
        prompts=plain.sizes.prompts,
    )

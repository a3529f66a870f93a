"""Scoring a model: answers to held-out questions, beside the controls.

    samples, one at a time -> a few at a time -+-> their questions -> answered, and answered without images
                                               +-> the same questions about each other's images -> answered

Nothing is kept of a sample that was scored, so that memory does not grow with the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

import torch

from lavi.batch import Batch, Layout, Sample, Video, Visual, text_of
from lavi.data.collator import EncodedSample
from lavi.efficiency.comparison import CONTROLS
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError, one_line
from lavi.metrics.answers import FamilyAccuracy, is_right
from lavi.model import VisionLanguageModel

SHUFFLED, NO_IMAGE = CONTROLS
WINDOW = 64
"""Samples that exchange their images at a time."""
LARGEST_WINDOW = 256 * 2**20
"""Bytes of decoded images above which fewer do; of pixels, above which fewer prompts are answered at a time."""


class Expected(NamedTuple):
    """The true answer to a question, and the groups that it counts in."""

    truth: str
    family: str
    level: str


def prompts_of(sample: Sample) -> Iterator[tuple[Sample, Expected]]:
    """For each answer of a conversation all that was said and shown before it, and the answer."""
    for index in sample.answers:
        answer = sample.messages[index]
        family, level = answer.get("family", "all"), answer.get("level", "all")
        yield sample.until(index), Expected(text_of(answer["content"]), family, level)


# --- the controls -----------------------------------------------------------------------------------------------------


def with_images_of_others(samples: Iterable[Sample], *, window: int = WINDOW) -> Iterator[Sample]:
    """The samples with the images of others that have as many, of the same kinds: of those half a window away.

    A sample without images stays as it is; one whose number or kinds of images no other has is left out.
    """
    waiting: dict[tuple[type, ...], list[Sample]] = {}
    spare: dict[tuple[type, ...], Sequence[Visual]] = {}
    for sample in samples:
        kinds = tuple(type(visual) for visual in sample.images)
        if not kinds:
            yield sample
            continue
        same = waiting.setdefault(kinds, [])
        same.append(sample)
        full = len(same) == window or sum(map(_bytes, same)) > LARGEST_WINDOW / len(waiting)
        if full and len(same) > 1:
            spare[kinds] = same[0].images
            yield from _exchanged(same)
            same.clear()
    for kinds, same in waiting.items():
        if len(same) > 1:
            yield from _exchanged(same)
        elif same and kinds in spare:
            yield replace(same[0], images=spare[kinds])


def _exchanged(samples: Sequence[Sample]) -> Iterator[Sample]:
    half = len(samples) // 2
    for sample, other in zip(samples, [*samples[half:], *samples[:half]], strict=True):
        yield replace(sample, images=other.images)


def _bytes(sample: Sample) -> int:
    """Of its decoded images."""
    images = [one for seen in sample.images for one in (seen.frames if isinstance(seen, Video) else [seen])]
    return sum(3 * image.width * image.height for image in images)


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass
class Scorer:
    """Answers prompts as they come, many at a time, and counts the answers that are right.

    Args:
        without_images: answer each prompt also without its images.
    """

    model: VisionLanguageModel
    device: torch.device
    without_images: bool = False
    batch_size: int = 128
    max_new_tokens: int = 16
    right: FamilyAccuracy = field(default_factory=FamilyAccuracy)
    right_without: FamilyAccuracy = field(default_factory=FamilyAccuracy)
    routes: Counter[Hashable] = field(default_factory=Counter)
    """How often samples went each way through the decoder, as they were answered with their images."""
    prompts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Samples that could not be asked, by cause."""
    sizes: PromptSizes = field(default_factory=lambda: PromptSizes())
    _waiting: list[tuple[EncodedSample, Expected]] = field(default_factory=list)

    def add(self, sample: Sample) -> bool:
        """Answer all questions of a conversation; False for one that cannot be encoded, which is counted."""
        try:
            asked = [(self.model.processor.encode(prompt, prompt=True), one) for prompt, one in prompts_of(sample)]
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a sample comes from elsewhere: whatever it does, it is one sample
            self.left_out[getattr(error, "cause", one_line(error))] += 1
            return False
        for ready, expected in asked:
            self.sizes.add(ready)
            self.prompts += 1
            fills_context = self._tokens_behind(ready) < self.max_new_tokens
            if fills_context:  # alone: it leaves the others as much room for their answers as they had
                self.finish()
            self._waiting.append((ready, expected))
            size = sum(ready.pixels.nbytes for ready, _ in self._waiting)
            if fills_context or len(self._waiting) == self.batch_size or size > LARGEST_WINDOW:
                self.finish()
        return True

    def _tokens_behind(self, ready: EncodedSample) -> int:
        """Of the longest answer to a prompt."""
        return min(self.max_new_tokens, self.model.room_behind(ready.length))

    def finish(self) -> None:
        """Answer what is waiting."""
        if not self._waiting:
            return
        expected = [one for _, one in self._waiting]
        tokens = min(self._tokens_behind(ready) for ready, _ in self._waiting)
        batch = self.model.processor.collate([ready for ready, _ in self._waiting], pad_left=True)
        self._waiting = []
        self.model.fusion.route_counts.clear()
        self._count(expected, batch, tokens, self.right)
        self.routes.update(self.model.fusion.route_counts)
        if self.without_images:
            self._count(expected, batch.without_images(), tokens, self.right_without)

    def _count(self, expected: Sequence[Expected], batch: Batch, tokens: int, accuracy: FamilyAccuracy) -> None:
        try:
            answers = self.model.answer(batch.to(self.device), max_new_tokens=tokens)
        except Exception as error:
            error.add_note(f"It was in samples {', '.join(batch.keys[:8])} ...")
            raise
        right = [is_right(answer, one.truth) for answer, one in zip(answers, expected, strict=True)]
        accuracy.update(right, [(one.family, one.level) for one in expected])


@dataclass
class PromptSizes:
    """How large prompts are: what the typical one is found by."""

    text: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    layouts: Counter[Layout] = field(default_factory=Counter)

    def add(self, ready: EncodedSample) -> None:
        """Note one prompt."""
        self.text.append(len(ready.encoded.ids))
        self.images.append(len(ready.layouts))
        self.views.append(sum(layout.views for layout in ready.layouts))
        self.layouts.update(ready.layouts)

    def typical(self, tokens: int) -> Scenario:
        """A prompt as these are, in the median: its text, and one image of their size, or a video of their frames.

        Where prompts have several of them, as many visual tokens as the tower gives for all their views.

        Args:
            tokens: of a view, as the tower gives them.
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
    """What came of an evaluation: percent right by group, of the samples and of the controls."""

    accuracy: dict[str, float]
    controls: dict[str, dict[str, float]]
    routes: Counter[Hashable]
    """How often samples went each way through the decoder; empty: there is one."""
    samples: int
    answers: int
    shuffled_answers: int
    """Answers of the control with other images; fewer where nobody has images to exchange, or theirs do not fit."""
    left_out: Counter[str]
    """Samples that could not be asked, by cause."""
    typical: Scenario

    def __str__(self) -> str:
        fewer = self.answers - self.shuffled_answers
        control = f" (in the control with {SHUFFLED} {self.shuffled_answers})" if fewer else ""
        return f"{self.accuracy['all']:.1f} % right of {self.answers} answers{control} in {self.samples} samples"


def evaluate(model: VisionLanguageModel, samples: Iterable[Sample], *, device: torch.device) -> Scores:
    """Score a model on samples and on the controls: their images exchanged among them, and none at all.

    Raises:
        UserError: there is not one question.
    """
    asked = Scorer(model, device, without_images=True)
    shuffled = Scorer(model, device)
    count = 0

    def scored() -> Iterator[Sample]:
        nonlocal count
        for sample in samples:
            if asked.add(sample):
                count += 1
                yield sample

    for sample in with_images_of_others(scored()):
        shuffled.add(sample)
    asked.finish()
    shuffled.finish()
    if not asked.prompts:
        raise UserError("there is not one question to score: the data have no usable sample.")
    return Scores(
        accuracy=asked.right.compute(),
        controls={SHUFFLED: shuffled.right.compute(), NO_IMAGE: asked.right_without.compute()},
        routes=asked.routes,
        samples=count,
        answers=asked.prompts,
        shuffled_answers=shuffled.prompts,
        left_out=asked.left_out,
        typical=asked.sizes.typical(model.vision.tokens),
    )

"""What the model answers as it trains, with the images it is asked about."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
from PIL import Image, ImageOps

from callbacks.first_samples import FirstSamples
from lavi.batch import CachedVisual, Sample, Video, references_of, text_of
from lavi.config.types import Count
from lavi.data.collator import EncodedSample
from lavi.data.data_module import DataModule
from lavi.data.images import side_by_side
from lavi.metrics.base import AnswerMetric
from lavi.model import VisionLanguageModel

THUMBNAIL = (320, 320)
"""The largest width and height of an image that is shown, in pixels."""
LINE, LONGEST = 50, 200
"""Characters of a line beneath an image, and the most that are shown of a question or an answer."""


@dataclass
class Question:
    """The first question of a sample: encoded, and as it is drawn."""

    prompt: EncodedSample
    text: str
    references: tuple[str, ...]
    picture: Image.Image


class Samples(FirstSamples[Question, list[str]]):
    """After each validation, answers the first validation samples and shows them in TensorBoard, under Images.

    An answer's colour is what the data module's metric makes of it: green for the full score, red for none.

    Args:
        count: how many samples.
        max_new_tokens: of an answer.
    """

    def __init__(self, *, count: Count = 8, max_new_tokens: Count = 16) -> None:
        super().__init__(count=count)
        self.max_new_tokens = max_new_tokens

    def prepare(self, model: VisionLanguageModel, sample: Sample) -> Question:
        return first_question(model, sample)

    def run(self, module: pl.LightningModule) -> list[str]:
        """The model's answer to each question."""
        model = cast(VisionLanguageModel, module.model)
        batch = model.processor.collate([question.prompt for question in self.prepared], pad_left=True)
        room = model.room_behind(max(question.prompt.length for question in self.prepared))
        answers: list[str] = model.answer(batch.to(module.device), max_new_tokens=min(self.max_new_tokens, room))
        return answers

    def show(self, result: list[str], data: DataModule, writer: Any, step: int) -> None:
        writer.add_figure("samples", draw(self.prepared, result, data.metric), step)


def first_question(model: VisionLanguageModel, sample: Sample) -> Question:
    """The first question of a sample, with the images that were shown by then."""
    answer = sample.answers[0]
    prompt = sample.until(answer)
    text = text_of(prompt.messages[-1]["content"]) if prompt.messages else ""
    references = references_of(sample.messages[answer])
    return Question(model.processor.encode(prompt, prompt=True), text, references, picture_of(prompt))


def picture_of(sample: Sample) -> Image.Image:
    """The images of a sample side by side, small; of a video its first frame."""
    visuals = [visual.decode() if isinstance(visual, CachedVisual) else visual for visual in sample.images]
    images = [visual.frames[0] if isinstance(visual, Video) else visual for visual in visuals]
    blank = [Image.new("RGB", (64, 64), (255, 255, 255))]
    small = [ImageOps.contain(image, THUMBNAIL) if max(image.size) > max(THUMBNAIL) else image for image in images]
    return side_by_side(small or blank)


def draw(questions: Sequence[Question], answers: Sequence[str], metric: AnswerMetric) -> object:
    """A figure: the images of each sample, question, truth and answer beneath."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(questions) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, question, answer in zip(grid, questions, answers, strict=False):
        axes.imshow(question.picture)
        truth = _shortened(question.references[0])
        words = [_shortened(question.text), f"truth: {truth}   answer: {_shortened(answer)}"]
        lines = [line for text in words for line in textwrap.wrap(text, LINE)]
        # A question is not a formula: a $ is a $.
        axes.set_title(
            "\n".join(lines), fontsize=8, color=colour_of(metric.score(answer, question.references)), parse_math=False
        )
    return figure


def colour_of(score: float) -> str:
    """Green for 1, red for 0, orange between them."""
    return "tab:green" if score >= 1 else "tab:orange" if score > 0 else "tab:red"


def _shortened(text: str) -> str:
    return textwrap.shorten(text, LONGEST, placeholder=" ...")

"""What the model answers as it trains, with the images it is asked about."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageOps

from lavi.batch import CachedVisual, Sample, Video, references_of, text_of
from lavi.config.types import Count
from lavi.data.collator import EncodedSample
from lavi.data.data_module import DataModule
from lavi.data.images import side_by_side
from lavi.data.processor import one_bad_sample
from lavi.metrics.base import AnswerMetric
from lavi.model import VisionLanguageModel

log = logging.getLogger("lavi")

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


class Samples(pl.Callback):
    """After each validation, answers the first validation samples and shows them in TensorBoard, under Images.

    An answer's colour is what the data module's metric makes of it: green for the full score, red for none.

    Args:
        count: how many samples.
        max_new_tokens: of an answer.
    """

    def __init__(self, *, count: Count = 8, max_new_tokens: Count = 16) -> None:
        self.count, self.max_new_tokens = count, max_new_tokens
        self.questions: list[Question] = []

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers:
            return
        model, data = cast(VisionLanguageModel, module.model), cast(DataModule, cast(Any, trainer).datamodule)
        if not self.questions:
            self.questions = first_questions(model, data.sample_stream("validation", limit=self.count))
        if not self.questions:
            return
        answers = answer_all(module, self.questions, self.max_new_tokens)
        if not trainer.is_global_zero:
            return  # all ranks have answered: of a sharded model each holds a part
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that this validation's scores are logged at
        for logger in loggers:
            logger.experiment.add_figure("samples", draw(self.questions, answers, data.metric), step)


def first_questions(model: VisionLanguageModel, samples: Iterable[Sample]) -> list[Question]:
    """The first question of each sample; one whose images cannot be encoded is left out, as it is in training."""
    questions = []
    for sample in samples:
        with one_bad_sample(partial(log.warning, "not shown: sample '%s' (%s)", sample.key)):
            questions.append(first_question(model, sample))
    return questions


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


def answer_all(module: pl.LightningModule, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
    """The model's answer to each question."""
    model = cast(VisionLanguageModel, module.model)
    batch = model.processor.collate([question.prompt for question in questions], pad_left=True)
    room = model.room_behind(max(question.prompt.length for question in questions))
    training = module.training
    module.eval()
    with torch.no_grad():
        answers: list[str] = model.answer(batch.to(module.device), max_new_tokens=min(max_new_tokens, room))
    module.train(training)
    return answers


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

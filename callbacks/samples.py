"""What the model answers as it trains, with the images it is asked about."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageOps

from lavi.batch import Sample, Video, text_of
from lavi.config.types import Count
from lavi.data.collator import EncodedSample
from lavi.data.images import side_by_side
from lavi.errors import one_line
from lavi.metrics.answers import is_right
from lavi.model import VisionLanguageModel

log = logging.getLogger("lavi")

THUMBNAIL = (320, 320)
"""The largest width and height of an image that is shown, in pixels."""
LINE, LONGEST = 50, 200
"""Characters of a line beneath an image, and of what is shown of a question or an answer."""


@dataclass
class Shown:
    """The first question of a sample, ready to be asked and to be drawn."""

    prompt: EncodedSample
    question: str
    truth: str
    picture: Image.Image


class Samples(pl.Callback):
    """After each validation, answers the first validation samples and shows them in TensorBoard, under Images.

    Args:
        count: how many samples.
        max_new_tokens: of an answer.
    """

    def __init__(self, *, count: Count = 8, max_new_tokens: Count = 16) -> None:
        self.count, self.max_new_tokens = count, max_new_tokens
        self.shown: list[Shown] = []

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers:
            return
        model, data = cast(VisionLanguageModel, module.model), cast(Any, trainer).datamodule
        if not self.shown:
            self.shown = first_questions(model, data.samples("validation", limit=self.count))
        if not self.shown:
            return
        answers = answer_all(module, self.shown, self.max_new_tokens)
        if not trainer.is_global_zero:
            return  # all ranks have answered: of a sharded model each holds a part
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where the scores of this validation stand
        for logger in loggers:
            logger.experiment.add_figure("samples", draw(self.shown, answers), step)


def first_questions(model: VisionLanguageModel, samples: Iterable[Sample]) -> list[Shown]:
    """Of each sample what is asked first; one whose images cannot be encoded is left out, as it is in training."""
    shown = []
    for sample in samples:
        try:
            shown.append(first_question(model, sample))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a sample comes from elsewhere
            log.warning("not shown: sample '%s' (%s)", sample.key, one_line(error))
    return shown


def first_question(model: VisionLanguageModel, sample: Sample) -> Shown:
    """What is asked first in a sample, with the images that were shown by then."""
    answer = sample.answers[0]
    asked = sample.until(answer)
    question = text_of(asked.messages[-1]["content"]) if asked.messages else ""
    truth = text_of(sample.messages[answer]["content"])
    return Shown(model.processor.encode(asked, prompt=True), question, truth, picture_of(asked))


def picture_of(sample: Sample) -> Image.Image:
    """The images of a sample side by side, small; of a video its first frame."""
    seen = [visual.frames[0] if isinstance(visual, Video) else visual for visual in sample.images]
    blank = [Image.new("RGB", (64, 64), (255, 255, 255))]
    small = [ImageOps.contain(image, THUMBNAIL) if max(image.size) > max(THUMBNAIL) else image for image in seen]
    return side_by_side(small or blank)


def answer_all(module: pl.LightningModule, shown: Sequence[Shown], max_new_tokens: int) -> list[str]:
    """What the model says to each question."""
    model = cast(VisionLanguageModel, module.model)
    batch = model.processor.collate([one.prompt for one in shown], pad_left=True)
    room = model.room_behind(max(one.prompt.length for one in shown))
    training = module.training
    module.eval()
    with torch.no_grad():
        answers: list[str] = model.answer(batch.to(module.device), max_new_tokens=min(max_new_tokens, room))
    module.train(training)
    return answers


def draw(shown: Sequence[Shown], answers: Sequence[str]) -> object:
    """A figure: the images of each sample, question, truth and answer beneath."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, one, said in zip(grid, shown, answers, strict=False):
        axes.imshow(one.picture)
        colour = "tab:green" if is_right(said, one.truth) else "tab:red"
        words = [_shortened(one.question), f"truth: {_shortened(one.truth)}   answer: {_shortened(said)}"]
        lines = [line for text in words for line in textwrap.wrap(text, LINE)]
        # What people say is no formula: a $ is a $.
        axes.set_title("\n".join(lines), fontsize=8, color=colour, parse_math=False)
    return figure


def _shortened(text: str) -> str:
    return textwrap.shorten(text, LONGEST, placeholder=" ...")

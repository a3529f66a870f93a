"""What the model answers as it trains, with the images it is asked about."""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lavi.batch import Batch, Sample, Video
from lavi.images import side_by_side
from lavi.model import VisionLanguageModel


class Samples(pl.Callback):
    """After each validation, answers the first validation samples and shows them in TensorBoard, under Images.

    Args:
        count: how many samples.
        max_new_tokens: of an answer.
    """

    def __init__(self, *, count: int = 8, max_new_tokens: int = 16) -> None:
        self.count, self.max_new_tokens = count, max_new_tokens
        self.samples: list[Sample] = []

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers:
            return
        if not self.samples:
            self.samples = first_questions(trainer.datamodule, self.count)  # type: ignore[attr-defined]
        answers = answer_all(module, self.samples, self.max_new_tokens)
        if not trainer.is_global_zero:
            return  # all ranks have answered: of a sharded model each holds a part
        for logger in loggers:
            logger.experiment.add_figure("samples", draw(self.samples, answers), trainer.global_step)


def first_questions(data: pl.LightningDataModule, count: int) -> list[Sample]:
    """The first samples of the validation split."""
    return data.samples("validation", limit=count)  # type: ignore[attr-defined]


def answer_all(module: pl.LightningModule, samples: list[Sample], max_new_tokens: int) -> list[str]:
    """What the model says to the first question of each sample."""
    model = cast(VisionLanguageModel, module.model)
    asked = [Sample(s.key, s.messages[: first_answer(s)], s.images) for s in samples]
    batch: Batch = model.processor.collate([model.processor.encode(s, prompt=True) for s in asked], pad_left=True)
    training = module.training
    module.eval()
    with torch.no_grad():
        answers: list[str] = model.answer(batch.to(module.device), max_new_tokens=max_new_tokens)
    module.train(training)
    return answers


def first_answer(sample: Sample) -> int:
    """The place of the first answer among the messages."""
    return next(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")


def draw(samples: list[Sample], answers: list[str]) -> object:
    """A figure: the images of each sample side by side, question, truth and answer beneath."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, sample, said in zip(grid, samples, answers, strict=False):
        truth = str(sample.messages[first_answer(sample)]["content"])
        question = _text(sample.messages[first_answer(sample) - 1]["content"])
        axes.imshow(_seen(sample))
        colour = "tab:green" if said == truth else "tab:red"
        axes.set_title(f"{question}\ntruth: {truth}   answer: {said}", fontsize=8, color=colour, wrap=True)
    return figure


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")  # type: ignore[attr-defined]


def _seen(sample: Sample) -> object:
    from PIL import Image

    seen = sample.images or [Image.new("RGB", (64, 64), (255, 255, 255))]
    # Of a video, its first frame.
    return side_by_side([visual.frames[0] if isinstance(visual, Video) else visual for visual in seen])

"""What callbacks share that show the first validation samples: when they run, on which ranks, at which step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lavi.batch import Sample
from lavi.config.types import Count
from lavi.data.data_module import DataModule
from lavi.data.processor import one_bad_sample
from lavi.model import VisionLanguageModel

log = logging.getLogger("lavi")

Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


class FirstSamples(pl.Callback, ABC, Generic[Prepared, Result]):
    """After each validation, does something with the first validation samples and shows it in TensorBoard.

    Args:
        count: how many samples.
    """

    def __init__(self, *, count: Count = 8) -> None:
        self.count = count
        self.prepared: list[Prepared] = []
        """The samples, from the first validation on."""

    @abstractmethod
    def prepare(self, model: VisionLanguageModel, sample: Sample) -> Prepared:
        """What is kept of a sample; an error leaves it out, as it is in training."""

    @abstractmethod
    def run(self, module: pl.LightningModule) -> Result:
        """What is shown of all of them: on every rank, since of a sharded model each holds a part."""

    @abstractmethod
    def show(self, result: Result, data: DataModule, writer: Any, step: int) -> None:
        """Write it to one of TensorBoard's writers."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers:
            return
        model, data = cast(VisionLanguageModel, module.model), cast(DataModule, cast(Any, trainer).datamodule)
        if not self.prepared:
            self.prepared = list(self._prepare(model, data.sample_stream("validation", limit=self.count)))
        if not self.prepared:
            return
        with _evaluating(module):
            result = self.run(module)
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that this validation's scores are logged at
        for logger in loggers:
            self.show(result, data, logger.experiment, step)

    def _prepare(self, model: VisionLanguageModel, samples: Iterable[Sample]) -> Iterator[Prepared]:
        for sample in samples:
            with one_bad_sample(partial(log.warning, "not shown: sample '%s' (%s)", sample.key)):
                yield self.prepare(model, sample)


@contextmanager
def _evaluating(module: pl.LightningModule) -> Iterator[None]:
    training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(training)

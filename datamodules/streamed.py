"""What data modules over raw samples share: loaders, held-out streams, and what is noted of each batch that is used."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader

from datamodules.batches import (
    BatchStream,
    EvalStream,
    HeldOutRecords,
    HeldOutSamples,
    Progress,
    ReadBatch,
    TrainingRecords,
    ValidationBatches,
)
from datamodules.encoder import Encoder
from datamodules.formats.base import SampleFormat
from datamodules.formats.conversations import Conversations
from datamodules.shards.processes import leave_signals_to_parent
from lavi.batch import Batch, Sample
from lavi.data.data_module import DataModule
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.metrics.base import AnswerMetric

log = logging.getLogger("lavi")


def begin_reading(worker: int, *, rank: int) -> None:
    """Begin a reading process: signals are left to the main process, which ends this one when its step is saved."""
    leave_signals_to_parent()
    pl_worker_init_function(worker, rank)  # the seeds that Lightning gives only where no other function begins


class StreamedData(DataModule):
    """Batches and samples from raw samples: a subclass says where these come from.

    Args:
        sources: what is read of each split; None: the recipe names none.
        format: decodes raw samples; None: :class:`datamodules.formats.conversations.Conversations`.
        workers: reading processes; 0 reads in the main process.
        bucket, packing: as :class:`datamodules.batches.BatchStream`.
        too_long: as :class:`datamodules.encoder.Encoder`.
        validation_samples: at most this many.
        max_skipped: share of broken samples above which the run stops.
    """

    source_kind: str
    """What a recipe names as the source of a split, in an error."""
    persistent_workers = False
    """Whether reading processes outlive an epoch by count, since what they read has no position to go on from."""

    def __init__(
        self,
        processor: Processor,
        *,
        sources: Mapping[str, Any],
        batch_size: int,
        metric: AnswerMetric | None,
        format: SampleFormat | None,
        max_skipped: float,
        workers: int,
        validation_samples: int | None,
        too_long: Literal["skip", "cut"],
        bucket: int = 1,
        packing: int | None = None,
    ) -> None:
        super().__init__(processor, batch_size=batch_size, metric=metric)
        self.sources = sources
        self.splits = tuple(split for split, source in sources.items() if source is not None)
        self.format = Conversations() if format is None else format
        self.workers, self.bucket, self.packing, self.too_long = workers, bucket, packing, too_long
        self.validation_samples, self.max_skipped = validation_samples, max_skipped
        self.progress = Progress()

    @abstractmethod
    def training_records(self) -> TrainingRecords:
        """The raw training samples.

        Raises:
            UserError: there are none.
        """

    @abstractmethod
    def held_out_records(self, split: str) -> HeldOutRecords:
        """The raw samples of one pass over a split.

        Raises:
            UserError: the recipe names no such split, or there is nothing there.
        """

    def source(self, split: str) -> Any:
        """What the recipe names for a split.

        Raises:
            UserError: it names nothing.
        """
        if split not in self.splits:
            raise UserError(f"the recipe names no {split} data: set data.{split} to {self.source_kind}.")
        return self.sources[split]

    def samples(self, split: str) -> Iterator[Sample]:
        return iter(self.sample_stream(split))

    def sample_stream(self, split: str, *, limit: int | None = None) -> HeldOutSamples:
        return HeldOutSamples(self.stream(split), limit)

    def stream(self, split: str, *, limit: int | None = None) -> EvalStream:
        records = self.held_out_records(split)
        return EvalStream(records, self._encoder(), self.batch_size, self.max_skipped, *self.rank_and_ranks(), limit)

    def _encoder(self, *, packing: int | None = None) -> Encoder:
        length = self.processor.context_length
        processor = replace(self.processor, context_length=min(length, packing or length))
        return Encoder(processor, self.format, self.too_long)

    def train_dataloader(self) -> DataLoader[ReadBatch]:
        rank, ranks = self.rank_and_ranks()
        batches = BatchStream(
            self.training_records(),
            self._encoder(packing=self.packing),
            self.batch_size,
            self.max_skipped,
            rank,
            ranks,
            self.bucket,
            self.packing,
            self.progress,
        )
        keep = self.persistent_workers and self.workers > 0
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=keep,
            worker_init_fn=partial(begin_reading, rank=rank),
        )

    def val_dataloader(self) -> Iterable[ReadBatch]:
        if "validation" not in self.splits:
            return []
        held_out = self.stream("validation", limit=self.validation_samples)
        return DataLoader(ValidationBatches(held_out), batch_size=None)

    def on_after_batch_transfer(self, batch: ReadBatch, dataloader_idx: int) -> Batch:
        """Called for the batch that a step is about to use: from here on it counts as read."""
        for skip in batch.skipped:
            log.warning("skipped sample '%s': %s", skip.key, skip.cause)
        position = batch.position
        if position is not None and self.trainer is not None and self.trainer.training:
            self.counts.update(batch.sources)
            self.counts["skipped"] += sum(skip.samples for skip in batch.skipped)
            self.progress.read[position.reader] = position
            self.progress.turn = (position.reader % max(1, self.workers) + 1) % max(1, self.workers)
        return batch.batch

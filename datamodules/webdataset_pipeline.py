"""Pipelines of ``webdataset`` as data of a recipe, and shards as the source of a pipeline.

    data:
      _target_: datamodules.webdataset_pipeline.PipelineData
      train: {_target_: my_package.data.mixed, urls: "data/{000..099}.tar"}     # gives a webdataset.DataPipeline
      validation: {_target_: my_package.data.in_order, urls: data/held-out.tar}

A pipeline brings its own reading, decoding, shuffling and mixing. What holds of it as of the shards that
:class:`datamodules.image_text.ImageTextData` reads: a sample that cannot be used is counted by its cause, and too many
broken ones stop the run; validation gives all ranks as many batches. An error inside the pipeline is left to its own
``handler``. What does not hold: a resumed run goes on with the beginning of the pipeline, not with the sample it
stopped at; nobody knows how many samples there are, so that a shard that ends early is not missed; and readers (ranks
and workers) share the training data only as the pipeline does it (``split_by_node``, ``split_by_worker``). A pipeline
for held-out data must give every rank all of its samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from datamodules.batches import Drawn, HeldOutRecords, TrainingRecords
from datamodules.formats.base import SampleFormat
from datamodules.formats.conversations import Conversations
from datamodules.shards.read import Raw, ShardStream, Slot
from datamodules.streamed import StreamedData
from lavi.batch import Sample
from lavi.config.types import Count, CountOrZero, ShareOrZero
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.metrics.base import AnswerMetric

DECODED = "__sample__"
"""The key of a raw sample that a pipeline has decoded: a :class:`lavi.batch.Sample`."""


@dataclass(frozen=True)
class PipelineFormat(SampleFormat):
    """Items of a pipeline: samples as they are; of others, what ``undecoded`` makes of their bytes."""

    undecoded: SampleFormat

    def decode(self, raw: Raw) -> Sample:
        sample: Sample = raw[DECODED] if DECODED in raw else self.undecoded.decode(raw)
        return sample


def raw_samples(pipeline: Iterable[Any]) -> Iterator[Raw]:
    """The items of one pass.

    Raises:
        UserError: an item that is neither a sample nor a dict of a sample's members.
    """
    for item in pipeline:
        if isinstance(item, Sample):
            yield {"__key__": item.key, DECODED: item}
        elif isinstance(item, dict) and isinstance(item.get("__key__"), str):
            yield item
        else:
            raise UserError(
                f"a pipeline gives dicts with '__key__' and members as bytes, or lavi.batch.Sample, not "
                f"{type(item).__name__}: map its items to one of these, and leave batches to lavi."
            )


@dataclass
class PipelineRecords(TrainingRecords):
    """Pass after pass over a pipeline. It has no positions: a process begins at its start, and goes on where it was."""

    pipeline: Iterable[Any]
    _running: Iterator[Drawn] | None = field(default=None, init=False, repr=False, compare=False)
    """What this process is reading; another one begins anew."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_running": None}

    @property
    def start(self) -> tuple[Any, ...]:
        return ()

    def records(self, slot: Slot, drawn: int = 0, positions: tuple[Any, ...] = ()) -> Iterator[Drawn]:
        """All but the first that a process asks for are what is left of it.

        Raises:
            UserError: a whole pass gave nothing.
        """
        if self._running is None:
            self._running = self._passes()
        return self._running

    def _passes(self) -> Iterator[Drawn]:
        while True:
            read = 0
            for read, raw in enumerate(raw_samples(self.pipeline), start=1):
                yield Drawn(read, (), "train", raw)
            if not read:
                raise UserError(
                    "a pass over the training pipeline gave no sample: it is empty, or can be iterated over once alone "
                    "(as a generator can): name something that can be iterated over again."
                )
            yield Drawn(0, (), "train", None)


class PipelinePass(HeldOutRecords):
    """One pass over a pipeline."""

    name = "that the pipeline gives"
    expected = None

    def __init__(self, pipeline: Iterable[Any]) -> None:
        self.pipeline = pipeline

    def __iter__(self) -> Iterator[Raw]:
        return raw_samples(self.pipeline)


class PipelineData(StreamedData):
    """Samples of ``webdataset`` pipelines, or of any other iterables that can be iterated over again.

    Args:
        train, validation, test: a ``DataPipeline`` or a ``WebDataset`` that gives the items of one pass: of each a
            :class:`lavi.batch.Sample`, or a dict with ``__key__`` and the bytes of members by type.
        format: decodes dicts; None: :class:`datamodules.formats.conversations.Conversations`.
        batch_size: samples of a batch, on each rank.
        workers: reading processes; the pipeline must be picklable where they are spawned.
        too_long: leave conversations out that are longer than the context, or cut their last turns off.
        validation_samples: at most this many.
        max_skipped: share of broken samples above which the run stops.
        metric: scores answers; None: the share of answers that match exactly.
    """

    source_kind = "a pipeline"
    persistent_workers = True

    def __init__(
        self,
        processor: Processor,
        *,
        train: Iterable[Any],
        validation: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        format: SampleFormat | None = None,
        batch_size: Count = 32,
        workers: CountOrZero = 0,
        too_long: Literal["skip", "cut"] = "skip",
        validation_samples: Count | None = None,
        max_skipped: ShareOrZero = 0.01,
        metric: AnswerMetric | None = None,
    ) -> None:
        super().__init__(
            processor,
            sources={"train": train, "validation": validation, "test": test},
            format=PipelineFormat(format or Conversations()),
            batch_size=batch_size,
            workers=workers,
            too_long=too_long,
            validation_samples=validation_samples,
            max_skipped=max_skipped,
            metric=metric,
        )

    def training_records(self) -> PipelineRecords:
        return PipelineRecords(self.source("train"))

    def held_out_records(self, split: str) -> PipelinePass:
        return PipelinePass(self.source(split))


class ShardSource(IterableDataset[Raw]):
    """One pass over shards as the source of a ``webdataset.DataPipeline``, or behind a ``webdataset.WebLoader``.

    Items are dicts of webdataset's form: ``__key__`` and the bytes of members by type. Broken samples and lost ones
    are among them, with ``__broken__``, which :func:`datamodules.shards.read.check_intact` raises as an error.

    Args:
        epoch: which order of the samples.
        rank, ranks: this rank's share of the shards; workers of a loader share it out among themselves.
    """

    def __init__(self, stream: ShardStream, *, epoch: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.stream, self.epoch, self.rank, self.ranks = stream, epoch, rank, ranks

    def __iter__(self) -> Iterator[Raw]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self.stream.check(self.ranks * workers)
        return self.stream.epoch(self.epoch, Slot(self.rank, self.ranks, worker, workers))

"""Streams of batches: training batches without end, and held-out data as batches and as samples."""

from __future__ import annotations

import itertools
import logging
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.encoder import Encoder, Skip, Skipped
from datamodules.shards.read import Raw, ShardStream, Slot
from lavi.batch import Batch, Sample
from lavi.data.collator import EncodedSample
from lavi.data.data_module import SampleStream, batches_in_step
from lavi.errors import UserError

log = logging.getLogger("lavi")


class Position(NamedTuple):
    """Where a reader stands behind a batch: how many samples it has drawn, and its position in each source.

    Of the samples read behind that, the first ``taken`` batches were given already: to go on, they are read again and
    left out.
    """

    reader: int
    drawn: int
    sources: tuple[Any, ...]
    taken: int = 0


@dataclass
class ReadBatch:
    """A training or validation batch with what its stream notes of it. It moves to a device as one."""

    batch: Batch
    sources: list[str] = field(default_factory=list)
    """The source of each sample, in the order of the batch's keys."""
    skipped: list[Skip] = field(default_factory=list)
    """Samples that were not used while this batch was read."""
    position: Position | None = None
    """Where its reader stands behind it; None: nothing goes on from there."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ReadBatch:
        """The same with the batch's tensors on ``device``."""
        return replace(self, batch=self.batch.to(device, non_blocking=non_blocking))


# --- training ---------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """One record of a training stream, and where the stream stands behind it."""

    drawn: int
    """Samples that were drawn before it, and itself."""
    positions: tuple[Any, ...]
    """The position in each source."""
    source: str
    raw: Raw | None
    """None: an epoch of the source is complete."""


class TrainingRecords(ABC):
    """Raw training samples without end; picklable, since other processes read it."""

    seed: int = 0

    @property
    @abstractmethod
    def start(self) -> tuple[Any, ...]:
        """The position in each source before the first sample."""

    @abstractmethod
    def records(self, slot: Slot, drawn: int = 0, positions: tuple[Any, ...] = ()) -> Iterator[Drawn]:
        """The part of one reader, from ``drawn`` samples and these positions on."""


@dataclass
class Progress:
    """How far a run has read: for each reader the position behind the last batch used, and whose turn is next.

    One object for the data module and its loaders, so that a loader that starts anew goes on where the last one was.
    """

    read: dict[int, Position] = field(default_factory=dict)
    turn: int = 0


@dataclass
class BatchStream(IterableDataset[ReadBatch]):
    """Training batches without end, built whole in the worker that reads them.

    Args:
        bucket: samples of this many batches are sorted by length before they are cut into batches.
        packing: rows hold several conversations, up to so many tokens; None: one.
        progress: where to go on.
    """

    stream: TrainingRecords
    encoder: Encoder
    batch_size: int
    max_skipped: float
    rank: int = 0
    ranks: int = 1
    bucket: int = 1
    packing: int | None = None
    progress: Progress = field(default_factory=Progress)

    def __iter__(self) -> Iterator[ReadBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot = Slot(self.rank, self.ranks, (worker + self.progress.turn) % workers, workers)
        skipped = Skipped(self.max_skipped)
        start = self.progress.read.get(slot.index, Position(slot.index, 0, self.stream.start))
        leave_out = start.taken
        for samples, before, behind in self._pools(slot, start._replace(taken=0), skipped):
            batches = self._batches(samples, before)
            for taken, rows in enumerate(batches, start=1):
                fresh = skipped.take()  # of a batch left out, too: they were reported with it
                if taken <= leave_out:
                    continue
                position = before._replace(taken=taken) if taken < len(batches) else behind
                sources = [encoded.source for row in rows for encoded in row]
                yield ReadBatch(self.encoder.processor.collate(rows), sources, fresh, position)
            leave_out = 0

    def _batches(self, samples: list[EncodedSample], position: Position) -> list[list[list[EncodedSample]]]:
        """Cut a pool into batches of rows. Of one conversation, rows of like length go together; the order is drawn."""
        if self.bucket == 1 and self.packing is None:
            return [[[encoded] for encoded in samples]]
        rng = random.Random(f"{self.stream.seed}/{_order_key(position)}")
        if self.packing is not None:
            rows = pack_rows(samples, self.packing)
            rng.shuffle(rows)  # they come longest conversations first: a batch of nothing else would teach badly
        else:
            rows = [[encoded] for encoded in sorted(samples, key=lambda encoded: encoded.length)]
        starts = range(0, len(rows), self.batch_size)
        batches = [rows[start : start + self.batch_size] for start in starts]
        rng.shuffle(batches)
        return batches

    def _is_full(self, pool: list[EncodedSample]) -> bool:
        """Whether a pool has ``bucket`` batches' worth of samples; for rows of several, of tokens."""
        if self.packing is None:
            return len(pool) == self.batch_size * self.bucket
        return sum(encoded.length for encoded in pool) >= self.batch_size * self.bucket * self.packing

    def _pools(
        self, slot: Slot, start: Position, skipped: Skipped
    ) -> Iterator[tuple[list[EncodedSample], Position, Position]]:
        """The samples of ``bucket`` batches at a time, with the positions before and behind them."""
        pool: list[EncodedSample] = []
        before, passes = start, 0
        for drawn, positions, source, raw in self.stream.records(slot, start.drawn, start.sources):
            if raw is None:
                skipped.check()
                passes += 1
                if passes > 1 and not skipped.used:  # the first may have begun near its end
                    raise UserError(f"none of the {skipped.causes.total()} samples read can be used: {skipped}.")
                continue
            if (encoded := self.encoder(raw, skipped, source)) is not None:
                pool.append(encoded)
            if self._is_full(pool):
                behind = Position(slot.index, drawn, positions)
                yield pool, before, behind
                pool, before = [], behind


def _order_key(position: Position) -> str:
    """What the order of a pool that begins here is drawn by; another text would give the batches of old runs anew."""
    reader, drawn, sources, taken = position
    return f"Position(reader={reader}, drawn={drawn}, places={sources}, taken={taken})"


def pack_rows(samples: Sequence[EncodedSample], length: int) -> list[list[EncodedSample]]:
    """Samples in rows of at most ``length`` tokens, few of them: the longest first, each where it first fits."""
    rows: list[list[EncodedSample]] = []
    left: list[int] = []
    for encoded in sorted(samples, key=lambda encoded: -encoded.length):
        row = next((row for row, room in enumerate(left) if room >= encoded.length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(length)
        rows[row].append(encoded)
        left[row] -= encoded.length
    return rows


# --- held-out data ----------------------------------------------------------------------------------------------------


class HeldOutRecords(ABC):
    """Raw samples of one pass in order, read anew by each iteration."""

    name: str
    """What an error calls them: ``in a.tar ...``."""
    expected: int | None
    """How many there are, broken ones included; None: not known."""

    @abstractmethod
    def __iter__(self) -> Iterator[Raw]: ...


class InOrder(HeldOutRecords):
    """The records of streams of shards, one stream behind the other."""

    def __init__(self, streams: Sequence[ShardStream]) -> None:
        self.streams = [replace(stream, shuffle=0, resampled=False) for stream in streams]
        self.name = f"in {streams[0].shards[0]} ..."
        counts = [stream.samples for stream in streams]
        self.expected = None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Raw]:
        return itertools.chain.from_iterable(stream.epoch(0, Slot()) for stream in self.streams)


@dataclass
class EvalStream(IterableDataset[Batch]):
    """The batches of one pass, in order; every rank gets as many. Or its samples (:meth:`samples`).

    All ranks read all records and each takes its part of every ``ranks`` batches
    (:func:`lavi.data.data_module.batches_in_step`). Each rank reads the whole, so held-out data should be small.

    Args:
        limit: at most this many records.

    Attributes:
        skipped: the samples that the last pass did not use.
    """

    held_out: HeldOutRecords
    encoder: Encoder
    batch_size: int
    max_skipped: float
    rank: int = 0
    ranks: int = 1
    limit: int | None = None
    skipped: Skipped = field(default_factory=lambda: Skipped(1.0))

    def __iter__(self) -> Iterator[Batch]:
        return (read.batch for read in self.read())

    def read(self) -> Iterator[ReadBatch]:
        """The batches, each with the samples that were not used on the way to it.

        Raises:
            UserError: too many samples are broken, or none can be used.
        """
        skipped = self.skipped = Skipped(self.max_skipped)
        any_batch = False
        parts = batches_in_step(
            self.records(),
            partial(self.encoder, skipped=skipped),
            partial(self.encoder, skipped=Skipped(1.0)),
            batch_size=self.batch_size,
            rank=self.rank,
            ranks=self.ranks,
        )
        for rows in parts:
            any_batch = True
            yield ReadBatch(self.encoder.processor.collate(rows), skipped=skipped.take())
        skipped.check()
        if self.rank == 0 and not any_batch:
            skipped.check_any_used(self.held_out.name)

    def __length_hint__(self) -> int:
        """Batches of a pass, for whoever shows how far it is; 0 if nobody knows."""
        return -(-(self.expected or 0) // (self.batch_size * self.ranks))

    @property
    def expected(self) -> int | None:
        """Records of a pass, broken ones included; None: not known."""
        total = self.held_out.expected
        return self.limit if total is None else min(total, self.limit or total)

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the last pass did not use, by cause."""
        return self.skipped.causes

    def samples(self) -> Iterator[Sample]:
        """The usable samples of one pass, decoded one at a time and not encoded; every rank gets all.

        Raises:
            UserError: too many samples are broken, or none can be used.
        """
        skipped = self.skipped = Skipped(self.max_skipped)
        for raw in self.records():
            sample = self.encoder.sample(raw, skipped)
            skipped.take()  # their causes are counted; none is kept
            if sample is not None:
                yield sample
        skipped.check()
        skipped.check_any_used(self.held_out.name)

    def records(self) -> Iterator[Raw]:
        """The raw samples of one pass.

        Raises:
            UserError: a shard that one of several ranks could not read; the others may have, and would wait for it.
        """
        for raw in itertools.islice(self.held_out, self.limit):
            if self.ranks > 1 and raw.get("__unread__"):
                raise UserError(
                    f"held-out data must be read whole by every rank: {raw['__key__']} {raw['__broken__']}."
                )
            yield raw


@dataclass
class ValidationBatches(IterableDataset[ReadBatch]):
    """The batches of held-out data for a trainer, which logs the samples that are not used."""

    held_out: EvalStream

    def __iter__(self) -> Iterator[ReadBatch]:
        return self.held_out.read()


class HeldOutSamples(SampleStream):
    """The usable samples of held-out data."""

    def __init__(self, held_out: EvalStream, limit: int | None = None) -> None:
        super().__init__(held_out.samples, limit)
        self.held_out = held_out

    @property
    def left_out(self) -> Counter[str]:
        return self.held_out.left_out

    @property
    def expected(self) -> int | None:
        total = self.held_out.expected
        return self.limit if total is None else min(total, self.limit or total)

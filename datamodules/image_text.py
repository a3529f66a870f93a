"""Image-text conversations from shards, as a LightningDataModule."""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.shards import BrokenSample, ShardStream, Slot, decode, find_shards
from lavi.batch import Batch, Position, Sample
from lavi.errors import UserError
from lavi.processor import Processor, Ready

log = logging.getLogger("lavi")


@dataclass
class BatchStream(IterableDataset[Batch]):
    """Batches of a shard stream, built whole in the worker that reads them.

    Args:
        endless: start over, in another order, when the shards are through.
        bucket: samples of this many batches are sorted by length before they are cut into batches.
        first: epoch, samples already read and batches taken of those behind, by reader; the stream goes on there.
        turn: the reader whose batch comes first, so that a resumed run takes turns as the first one would have.
        limit: at most this many samples.
    """

    stream: ShardStream
    processor: Processor
    batch_size: int
    max_skipped: float
    endless: bool = False
    rank: int = 0
    ranks: int = 1
    bucket: int = 1
    first: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    turn: int = 0
    limit: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot = Slot(self.rank, self.ranks, (worker + self.turn) % workers, workers)
        skipped = Skipped(self.max_skipped)
        leave_out = self._start(slot).taken
        for samples, before, behind in self._pools(slot, skipped):
            batches = self._batches(samples, before)
            for taken, ready in enumerate(batches, start=1):
                fresh = skipped.take()  # of a batch left out, too: they were reported with it
                if taken <= leave_out:
                    continue
                position = before._replace(taken=taken) if taken < len(batches) else behind
                yield replace(self.processor.collate(ready), skipped=fresh, position=position)
            leave_out = 0
        if not skipped.seen:
            raise UserError(
                f"none of the {skipped.total} samples in {self.stream.shards[0]} ... can be used: {skipped}."
            )

    def _batches(self, samples: list[Ready], position: Position) -> list[list[Ready]]:
        """Cut a pool into batches; of several, those of like length go together, and their order is drawn."""
        if self.bucket == 1:
            return [samples]
        samples = sorted(samples, key=lambda ready: ready.length)
        starts = range(0, len(samples), self.batch_size)
        batches = [samples[start : start + self.batch_size] for start in starts]
        random.Random(f"{self.stream.seed}/{position}").shuffle(batches)
        return batches

    def _start(self, slot: Slot) -> Position:
        """Where this reader begins."""
        return Position(slot.index, *self.first.get(slot.index, (0, 0)))

    def _pools(self, slot: Slot, skipped: Skipped) -> Iterator[tuple[list[Ready], Position, Position]]:
        """The samples of ``bucket`` batches at a time, with the positions before and behind them."""
        pool: list[Ready] = []
        before = behind = self._start(slot)._replace(taken=0)
        for behind, raw in self._positions(slot):
            if raw is None:
                skipped.check()
                continue
            try:
                pool.append(self.processor.encode(decode(raw)))
            except (BrokenSample, UserError) as error:
                skipped.add(raw["__key__"], error.cause if isinstance(error, BrokenSample) else str(error))
            else:
                skipped.seen += 1
            if len(pool) == self.batch_size * self.bucket:
                yield pool, before, behind
                pool, before = [], behind
        if pool:
            yield pool, before, behind

    def _positions(self, slot: Slot) -> Iterator[tuple[Position, dict[str, Any] | None]]:
        """Raw samples with the position behind each; None when a pass over the data is complete."""
        _, first_epoch, already_read, _ = self._start(slot)
        for epoch in itertools.count(first_epoch):
            samples = itertools.islice(self.stream.epoch(epoch, slot), already_read, self.limit)
            position = Position(slot.index, epoch, already_read)
            for number, raw in enumerate(samples, start=already_read + 1):
                position = Position(slot.index, epoch, number)
                yield position, raw
            yield position, None
            if not self.endless or not position.read:
                return
            already_read = 0


@dataclass
class Skipped:
    """Broken samples, counted by cause; above a share of what was seen, reading stops and says why."""

    last = ""

    max_share: float
    seen: int = 0
    total: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    fresh: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, cause: str) -> None:
        """Count one more.

        Raises:
            UserError: more than the share, beyond what chance explains.
        """
        self.total += 1
        self.causes[cause] += 1
        self.fresh.append((key, cause))
        self.last = f"sample '{key}': {cause}"
        expected = self.max_share * (self.seen + self.total)
        if self.total > expected + 4 * math.sqrt(expected) + 1:
            self._stop()

    def check(self) -> None:
        """Hold the share exactly, when a pass over the data is complete.

        Raises:
            UserError: more than the share.
        """
        if self.total > self.max_share * (self.seen + self.total):
            self._stop()

    def _stop(self) -> NoReturn:
        raise UserError(
            f"{self.total} of {self.seen + self.total} samples are broken, more than data.max_skipped="
            f"{self.max_share:g} allows; the last is {self.last}. Mend or remove them, or raise it."
        )

    def take(self) -> list[tuple[str, str]]:
        """Those added since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def __str__(self) -> str:
        return "; ".join(f"{count} x {cause}" for cause, count in self.causes.most_common(3)) or "there is none"


class ImageTextData(pl.LightningDataModule):
    """Conversations about images, from WebDataset shards.

    Args:
        processor: the model's: samples to batches.
        train: a shard folder, a file or a brace pattern.
        validation, test: the same; read in order, once.
        batch_size: samples a step and rank.
        workers: reading processes; 0 reads in the main process.
        shuffle: the size of the shuffle buffer.
        bucket: training batches are cut from this many batches' worth of samples, sorted by length, so that little is
            padded; 1 takes the samples as they come.
        seed: of the order.
        validation_samples: at most this many.
        max_skipped: share of broken samples above which the run stops.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        batch_size: int = 32,
        workers: int = 0,
        shuffle: int = 1000,
        bucket: int = 1,
        seed: int = 0,
        validation_samples: int | None = None,
        max_skipped: float = 0.01,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size, self.workers, self.shuffle, self.seed = batch_size, workers, shuffle, seed
        self.bucket = bucket
        self.validation_samples, self.max_skipped = validation_samples, max_skipped
        self.read: dict[int, tuple[int, int, int]] = {}
        self.turn = 0

    def stream(self, split: str, *, endless: bool = False, limit: int | None = None) -> BatchStream:
        """The batches of a split.

        Raises:
            UserError: the recipe names no such split, it has no shards, or too few for the readers.
        """
        source = self.sources[split]
        if source is None:
            raise UserError(f"the recipe names no {split} data: set data.{split} to a shard folder.")
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        shards = ShardStream(find_shards(source), self.seed, self.shuffle if endless else 0)
        shards.check(ranks * max(1, self.workers if endless else 1))
        stream = BatchStream(
            shards, self.processor, self.batch_size, self.max_skipped, endless, rank, ranks, limit=limit
        )
        return replace(stream, bucket=self.bucket, first=self.read, turn=self.turn) if endless else stream

    def samples(self, split: str, *, limit: int | None = None) -> list[Sample]:
        """The first samples of a split, decoded and not encoded; broken ones are left out."""
        stream = self.stream(split).stream
        found: list[Sample] = []
        for raw in stream.epoch(0, Slot()):
            if limit is not None and len(found) == limit:
                break
            try:
                found.append(decode(raw))
            except BrokenSample as error:
                log.warning("skipped sample '%s': %s", error.key, error.cause)
        return found

    def train_dataloader(self) -> DataLoader[Batch]:
        workers = self.workers
        return DataLoader(
            self.stream("train", endless=True), batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )

    def val_dataloader(self) -> Iterable[Batch]:
        if self.sources["validation"] is None:
            return []
        return DataLoader(self.stream("validation", limit=self.validation_samples), batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called for the batch a step is about to use: from here on it counts as read."""
        for key, cause in batch.skipped:
            log.warning("skipped sample '%s': %s", key, cause)
        if batch.position is not None and self.trainer is not None and self.trainer.training:
            reader, epoch, read, taken = batch.position
            self.read[reader] = (epoch, read, taken)
            self.turn = (reader % max(1, self.workers) + 1) % max(1, self.workers)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "read": dict(self.read),
            "turn": self.turn,
            "workers": self.workers,
            "bucket": self.bucket,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped.

        Raises:
            UserError: the order of the samples would be another one.
        """
        for name in ("workers", "bucket", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the run was read with data.{name}={state[name]}, not {getattr(self, name)}: its place in the "
                    f"data is known for that only. Resume with data.{name}={state[name]}."
                )
        self.read, self.turn = dict(state["read"]), state["turn"]

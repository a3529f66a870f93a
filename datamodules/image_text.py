"""Conversations about images and videos, from shards, as a LightningDataModule."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.conversation import Reading, decode
from datamodules.mixture import MixedStream, Mixture
from datamodules.shards import BrokenSample, Place, Raw, ShardStream, Slot, expected_samples
from datamodules.sources import find_shards
from lavi.batch import Batch, Position, Sample, Skip, visual_parts
from lavi.errors import UserError
from lavi.processor import Processor, Ready, TooLong
from lavi.video import FrameSampling

log = logging.getLogger("lavi")


# --- what is left out -------------------------------------------------------------------------------------------------


@dataclass
class Skipped:
    """Broken samples, counted by cause; above a share of what was seen, reading stops and says why."""

    last = ""

    max_share: float
    seen: int = 0
    total: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    fresh: list[Skip] = field(default_factory=list)

    def add(self, key: str, cause: str, *, lost: int = 1) -> None:
        """Count one more, or as many as were ``lost``.

        Raises:
            UserError: more than the share, beyond what chance explains.
        """
        self.total += lost
        self.causes[cause] += lost
        self.fresh.append(Skip(key, cause, lost))
        self.last = f"sample '{key}': {cause}"
        self._hold(spare=lost)

    def check(self) -> None:
        """Hold the share once more, when a pass over the data is complete: also of what was lost at once.

        Raises:
            UserError: more than the share, beyond what chance explains.
        """
        self._hold(spare=1)

    def _hold(self, *, spare: int) -> None:
        """A reader may have seen little yet, and what is broken does not lie evenly: ``spare`` may be one too many."""
        expected = self.max_share * (self.seen + self.total)
        if self.total > expected + 4 * math.sqrt(expected) + spare:
            raise UserError(
                f"{self.total} of {self.seen + self.total} samples are broken, more than data.max_skipped="
                f"{self.max_share:g} allows; the last is {self.last}. Mend or remove them, or raise it."
            )

    def take(self) -> list[Skip]:
        """Those added since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def __str__(self) -> str:
        return "; ".join(f"{count} x {cause}" for cause, count in self.causes.most_common(3)) or "there is none"


@dataclass(frozen=True)
class Encoder:
    """Raw samples to encoded ones.

    Args:
        too_long: leave a conversation out that is longer than the context, or cut its last turns off.
    """

    processor: Processor
    reading: Reading
    too_long: Literal["skip", "cut"] = "skip"

    def __call__(self, raw: Raw, skipped: Skipped, source: str = "") -> Ready | None:
        """None for a sample that cannot be used; it is counted."""
        try:
            ready = self._fitting(decode(raw, self.reading))
        except BrokenSample as error:
            skipped.add(error.key, error.cause, lost=error.lost)
        except UserError as error:
            skipped.add(raw["__key__"], str(error))
        else:
            skipped.seen += 1
            return replace(ready, source=source)
        return None

    def _fitting(self, sample: Sample) -> Ready:
        while True:
            try:
                return self.processor.encode(sample)
            except TooLong:
                shorter = without_last_turn(sample) if self.too_long == "cut" else None
                if shorter is None:
                    raise
                sample = shorter


def without_last_turn(sample: Sample) -> Sample | None:
    """A conversation up to the answer before its last, with the images it still speaks of; None if none is left."""
    answers = [at for at, message in enumerate(sample.messages) if message["role"] == "assistant"]
    if len(answers) < 2:
        return None
    kept = sample.messages[: answers[-2] + 1]
    # Images that no part names stand before the first words: they stay.
    images = sample.images[: len(visual_parts(kept))] if visual_parts(sample.messages) else sample.images
    return replace(sample, messages=kept, images=images)


# --- streams of batches -----------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has read: of each reader the position behind the last batch used, and whose turn is next.

    One object for the data module and its loaders, so that a loader that starts anew goes on where the last one was.
    """

    read: dict[int, Position] = field(default_factory=dict)
    turn: int = 0


@dataclass
class BatchStream(IterableDataset[Batch]):
    """Endless training batches, built whole in the worker that reads them.

    Args:
        bucket: samples of this many batches are sorted by length before they are cut into batches.
        packing: rows hold several conversations, up to so many tokens; None: one.
        progress: where to go on.
    """

    stream: MixedStream
    encoder: Encoder
    batch_size: int
    max_skipped: float
    rank: int = 0
    ranks: int = 1
    bucket: int = 1
    packing: int | None = None
    progress: Progress = field(default_factory=Progress)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        slot = Slot(self.rank, self.ranks, (worker + self.progress.turn) % workers, workers)
        skipped = Skipped(self.max_skipped)
        start = self.progress.read.get(slot.index, Position(slot.index, 0, self.stream.start))
        leave_out = start.taken
        for samples, before, behind in self._pools(slot, start._replace(taken=0), skipped):
            batches = self._batches(samples, before)
            for taken, ready in enumerate(batches, start=1):
                fresh = skipped.take()  # of a batch left out, too: they were reported with it
                if taken <= leave_out:
                    continue
                position = before._replace(taken=taken) if taken < len(batches) else behind
                yield replace(self.encoder.processor.collate(ready), skipped=fresh, position=position)
            leave_out = 0

    def _batches(self, samples: list[Ready], position: Position) -> list[list[list[Ready]]]:
        """Cut a pool into batches of rows. Of one conversation, rows of like length go together; the order is drawn."""
        if self.bucket == 1 and self.packing is None:
            return [[[ready] for ready in samples]]
        drawn = random.Random(f"{self.stream.seed}/{position}")
        if self.packing is not None:
            rows = packed(samples, self.packing)
            drawn.shuffle(rows)  # they come longest conversations first: a batch of nothing else would teach badly
        else:
            rows = [[ready] for ready in sorted(samples, key=lambda ready: ready.length)]
        starts = range(0, len(rows), self.batch_size)
        batches = [rows[start : start + self.batch_size] for start in starts]
        drawn.shuffle(batches)
        return batches

    def _is_full(self, pool: list[Ready]) -> bool:
        """Whether a pool has ``bucket`` batches' worth of samples; for rows of several, of tokens."""
        if self.packing is None:
            return len(pool) == self.batch_size * self.bucket
        return sum(ready.length for ready in pool) >= self.batch_size * self.bucket * self.packing

    def _pools(self, slot: Slot, start: Position, skipped: Skipped) -> Iterator[tuple[list[Ready], Position, Position]]:
        """The samples of ``bucket`` batches at a time, with the positions before and behind them."""
        pool: list[Ready] = []
        before, passes = start, 0
        for drawn, places, source, raw in self.stream.records(slot, start.drawn, start.places):
            if raw is None:
                skipped.check()
                passes += 1
                if passes > 1 and not skipped.seen:  # the first may have begun near its end
                    raise UserError(f"none of the {skipped.total} samples read can be used: {skipped}.")
                continue
            if (ready := self.encoder(raw, skipped, source)) is not None:
                pool.append(ready)
            if self._is_full(pool):
                behind = Position(slot.index, drawn, places)
                yield pool, before, behind
                pool, before = [], behind


def packed(samples: Sequence[Ready], length: int) -> list[list[Ready]]:
    """Samples in rows of at most ``length`` tokens, few of them: the longest first, each where it first fits."""
    rows: list[list[Ready]] = []
    left: list[int] = []
    for ready in sorted(samples, key=lambda ready: -ready.length):
        row = next((row for row, room in enumerate(left) if room >= ready.length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(length)
        rows[row].append(ready)
        left[row] -= ready.length
    return rows


@dataclass
class HeldOut(IterableDataset[Batch]):
    """The batches of one pass, in the order of the shards; every rank gets as many.

    All ranks read all records and each takes its part of every ``ranks`` batches: whatever is broken, and wherever the
    data end, no rank waits for another. Where a rank's part has nothing usable, a sample of another's stands in, and
    none of its answers counts. Each rank reads the whole, so held-out data should be small.

    Args:
        limit: at most this many records.
    """

    streams: list[ShardStream]
    encoder: Encoder
    batch_size: int
    max_skipped: float
    rank: int = 0
    ranks: int = 1
    limit: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        skipped = Skipped(self.max_skipped)
        records = iter(self.records())
        while window := list(itertools.islice(records, self.batch_size * self.ranks)):
            first = self.rank * self.batch_size
            mine = window[first : first + self.batch_size]
            usable = [ready for raw in mine if (ready := self.encoder(raw, skipped)) is not None]
            if not usable:
                others = (ready for raw in window if (ready := self.encoder(raw, Skipped(1.0))) is not None)
                usable = [replace(ready, stands_in=True) for ready in itertools.islice(others, 1)]
            if usable:
                yield replace(self.encoder.processor.collate(usable), skipped=skipped.take())
        skipped.check()
        if not skipped.seen and self.rank == 0:
            shard = self.streams[0].shards[0]
            raise UserError(f"none of the {skipped.total} samples in {shard} ... can be used: {skipped}.")

    def records(self) -> Iterator[Raw]:
        """In order.

        Raises:
            UserError: a shard that one of several ranks could not read; the others may have, and would wait for it.
        """
        passes = (replace(stream, shuffle=0, resampled=False).epoch(0, Slot()) for stream in self.streams)
        for raw in itertools.islice(itertools.chain.from_iterable(passes), self.limit):
            if self.ranks > 1 and raw.get("__unread__"):
                raise UserError(
                    f"held-out data must be read whole by every rank: {raw['__key__']} {raw['__broken__']}."
                )
            yield raw


# --- the data module --------------------------------------------------------------------------------------------------


class ImageTextData(pl.LightningDataModule):
    """Conversations about images and videos, from WebDataset shards.

    Args:
        processor: the model's: samples to batches.
        train: shards (a folder, a file, a brace pattern, a URL, or a list of them), or a mixture of several sets.
        validation, test: shards; read in order, once.
        batch_size: samples a step and rank.
        workers: reading processes; 0 reads in the main process.
        shuffle: samples are read into blocks of this many and given in random order; 0 keeps the order of the shards.
        resampled: readers draw shards at random instead of sharing them out: fewer shards than readers will do.
        bucket: training batches are cut from this many batches' worth of samples, sorted by length, so that little is
            padded; 1 takes the samples as they come.
        packing: training rows hold several conversations, up to so many tokens of the language model's sequence, which
            do not see each other; a batch is ``batch_size`` such rows, filled from ``bucket`` batches' worth of samples
            (the last of them may have fewer). Images that have no place in the sequence (LaVi) take no room.
        too_long: leave conversations out that are longer than the context, or cut their last turns off.
        video: which frames of a video are seen.
        caption_prompt: the request that a caption answers.
        seed: of the order.
        validation_samples: at most this many.
        max_skipped: share of broken samples above which the run stops.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        train: str | list[str] | Mixture,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 32,
        workers: int = 0,
        shuffle: int = 1000,
        resampled: bool = False,
        bucket: int = 1,
        packing: int | None = None,
        too_long: Literal["skip", "cut"] = "skip",
        video: FrameSampling | None = None,
        caption_prompt: str = Reading.caption_prompt,
        seed: int = 0,
        validation_samples: int | None = None,
        max_skipped: float = 0.01,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size, self.workers, self.shuffle, self.seed = batch_size, workers, shuffle, seed
        self.resampled, self.bucket, self.packing = resampled, bucket, packing
        self.reading = Reading(video or FrameSampling(), caption_prompt)
        self.too_long = too_long
        self.validation_samples, self.max_skipped = validation_samples, max_skipped
        self.progress = Progress()
        self.counts: Counter[str] = Counter()
        """Samples that this rank was given, by source, and those ``skipped``, since the run began."""

    @property
    def source_names(self) -> list[str]:
        """Of the training data."""
        source = self.sources["train"]
        return list(source.sources) if isinstance(source, Mixture) else ["train"]

    def streams(self, split: str) -> dict[str, ShardStream]:
        """The sets of shards of a split, by name.

        Raises:
            UserError: the recipe names no such split, or it has no shards.
        """
        source = self.sources[split]
        if source is None:
            raise UserError(f"the recipe names no {split} data: set data.{split} to a shard folder.")
        sources = source.sources if isinstance(source, Mixture) else {split: source}
        return {
            name: ShardStream(find_shards(shards), self.seed, self.shuffle, self.resampled)
            for name, shards in sources.items()
        }

    @cached_property
    def mixed(self) -> MixedStream:
        """The training data, its sources in their shares."""
        streams, mixture = self.streams("train"), self.sources["train"]
        shares = mixture.shares(streams) if isinstance(mixture, Mixture) else [1.0]
        return MixedStream(streams, shares, self.seed)

    def stream(self, split: str, *, limit: int | None = None) -> HeldOut:
        """One pass over a split, in order.

        Raises:
            UserError: the recipe names no such split, or it has no shards.
        """
        rank, ranks = self._ranks()
        streams = list(self.streams(split).values())
        return HeldOut(streams, self._encoder(), self.batch_size, self.max_skipped, rank, ranks, limit)

    def _encoder(self, *, packing: int | None = None) -> Encoder:
        length = self.processor.context_length
        processor = replace(self.processor, context_length=min(length, packing or length))
        return Encoder(processor, self.reading, self.too_long)

    def _ranks(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def samples(self, split: str, *, limit: int | None = None) -> list[Sample]:
        """The first samples of a split, decoded and not encoded; broken ones are left out."""
        found: list[Sample] = []
        for raw in self.stream(split).records():
            if limit is not None and len(found) == limit:
                break
            try:
                found.append(decode(raw, self.reading))
            except BrokenSample as error:
                log.warning("skipped sample '%s': %s", error.key, error.cause)
        return found

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, ranks = self._ranks()
        mixed = self.mixed
        for stream in mixed.streams.values():
            stream.check(ranks * max(1, self.workers))
        if rank == 0:
            self._announce(mixed, ranks)
        stream_of_batches = BatchStream(
            mixed,
            self._encoder(packing=self.packing),
            self.batch_size,
            self.max_skipped,
            rank,
            ranks,
            self.bucket,
            self.packing,
            self.progress,
        )
        return DataLoader(stream_of_batches, batch_size=None, num_workers=self.workers)

    def _announce(self, mixed: MixedStream, ranks: int) -> None:
        """Say what will be read, and what an epoch is."""
        readers = f"{ranks} rank{'s' * (ranks > 1)} x {self.workers or 'no'} worker{'s' * (self.workers != 1)}"
        for (name, stream), share in zip(mixed.streams.items(), mixed.shares, strict=True):
            count = "samples not counted (no index)" if stream.samples is None else f"{stream.samples} samples"
            steps = stream.samples and math.ceil(stream.samples / (self.batch_size * ranks * share))
            epoch = f", an epoch is {steps} steps" if steps and not (self.resampled or self.packing) else ""
            part = f" {share:.1%} of what is drawn," if len(mixed.streams) > 1 else ""
            log.info("%s:%s %s in %d shards, read by %s%s", name, part, count, len(stream.shards), readers, epoch)

    def val_dataloader(self) -> Iterable[Batch]:
        if self.sources["validation"] is None:
            return []
        return DataLoader(self.stream("validation", limit=self.validation_samples), batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called for the batch a step is about to use: from here on it counts as read."""
        for skip in batch.skipped:
            log.warning("skipped sample '%s': %s", skip.key, skip.cause)
        if batch.position is not None and self.trainer is not None and self.trainer.training:
            self.counts.update(batch.sources)
            self.counts["skipped"] += sum(skip.samples for skip in batch.skipped)
            self.progress.read[batch.position.reader] = batch.position
            self.progress.turn = (batch.position.reader % max(1, self.workers) + 1) % max(1, self.workers)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "read": {reader: _plain(position) for reader, position in self.progress.read.items()},
            "turn": self.progress.turn,
            "counts": dict(self.counts),
            **self._order(),
        }

    def _order(self) -> dict[str, Any]:
        """What decides the order of the samples."""
        settings = ("workers", "batch_size", "bucket", "packing", "shuffle", "resampled", "seed")
        return {"shards": self._shards(), **{name: getattr(self, name) for name in settings}}

    def _shards(self) -> str:
        """A digest of what is read: names of the shards, samples in each, shares of the sources; not where they lie."""
        read = [
            (name, share, [(shard.rpartition("/")[2], expected_samples(shard)) for shard in stream.shards])
            for (name, stream), share in zip(self.mixed.streams.items(), self.mixed.shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped.

        Raises:
            UserError: the order of the samples would be another one.
        """
        for name, now in self._order().items():
            if name not in state:
                raise UserError("this checkpoint does not say where the run was in its data: an older lavi wrote it.")
            if state[name] != now and name == "shards":
                raise UserError(
                    "data.train is not what the run was reading (names of the shards, samples in them, or shares): its "
                    "place is known in that only. Resume with the same data, or begin anew with module.start_from."
                )
            if state[name] != now:
                raise UserError(
                    f"the run was read with data.{name}={state[name]}, not {now}: its place in the "
                    f"data is known for that only. Resume with data.{name}={state[name]}."
                )
        self.counts = Counter(state["counts"])
        self.progress.read = {reader: _position(*plain) for reader, plain in state["read"].items()}
        self.progress.turn = state["turn"]


def _plain(position: Position) -> list[Any]:
    """Numbers and lists alone, for a checkpoint."""
    return [position.reader, position.drawn, [list(place) for place in position.places], position.taken]


def _position(reader: int, drawn: int, places: list[list[int]], taken: int) -> Position:
    return Position(reader, drawn, tuple(Place(*place) for place in places), taken)

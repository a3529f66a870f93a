"""From raw samples to batches: what is left out and counted, training batches, held-out batches and samples.

One :class:`Encoder` holds the rules by which a sample is used or left out; training, validation, scoring, pictures of
samples and VISOR's offline steps all read through it.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from datamodules.formats.conversations import Reading, decode
from datamodules.mixture import MixedStream
from datamodules.shards.read import BrokenSample, Raw, ShardStream, Slot
from lavi.batch import Batch, Position, Sample, Skip
from lavi.data.collator import EncodedSample
from lavi.data.processor import Processor, TooLong
from lavi.errors import UserError

log = logging.getLogger("lavi")

Result = TypeVar("Result")


# --- what is left out -------------------------------------------------------------------------------------------------


@dataclass
class Skipped:
    """Samples that are not used, counted by cause; above a share of broken ones, reading stops and says why."""

    max_share: float
    seen: int = 0
    """Samples that were used."""
    total: int = 0
    """Broken ones."""
    causes: Counter[str] = field(default_factory=Counter)
    """Of all that are not used."""
    fresh: list[Skip] = field(default_factory=list)
    last: str = ""
    """What is said of the last broken one."""

    def add(self, key: str, cause: str, *, lost: int = 1) -> None:
        """Count one broken sample more, or as many as were ``lost``.

        Raises:
            UserError: more than the share, beyond what chance explains.
        """
        self.total += lost
        self.last = f"sample '{key}': {cause}"
        self.leave_out(key, cause, lost=lost)
        self._hold(spare=lost)

    def leave_out(self, key: str, cause: str, *, lost: int = 1) -> None:
        """Count what is not broken, and not used either: of that there may be any share."""
        self.causes[cause] += lost
        self.fresh.append(Skip(key, cause, lost))

    def check_any_used(self, shard: str) -> None:
        """When a pass over the data is complete.

        Raises:
            UserError: not one sample could be used.
        """
        if not self.seen:
            raise UserError(f"none of the {self.causes.total()} samples in {shard} ... can be used: {self}.")

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
    """Raw samples to encoded ones, and the rules by which a sample is used.

    Args:
        too_long: leave a conversation out that is longer than the context, or cut its last turns off.
    """

    processor: Processor
    reading: Reading
    too_long: Literal["skip", "cut"] = "skip"

    def __call__(self, raw: Raw, skipped: Skipped, source: str = "") -> EncodedSample | None:
        """None for a sample that cannot be used; it is counted."""
        used = self._used(raw, skipped, self.processor.encode)
        return None if used is None else replace(used[1], source=source)

    def sample(self, raw: Raw, skipped: Skipped) -> Sample | None:
        """The same without encoding its images: the sample, as much of it as is used."""
        used = self._used(raw, skipped, self.processor.measure)
        return None if used is None else used[0]

    def _used(self, raw: Raw, skipped: Skipped, encode: Callable[[Sample], Result]) -> tuple[Sample, Result] | None:
        """What is used of a sample, with what ``encode`` makes of it; None if it is not: then it is counted."""
        key = raw["__key__"]
        try:
            used = self._fitting(decode(raw, self.reading), encode)
        except BrokenSample as error:
            skipped.add(error.key, error.cause, lost=error.lost)
        except TooLong as error:
            skipped.leave_out(key, error.cause)
        except UserError as error:
            skipped.add(key, str(error).rstrip("."))
        except MemoryError:
            raise
        # A sample comes from elsewhere: whatever it does to a decoder, a template or a tokenizer, it is one sample.
        except Exception as error:
            log.debug("sample '%s'", key, exc_info=True)
            skipped.add(key, f"it cannot be read ({type(error).__name__}: {error})".replace("\n", " ")[:200])
        else:
            skipped.seen += 1
            return used
        return None

    def _fitting(self, sample: Sample, encode: Callable[[Sample], Result]) -> tuple[Sample, Result]:
        while True:
            try:
                return sample, encode(sample)
            except TooLong:
                shorter = without_last_turn(sample) if self.too_long == "cut" else None
                if shorter is None:
                    raise
                sample = shorter


def without_last_turn(sample: Sample) -> Sample | None:
    """A conversation up to the answer before its last, with the images it still speaks of; None if none is left."""
    return sample.until(sample.answers[-2] + 1) if len(sample.answers) > 1 else None


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

    def _batches(self, samples: list[EncodedSample], position: Position) -> list[list[list[EncodedSample]]]:
        """Cut a pool into batches of rows. Of one conversation, rows of like length go together; the order is drawn."""
        if self.bucket == 1 and self.packing is None:
            return [[[ready] for ready in samples]]
        drawn = random.Random(f"{self.stream.seed}/{position}")
        if self.packing is not None:
            rows = pack_rows(samples, self.packing)
            drawn.shuffle(rows)  # they come longest conversations first: a batch of nothing else would teach badly
        else:
            rows = [[ready] for ready in sorted(samples, key=lambda ready: ready.length)]
        starts = range(0, len(rows), self.batch_size)
        batches = [rows[start : start + self.batch_size] for start in starts]
        drawn.shuffle(batches)
        return batches

    def _is_full(self, pool: list[EncodedSample]) -> bool:
        """Whether a pool has ``bucket`` batches' worth of samples; for rows of several, of tokens."""
        if self.packing is None:
            return len(pool) == self.batch_size * self.bucket
        return sum(ready.length for ready in pool) >= self.batch_size * self.bucket * self.packing

    def _pools(
        self, slot: Slot, start: Position, skipped: Skipped
    ) -> Iterator[tuple[list[EncodedSample], Position, Position]]:
        """The samples of ``bucket`` batches at a time, with the positions before and behind them."""
        pool: list[EncodedSample] = []
        before, passes = start, 0
        for drawn, places, source, raw in self.stream.records(slot, start.drawn, start.places):
            if raw is None:
                skipped.check()
                passes += 1
                if passes > 1 and not skipped.seen:  # the first may have begun near its end
                    raise UserError(f"none of the {skipped.causes.total()} samples read can be used: {skipped}.")
                continue
            if (ready := self.encoder(raw, skipped, source)) is not None:
                pool.append(ready)
            if self._is_full(pool):
                behind = Position(slot.index, drawn, places)
                yield pool, before, behind
                pool, before = [], behind


def pack_rows(samples: Sequence[EncodedSample], length: int) -> list[list[EncodedSample]]:
    """Samples in rows of at most ``length`` tokens, few of them: the longest first, each where it first fits."""
    rows: list[list[EncodedSample]] = []
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
class EvalStream(IterableDataset[Batch]):
    """The batches of one pass, in the order of the shards; every rank gets as many. Or its samples (:meth:`samples`).

    All ranks read all records and each takes its part of every ``ranks`` batches: whatever is broken, and wherever the
    data end, no rank waits for another. Where a rank's part has nothing usable, a sample of another's stands in, and
    none of its answers counts. Each rank reads the whole, so held-out data should be small.

    Args:
        limit: at most this many records.

    Attributes:
        skipped: what the last pass did not use.
    """

    streams: list[ShardStream]
    encoder: Encoder
    batch_size: int
    max_skipped: float
    rank: int = 0
    ranks: int = 1
    limit: int | None = None
    skipped: Skipped = field(default_factory=lambda: Skipped(1.0))

    def __iter__(self) -> Iterator[Batch]:
        skipped = self.skipped = Skipped(self.max_skipped)
        any_given = False
        records = iter(self.records())
        while window := list(itertools.islice(records, self.batch_size * self.ranks)):
            first = self.rank * self.batch_size
            mine = window[first : first + self.batch_size]
            usable = [ready for raw in mine if (ready := self.encoder(raw, skipped)) is not None]
            if not usable:
                others = (ready for raw in window if (ready := self.encoder(raw, Skipped(1.0))) is not None)
                usable = [replace(ready, is_filler=True) for ready in itertools.islice(others, 1)]
            if usable:
                any_given = True
                yield replace(self.encoder.processor.collate(usable), skipped=skipped.take())
        skipped.check()
        if self.rank == 0 and not any_given:
            skipped.check_any_used(self.streams[0].shards[0])

    def __length_hint__(self) -> int:
        """Batches of a pass, for whoever shows how far it is; 0 if nobody knows."""
        return -(-(self.expected or 0) // (self.batch_size * self.ranks))

    @property
    def expected(self) -> int | None:
        """Records of a pass, broken ones included; None: not known."""
        counts = [stream.samples for stream in self.streams]
        total = None if None in counts else sum(count or 0 for count in counts)
        return self.limit if total is None else min(total, self.limit or total)

    def samples(self) -> Iterator[Sample]:
        """The usable samples of one pass, decoded one at a time and not encoded; every rank gets all.

        Raises:
            UserError: too many are broken, or none can be used.
        """
        skipped = self.skipped = Skipped(self.max_skipped)
        for raw in self.records():
            sample = self.encoder.sample(raw, skipped)
            skipped.take()  # their causes are counted; none is kept
            if sample is not None:
                yield sample
        skipped.check()
        skipped.check_any_used(self.streams[0].shards[0])

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


@dataclass
class SampleStream:
    """The usable samples of held-out data, as often as they are iterated over; in memory there is one at a time.

    Args:
        limit: at most this many.
    """

    held_out: EvalStream
    limit: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        return itertools.islice(self.held_out.samples(), self.limit)

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the last pass did not use, by cause."""
        return self.held_out.skipped.causes

    @property
    def expected(self) -> int | None:
        """How many there are, broken ones included; None: not known."""
        given = self.held_out.expected
        return self.limit if given is None else min(given, self.limit or given)

"""Conversations about images and videos, from shards, as a LightningDataModule."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from datamodules.batches import BatchStream, Encoder, EvalStream, Progress, SampleStream
from datamodules.formats.conversations import Reading
from datamodules.mixture import MixedStream, Mixture
from datamodules.shards.read import ShardStream, StreamPosition, expected_samples
from datamodules.shards.sources import find_shards
from lavi.batch import Batch, Position
from lavi.config.types import Count, CountOrZero, ShareOrZero
from lavi.data.frame_sampling import FrameSampling
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.metrics.answers import ExactMatch
from lavi.metrics.base import AnswerMetric

log = logging.getLogger("lavi")


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
        metric: scores answers; None: the share of answers that match exactly.
    """

    unsized = True
    """Its batches are a stream that is not counted beforehand: nothing of the trainer can be a share of them."""

    def __init__(
        self,
        processor: Processor,
        *,
        train: str | list[str] | Mixture,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: Count = 32,
        workers: CountOrZero = 0,
        shuffle: CountOrZero = 1000,
        resampled: bool = False,
        bucket: Count = 1,
        packing: Count | None = None,
        too_long: Literal["skip", "cut"] = "skip",
        video: FrameSampling | None = None,
        caption_prompt: str = Reading.caption_prompt,
        seed: int = 0,
        validation_samples: Count | None = None,
        max_skipped: ShareOrZero = 0.01,
        metric: AnswerMetric | None = None,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size, self.workers, self.shuffle, self.seed = batch_size, workers, shuffle, seed
        self.resampled, self.bucket, self.packing = resampled, bucket, packing
        self.reading = Reading(video or FrameSampling(), caption_prompt)
        self.too_long = too_long
        self.validation_samples, self.max_skipped = validation_samples, max_skipped
        self.metric = ExactMatch() if metric is None else metric
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

    def stream(self, split: str, *, limit: int | None = None) -> EvalStream:
        """One pass over a split, in order.

        Raises:
            UserError: the recipe names no such split, or it has no shards.
        """
        rank, ranks = self._ranks()
        streams = list(self.streams(split).values())
        return EvalStream(streams, self._encoder(), self.batch_size, self.max_skipped, rank, ranks, limit)

    def _encoder(self, *, packing: int | None = None) -> Encoder:
        length = self.processor.context_length
        processor = replace(self.processor, context_length=min(length, packing or length))
        return Encoder(processor, self.reading, self.too_long)

    def _ranks(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def samples(self, split: str, *, limit: int | None = None) -> SampleStream:
        """The first usable samples of a split, decoded and not encoded.

        Raises:
            UserError: the recipe names no such split, or it has no shards.
        """
        return SampleStream(self.stream(split), limit)

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
    return Position(reader, drawn, tuple(StreamPosition(*place) for place in places), taken)

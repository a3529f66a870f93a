"""Conversations about images and videos, from shards, as a LightningDataModule."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.batches import InOrder, Position, ReadBatch
from datamodules.features import caches_of, check_frames, write_features
from datamodules.formats.base import SampleFormat
from datamodules.formats.features import MEMBER
from datamodules.mixture import MixedStream, Mixture
from datamodules.shards.read import ShardStream, StreamPosition, expected_samples
from datamodules.shards.sources import find_shards
from datamodules.streamed import StreamedData
from lavi.config.types import Count, CountOrZero, ShareOrZero
from lavi.data.data_module import FeatureRequest
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.metrics.base import AnswerMetric

log = logging.getLogger("lavi")


class ImageTextData(StreamedData):
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
            do not attend to each other; a batch is ``batch_size`` such rows, filled from ``bucket`` batches' worth of
            samples (the last of them may have fewer). Images without tokens in the sequence (LaVi) take no room.
        too_long: leave conversations out that are longer than the context, or cut their last turns off.
        format: decodes the samples of the shards; None: :class:`datamodules.formats.conversations.Conversations`.
        seed: of the order.
        validation_samples: at most this many.
        max_skipped: share of broken samples above which the run stops.
        metric: scores answers; None: the share of answers that match exactly.
    """

    source_kind = "a shard folder"

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
        format: SampleFormat | None = None,
        seed: int = 0,
        validation_samples: Count | None = None,
        max_skipped: ShareOrZero = 0.01,
        metric: AnswerMetric | None = None,
    ) -> None:
        super().__init__(
            processor,
            sources={"train": train, "validation": validation, "test": test},
            batch_size=batch_size,
            metric=metric,
            format=format,
            max_skipped=max_skipped,
            workers=workers,
            validation_samples=validation_samples,
            too_long=too_long,
            bucket=bucket,
            packing=packing,
        )
        self.shuffle, self.resampled, self.seed = shuffle, resampled, seed

    @property
    def source_names(self) -> list[str]:
        source = self.sources["train"]
        return list(source.sources) if isinstance(source, Mixture) else ["train"]

    def streams(self, split: str) -> dict[str, ShardStream]:
        """The sets of shards of a split, by name.

        Raises:
            UserError: the recipe names no such split, or it has no shards.
        """
        source = self.source(split)
        sources = source.sources if isinstance(source, Mixture) else {split: source}
        streams = {
            name: ShardStream(find_shards(shards), self.seed, self.shuffle, self.resampled, self.format.types)
            for name, shards in sources.items()
        }
        # Features are read where an index says what they are of, so that they can be checked; elsewhere pixels are.
        return {
            name: replace(stream, types=(*stream.types, MEMBER)) if caches_of(stream) else stream
            for name, stream in streams.items()
        }

    @cached_property
    def mixed(self) -> MixedStream:
        """The training data, its sources in their shares."""
        streams, mixture = self.streams("train"), self.sources["train"]
        shares = mixture.shares(streams) if isinstance(mixture, Mixture) else [1.0]
        return MixedStream(streams, shares, self.seed)

    def training_records(self) -> MixedStream:
        return self.mixed

    def held_out_records(self, split: str) -> InOrder:
        return InOrder(list(self.streams(split).values()))

    def write_features(self, split: str, folder: Path, request: FeatureRequest) -> tuple[list[str], list[str]]:
        several = isinstance(self.source(split), Mixture)
        written, overrides = [], []
        for name, stream in self.streams(split).items():
            target = folder / name if several else folder
            encoder = self._encoder()
            written.append(write_features(stream, target, encoder, request, max_skipped=self.max_skipped))
            overrides.append(f"data.{split}{f'.sources.{name}' if several else ''}={target}")
        return written, overrides

    def feature_caches(self, split: str) -> dict[str, dict[str, Any]]:
        streams = self.streams(split).values()
        caches = {folder: notes for stream in streams for folder, notes in caches_of(stream).items()}
        for folder, notes in caches.items():
            check_frames(self.format, folder, notes)
        return caches

    def train_dataloader(self) -> DataLoader[ReadBatch]:
        rank, ranks = self.rank_and_ranks()
        for stream in self.mixed.streams.values():
            stream.check(ranks * max(1, self.workers))
        if rank == 0:
            self._announce(self.mixed, ranks)
        return super().train_dataloader()

    def _announce(self, mixed: MixedStream, ranks: int) -> None:
        """Log what is read and by how many readers, and how many steps an epoch has."""
        readers = f"{ranks} rank{'s' * (ranks > 1)} x {self.workers or 'no'} worker{'s' * (self.workers != 1)}"
        for (name, stream), share in zip(mixed.streams.items(), mixed.shares, strict=True):
            count = "samples not counted (no index)" if stream.samples is None else f"{stream.samples} samples"
            of_a_step = self.batch_size * ranks * (self.trainer.accumulate_grad_batches if self.trainer else 1)
            steps = stream.samples and math.ceil(stream.samples / (of_a_step * share))
            epoch = f", an epoch is {steps} steps" if steps and not (self.resampled or self.packing) else ""
            part = f" {share:.1%} of what is drawn," if len(mixed.streams) > 1 else ""
            log.info("%s:%s %s in %d shards, read by %s%s", name, part, count, len(stream.shards), readers, epoch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "read": {reader: _plain(position) for reader, position in self.progress.read.items()},
            "turn": self.progress.turn,
            **super().state_dict(),
            **self._order(),
        }

    def _order(self) -> dict[str, Any]:
        """What decides the order of the samples."""
        settings = ("workers", "batch_size", "bucket", "packing", "shuffle", "resampled", "seed")
        return {"shards": self._shards(), **{name: getattr(self, name) for name in settings}}

    def _shards(self) -> str:
        """A digest of what is read: names of the shards, samples in each, shares of the sources, and the features in
        them, if there are any; not where they lie."""
        read: list[Any] = [
            (name, share, [(shard.rpartition("/")[2], expected_samples(shard)) for shard in stream.shards])
            for (name, stream), share in zip(self.mixed.streams.items(), self.mixed.shares, strict=True)
        ]
        for stream in self.mixed.streams.values():
            read += [{name: notes[name] for name in ("weights", "layouts")} for notes in caches_of(stream).values()]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped.

        Raises:
            UserError: the order of the samples would be another one.
        """
        for name, value in self._order().items():
            if name not in state:
                raise UserError("this checkpoint does not say where the run was in its data: an older lavi wrote it.")
            if state[name] != value and name == "shards":
                raise UserError(
                    "data.train is not what the run was reading (names of the shards, samples in them, or shares): its "
                    "position is known in that only. Resume with the same data, or begin anew with module.start_from."
                )
            if state[name] != value:
                raise UserError(
                    f"the run was read with data.{name}={state[name]}, not {value}: its position in the "
                    f"data is known for that only. Resume with data.{name}={state[name]}."
                )
        super().load_state_dict(state)
        self.progress.read = {reader: _position(*plain) for reader, plain in state["read"].items()}
        self.progress.turn = state["turn"]


def _plain(position: Position) -> list[Any]:
    """A position as numbers and lists, for a checkpoint."""
    return [position.reader, position.drawn, [list(source) for source in position.sources], position.taken]


def _position(reader: int, drawn: int, sources: list[list[int]], taken: int) -> Position:
    return Position(reader, drawn, tuple(StreamPosition(*source) for source in sources), taken)

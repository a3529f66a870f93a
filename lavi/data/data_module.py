"""The contract of data modules: what training, scoring, VISOR's offline steps and the callbacks ask of one."""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lavi.batch import Batch, Layout, Sample
from lavi.config.types import Count
from lavi.data.collator import EncodedSample
from lavi.data.processor import Processor, one_bad_sample
from lavi.errors import UserError
from lavi.metrics.answers import ExactMatch
from lavi.metrics.base import AnswerMetric

log = logging.getLogger("lavi")

Item = TypeVar("Item")


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass
class SampleStream(Iterable[Sample]):
    """The samples of a split, read anew by each iteration; one of them is in memory at a time.

    Args:
        read: the samples of one pass.
        limit: at most this many.
    """

    read: Callable[[], Iterable[Sample]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        return itertools.islice(self.read(), self.limit)

    @property
    def expected(self) -> int | None:
        """How many samples there are, broken ones included; None: not known."""
        total = length_hint(self.read())
        return min(total, self.limit or total) if total else self.limit

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the last pass did not use, by cause."""
        return Counter()


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class SampleEncoder:
    """Encodes samples; one that cannot be encoded is logged, counted in ``left_out``, and None."""

    processor: Processor
    left_out: Counter[str] = field(default_factory=Counter)

    def __call__(self, sample: Sample) -> EncodedSample | None:
        with one_bad_sample(partial(self._leave_out, sample.key)):
            return self.processor.encode(sample)
        return None

    def _leave_out(self, key: str, cause: str) -> None:
        self.left_out[cause] += 1
        log.warning("left out: sample '%s' (%s)", key, cause)


def batches_in_step(
    items: Iterable[Item],
    encode: Callable[[Item], EncodedSample | None],
    encode_filler: Callable[[Item], EncodedSample | None],
    *,
    batch_size: int,
    rank: int,
    ranks: int,
) -> Iterator[list[EncodedSample]]:
    """This rank's part of every ``ranks`` batches of one pass; all ranks get as many parts.

    Each rank reads all items, so that no rank waits for another wherever the data end. Where a rank can use nothing of
    its part, a sample of another's part fills it, and none of its answers counts.

    Args:
        encode: of this rank's items; None: the item cannot be used.
        encode_filler: of another's item, which that rank counts.
    """
    left = iter(items)
    while window := list(itertools.islice(left, batch_size * ranks)):
        part = window[rank * batch_size : (rank + 1) * batch_size]
        usable = [encoded for item in part if (encoded := encode(item)) is not None]
        if not usable:
            others = (encoded for item in window if (encoded := encode_filler(item)) is not None)
            usable = [replace(encoded, is_filler=True) for encoded in itertools.islice(others, 1)]
        if usable:
            yield usable


@dataclass
class SampleBatches(IterableDataset[Batch]):
    """Batches of samples for one of several ranks.

    Args:
        samples: of a split; every rank reads all of them.
        encode: counts what it leaves out.
    """

    samples: SampleStream
    encode: SampleEncoder
    batch_size: int
    rank: int = 0
    ranks: int = 1


class EvaluationBatches(SampleBatches):
    """The batches of one pass over samples, in order; all ranks get as many."""

    def __iter__(self) -> Iterator[Batch]:
        self.encode.left_out.clear()
        filler = SampleEncoder(self.encode.processor)
        sizes = {"batch_size": self.batch_size, "rank": self.rank, "ranks": self.ranks}
        for rows in batches_in_step(self.samples, self.encode, filler, **sizes):
            yield self.encode.processor.collate(rows)

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the last pass did not use, by cause."""
        return self.samples.left_out + self.encode.left_out


class TrainingBatches(SampleBatches):
    """Batches without end: one pass over the samples after the other. Each rank takes every ``ranks``-th sample.

    Who iterates anew, as a trainer does that counts epochs, goes on where the last one stopped.
    """

    _batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            encoded, collate = self._encoded(), self.encode.processor.collate
            self._batches = (collate(list(itertools.islice(encoded, self.batch_size))) for _ in itertools.count())
        return self._batches

    def _encoded(self) -> Iterator[EncodedSample]:
        while True:
            usable = 0
            for sample in itertools.islice(self.samples, self.rank, None, self.ranks):
                if (encoded := self.encode(sample)) is not None:
                    usable += 1
                    yield encoded
            if not usable:
                raise no_training_samples(self.encode.left_out)


def no_training_samples(left_out: Counter[str]) -> UserError:
    """An error that says why, by the causes for which samples were left out."""
    causes = "; ".join(f"{count} x {cause}" for cause, count in left_out.most_common(3))
    return UserError(f"none of the training samples can be used: {causes or 'there is none'}.")


# --- the contract -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureRequest:
    """The features that a data module is to write beside its images and videos (``python -m lavi.cache_features``)."""

    encode: Callable[[Tensor, Sequence[Layout]], Tensor]
    """Pixels (views, C, H, W) of images of these layouts to features (views, N, Dv)."""
    made_by: dict[str, Any]
    """What they are made with, as JSON: with other values they are other features."""
    notes: dict[str, Any]
    """What :meth:`DataModule.feature_caches` gives back of them."""
    dtype: torch.dtype = torch.bfloat16
    keeps_together: bool = False
    """All views of an image or video come in one call."""
    batch_size: int = 16
    """Views of a call, unless more belong together."""
    threads: int = 2
    """That decode and preprocess."""


class DataModule(pl.LightningDataModule, ABC):
    """Conversations about images: training and validation batches, and samples to be scored and shown.

    A data module of one's own needs :meth:`samples` alone. Its training batches then take the samples in the order in
    which they are given, read in the main process, again and again; a run that is resumed reads them from the start.

    Args:
        processor: the model's; it encodes samples and makes batches of them. ``lavi.fit`` gives it.
        batch_size: samples of a batch, on each rank.
        metric: scores answers; None: :class:`lavi.metrics.answers.ExactMatch`.
    """

    unsized = True
    """The training batches have no end: no setting of the trainer can be a share of them."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """The splits that :meth:`samples` gives; without "validation" the trainer does not validate."""

    def __init__(self, processor: Processor, *, batch_size: Count = 32, metric: AnswerMetric | None = None) -> None:
        super().__init__()
        self.processor, self.batch_size = processor, batch_size
        self.metric = ExactMatch() if metric is None else metric
        self.counts: Counter[str] = Counter()
        """Training samples of this rank since the run began, by source, and those ``skipped``."""
        self._encode = SampleEncoder(processor)
        """Of the training batches."""

    @abstractmethod
    def samples(self, split: str) -> Iterable[Sample]:
        """The samples of one pass over ``train``, ``validation`` or ``test``, in order; each call begins anew.

        Raises:
            UserError: there is no such split.
        """

    @property
    def source_names(self) -> list[str]:
        """The sources of the training data: keys of ``counts``."""
        return ["train"]

    def sample_stream(self, split: str, *, limit: int | None = None) -> SampleStream:
        """The first samples of a split, decoded and not encoded: to be scored and shown.

        Raises:
            UserError: there is no such split.
        """
        return SampleStream(partial(self.samples, split), limit)

    def stream(self, split: str, *, limit: int | None = None) -> Any:
        """The batches of one pass over a split, in order: an iterable of :class:`lavi.batch.Batch` with ``left_out``.

        ``left_out`` is a Counter of the samples that the last pass did not use, by cause.

        Args:
            limit: at most this many samples.

        Raises:
            UserError: there is no such split.
        """
        samples = self.sample_stream(split, limit=limit)
        return EvaluationBatches(samples, SampleEncoder(self.processor), self.batch_size, *self.rank_and_ranks())

    def write_features(self, split: str, folder: Path, request: FeatureRequest) -> tuple[list[str], list[str]]:
        """Write a split anew, with the features of its images and videos.

        Returns:
            Lines on what was written, and the changes to a recipe by which it reads them.

        Raises:
            UserError: this data module keeps no features, or there is no such split.
        """
        raise UserError(
            f"{type(self).__name__} keeps no features: datamodules.image_text.ImageTextData does, of shards "
            "(python -m datamodules.pack)."
        )

    def feature_caches(self, split: str) -> dict[str, dict[str, Any]]:
        """The notes of the features that the samples of a split bring in the place of pixels, by where they lie.

        Raises:
            UserError: they were made of other frames than these data would read.
        """
        return {}

    def rank_and_ranks(self) -> tuple[int, int]:
        """The number of this rank, and how many ranks train."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> Iterable[Any]:
        batches = TrainingBatches(self.sample_stream("train"), self._encode, self.batch_size, *self.rank_and_ranks())
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> Iterable[Any]:
        return DataLoader(self.stream("validation"), batch_size=None) if "validation" in self.splits else []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Called for the batch that a step is about to use: a training batch is counted."""
        if self.trainer is not None and self.trainer.training:
            self.counts["train"] += len(batch.keys)
            self.counts["skipped"] += self._encode.left_out.total()
            self._encode.left_out.clear()
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter(state["counts"])

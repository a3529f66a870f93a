"""Shards with the features of their images and videos: what ``python -m lavi.cache_features`` has a data module write.

    shard -> records, decoded and cut into views ahead by threads -> views of several samples at a time -> backbone
          -> the record as it was, with its features

One shard of features a shard of data, in the same order: a recipe that reads them draws the same samples. A sample that
cannot be used is left out, as it is in training.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.encoder import Encoder, Skipped
from datamodules.formats.base import SampleFormat
from datamodules.formats.conversations import Conversations, parse_record
from datamodules.formats.features import RECORD, with_features
from datamodules.shards.read import Raw, ShardStream, expected_samples, index_entry, read_shard
from datamodules.shards.sources import read_index
from datamodules.shards.write import ShardJob, write_shards
from lavi.batch import Layout, Sample, Visual, grids_of_views
from lavi.data.data_module import FeatureRequest
from lavi.errors import UserError

log = logging.getLogger("lavi")

Views = tuple[list[Visual], list[tuple[Tensor, Layout]]]
"""The images and videos of a sample, and the pixels and layout of each."""


@dataclass(frozen=True)
class FeatureWriter:
    """Makes the samples of one shard of features.

    Args:
        shards: of data; a job's number is that of its shard.
        encoder: decodes samples and says which are used.
    """

    shards: Sequence[str]
    encoder: Encoder
    request: FeatureRequest

    def __call__(self, job: ShardJob) -> Iterator[dict[str, Any]]:
        """The samples of a shard, in order."""
        waiting: list[tuple[Raw, Views]] = []
        views = 0
        for raw, of_sample in self._decoded(read_shard(self.shards[job.index], types=self.encoder.format.types)):
            waiting.append((raw, of_sample))
            views += sum(layout.views for _, layout in of_sample[1])
            if views >= self.request.batch_size:
                yield from self._encoded(waiting)
                waiting, views = [], 0
        yield from self._encoded(waiting)

    def _decoded(self, records: Iterable[Raw]) -> Iterator[tuple[Raw, Views]]:
        """The usable records with their views, in order; as many are decoded ahead as one call encodes."""
        with ThreadPoolExecutor(self.request.threads) as pool:
            ahead: deque[Any] = deque()
            for raw in records:
                ahead.append(pool.submit(self._views, raw))
                if len(ahead) > self.request.batch_size:
                    yield from ahead.popleft().result()
            for one in ahead:
                yield from one.result()

    def _views(self, raw: Raw) -> list[tuple[Raw, Views]]:
        """A record with its views; none of one that cannot be used."""
        skipped = Skipped(1.0)
        used = self.encoder.used(raw, skipped, self._views_of)
        for skip in skipped.take():
            log.warning("left out: sample '%s' (%s)", skip.key, skip.cause)
        return [] if used is None else [(raw, used[1])]

    def _views_of(self, sample: Sample) -> Views:
        visuals: list[Any] = list(sample.images)
        return visuals, self.encoder.processor.views(visuals)

    def _encoded(self, samples: Sequence[tuple[Raw, Views]]) -> Iterator[dict[str, Any]]:
        """Samples as they are written, their views encoded in one call."""
        views = [one for _, (_, of_sample) in samples for one in of_sample]
        features: Iterator[Tensor] = iter(())
        if views:
            pixels, layouts = torch.cat([pixels for pixels, _ in views]), [layout for _, layout in views]
            together = self.request.encode(pixels, grids_of_views(layouts))  # (views, N, Dv)
            together = together.to("cpu", self.request.dtype)
            each = zip(together.split([layout.views for layout in layouts]), layouts, strict=True)
            features = (one[:, : layout.tokens_of_view(one.shape[1])] for one, layout in each)
        for raw, (visuals, of_sample) in samples:
            members = {name: data for name, data in raw.items() if isinstance(data, bytes) and name != "json"}
            record = parse_record(raw)
            written: dict[str, Any] = {"json": record}
            if visuals:
                own = list(itertools.islice(features, len(visuals)))
                written = with_features(record, visuals, [layout for _, layout in of_sample], own)
            yield {"__key__": raw["__key__"], **members, **written}


def write_features(
    streams: dict[str, ShardStream], folder: Path, encoder: Encoder, request: FeatureRequest
) -> list[str]:
    """Write the features of a split: one folder, or of several sources one folder each; a line on each.

    Raises:
        UserError: a format whose images and videos are not those of the shard; features of features; as
            :func:`datamodules.shards.write.write_shards`.
    """
    if not isinstance(encoder.format, Conversations):
        raise UserError(
            f"features are kept of conversations, and data.format is {type(encoder.format).__name__}: write such data "
            "as shards first (python -m datamodules.pack)."
        )
    lines = []
    for name, stream in streams.items():
        if caches_of(stream):
            raise UserError(f"{stream.shards[0]} holds features already: name the shards that they were made of.")
        target = folder if len(streams) == 1 else folder / name
        counts = [expected_samples(shard) or _count(shard) for shard in stream.shards]
        starts = [sum(counts[:number]) for number in range(len(counts))]
        jobs = [ShardJob(i, start, start + count) for i, (start, count) in enumerate(zip(starts, counts, strict=True))]
        written = write_shards(
            target,
            jobs,
            FeatureWriter(stream.shards, encoder, request),
            made_by={"features": request.made_by, "of": [index_entry(shard) or shard for shard in stream.shards]},
            workers=0,
            label=f"features of {target.name}",
            notes={RECORD: request.notes | {"video": repr(encoder.format.video)}},
        )
        left_out = sum(counts) - written.samples
        lines.append(f"{target}: {written}" + (f"; {left_out} left out" if left_out else ""))
    return lines


def _count(shard: str) -> int:
    return sum(1 for _ in read_shard(shard))


def caches_of(stream: ShardStream) -> dict[str, dict[str, Any]]:
    """What the indices of a stream's shards say of the features in them, by folder; empty: there are none."""
    folders = {shard.rpartition("/")[0] for shard in stream.shards if not shard.startswith("pipe:")}
    indices = {folder: read_index(f"{folder}/" if "://" in folder else folder) or {} for folder in sorted(folders)}
    return {
        folder: index[RECORD] | {"videos": index["statistics"]["videos"]}
        for folder, index in indices.items()
        if RECORD in index
    }


def check_frames(format: SampleFormat, folder: str, notes: dict[str, Any]) -> None:
    """Whether features are of the frames that a format would read.

    Raises:
        UserError: they are of others, or the format reads no features.
    """
    if not isinstance(format, Conversations):
        raise UserError(f"{folder} holds features, which data.format {type(format).__name__} does not read.")
    if notes["videos"] and notes["video"] != repr(format.video):
        raise UserError(
            f"the features in {folder} are of other frames of its videos, {notes['video']}: set data.format.video to "
            "that, or cache the features anew."
        )

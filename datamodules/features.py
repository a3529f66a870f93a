"""Shards with the features of their images and videos: what ``python -m lavi.cache_features`` has a data module write.

    shard -> records, decoded and cut into views ahead by threads -> views of several samples at a time -> backbone
          -> the record with its images and videos as they were, and their features

One shard of features a shard of data, its samples in the same order. A sample that cannot be used is left out, as it is
in training; more of them than ``data.max_skipped`` stop the work.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.encoder import Encoder, Skip, Skipped
from datamodules.formats.base import SampleFormat
from datamodules.formats.conversations import Conversations
from datamodules.formats.features import SeenVisual, with_features
from datamodules.shards.read import Raw, ShardStream, expected_samples, index_entry, index_of, read_shard
from datamodules.shards.write import ShardJob, write_shards
from lavi.batch import Layout, Sample, Video
from lavi.data.data_module import FeatureRequest
from lavi.errors import UserError

log = logging.getLogger("lavi")

NOTES = "features"
"""The key of an index under which stands what the features in its shards are of."""


@dataclass(frozen=True)
class FeatureWriter:
    """Makes the samples of one shard of features.

    Args:
        shards: of data; a job's number is that of its shard.
        encoder: decodes samples and says which are used.
        skipped: counts those that are not.
    """

    shards: Sequence[str]
    encoder: Encoder
    request: FeatureRequest
    skipped: Skipped

    def __call__(self, job: ShardJob) -> Iterator[dict[str, Any]]:
        """The samples of a shard, in order.

        Raises:
            UserError: the shard cannot be read, or too many samples are broken.
        """
        waiting: list[tuple[Raw, list[SeenVisual]]] = []
        views = 0
        for raw, visuals in self._decoded(read_shard(self.shards[job.index], types=self.encoder.format.types)):
            waiting.append((raw, visuals))
            views += sum(len(visual.pixels) for visual in visuals)
            if views >= self.request.batch_size:
                yield from self._encoded(waiting)
                waiting, views = [], 0
        yield from self._encoded(waiting)
        self.skipped.check()

    def _decoded(self, records: Iterable[Raw]) -> Iterator[tuple[Raw, list[SeenVisual]]]:
        """The usable records with their images and videos, in order, a few of them decoded ahead."""
        with ThreadPoolExecutor(self.request.threads) as pool:
            ahead: deque[Future[tuple[Raw, list[SeenVisual] | None, list[Skip]]]] = deque()
            for raw in records:
                if raw.get("__unread__"):
                    raise UserError(f"{raw['__key__']} {raw['__broken__']}: the same command goes on from there.")
                ahead.append(pool.submit(self._views, raw))
                if len(ahead) > 2 * self.request.threads:
                    yield from self._usable(ahead.popleft())
            for one in ahead:
                yield from self._usable(one)

    def _usable(
        self, decoded: Future[tuple[Raw, list[SeenVisual] | None, list[Skip]]]
    ) -> Iterator[tuple[Raw, list[SeenVisual]]]:
        raw, visuals, skips = decoded.result()
        for skip in skips:
            log.warning("left out: sample '%s' (%s)", skip.key, skip.cause)
            self.skipped.add(skip.key, skip.cause, lost=skip.samples)
        if visuals is not None:
            self.skipped.used += 1
            yield raw, visuals

    def _views(self, raw: Raw) -> tuple[Raw, list[SeenVisual] | None, list[Skip]]:
        """A record with its images and videos; without them where it cannot be used, and the cause."""
        skipped = Skipped(1.0)
        used = self.encoder.used(raw, skipped, self._views_of)
        return raw, None if used is None else used[1], skipped.take()

    def _views_of(self, sample: Sample) -> list[SeenVisual]:
        processor, alone = self.encoder.processor, len(sample.images) == 1
        visuals: list[Any] = list(sample.images)
        seen = []
        for visual, (pixels, layout) in zip(visuals, processor.views(visuals), strict=True):
            otherwise = processor.tiling.layout(visual, processor.preprocessing, alone=not alone)
            times = (visual.seconds, visual.duration) if isinstance(visual, Video) else ([], None)
            seen.append(SeenVisual(pixels, layout, *times, alone=None if otherwise == layout else alone))
        return seen

    def _encoded(self, samples: Sequence[tuple[Raw, list[SeenVisual]]]) -> Iterator[dict[str, Any]]:
        """Samples as they are written, their views encoded together."""
        features = self._features([visual for _, visuals in samples for visual in visuals])
        for raw, visuals in samples:
            members = {name: data for name, data in raw.items() if isinstance(data, bytes) and name != "json"}
            written: dict[str, Any] = {"json": json.loads(raw.get("json", b"{}"))}
            if visuals:
                written = with_features(written["json"], visuals, list(itertools.islice(features, len(visuals))))
            yield {"__key__": raw["__key__"], **members, **written}

    def _features(self, visuals: Sequence[SeenVisual]) -> Iterator[Tensor]:
        """(views, N, Dv) of each, at native resolution without padding."""
        if not visuals:
            return iter(())
        groups = groups_of(self._parts(visuals), self.request.batch_size)
        views = itertools.chain.from_iterable(map(self._features_of_views, groups))
        return (torch.stack(list(itertools.islice(views, visual.layout.views))) for visual in visuals)

    def _parts(self, visuals: Sequence[SeenVisual]) -> list[Part]:
        """What is encoded together: whole images and videos, or view by view."""
        if self.request.keeps_together:
            return [(visual.pixels, visual.layout) for visual in visuals]
        return [(view[None], Layout(grid=visual.layout.grid)) for visual in visuals for view in visual.pixels]

    def _features_of_views(self, parts: Sequence[Part]) -> Iterator[Tensor]:
        """(N, Dv) of each view, encoded in one call, without padding."""
        layouts = [layout for _, layout in parts]
        features = self.request.encode(torch.cat([pixels for pixels, _ in parts]), layouts)  # (views, N, Dv)
        own = features.to("cpu", self.request.dtype).split([layout.views for layout in layouts])
        for layout, of_part in zip(layouts, own, strict=True):
            yield from of_part[:, : layout.tokens_of_view(of_part.shape[1])]


Part = tuple[Tensor, Layout]
"""Pixels (views, C, H, W) that are encoded in one call, and how they belong together."""


def groups_of(parts: Sequence[Part], most: int) -> Iterator[list[Part]]:
    """Parts in groups of at most so many views; one that has more is a group of its own."""
    group: list[Part] = []
    for part in parts:
        if group and sum(layout.views for _, layout in group) + part[1].views > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def write_features(
    stream: ShardStream, folder: Path, encoder: Encoder, request: FeatureRequest, *, max_skipped: float
) -> str:
    """Write the features of a set of shards; a line on what was written.

    Raises:
        UserError: a format whose images and videos are not those of the shard; features of features; too many samples
            are broken; as :func:`datamodules.shards.write.write_shards`.
    """
    if not isinstance(encoder.format, Conversations):
        raise UserError(
            f"features are kept of conversations, and data.format is {type(encoder.format).__name__}: write such data "
            "as shards first (python -m datamodules.pack)."
        )
    if caches_of(stream):
        raise UserError(f"{stream.shards[0]} holds features already: name the shards that they were made of.")
    counts = [expected_samples(shard) or sum(1 for _ in read_shard(shard)) for shard in stream.shards]
    stops = list(itertools.accumulate(counts))
    jobs = [ShardJob(i, stop - count, stop) for i, (stop, count) in enumerate(zip(stops, counts, strict=True))]
    video = repr(encoder.format.video)
    skipped = Skipped(max_skipped)
    written = write_shards(
        folder,
        jobs,
        FeatureWriter(stream.shards, encoder, request, skipped),
        made_by={
            "features": request.made_by | {"video": video},
            "of": [[shard.rpartition("/")[2], index_entry(shard)] for shard in stream.shards],
        },
        workers=0,
        label=f"features of {folder.name}",
        notes={NOTES: request.notes | {"video": video}},
    )
    if not written.complete and not written.resumed:
        skipped.check_any_used(f"in {stream.shards[0]} ...")
    left_out = sum(counts) - written.samples
    return f"{folder}: {written}" + (f"; {left_out} left out" if left_out else "")


def caches_of(stream: ShardStream) -> dict[str, dict[str, Any]]:
    """What the indices of a stream's shards say of the features in them, by folder; empty: there are none.

    Raises:
        UserError: some folders hold features, and others do not.
    """
    folders = sorted({shard.rpartition("/")[0] for shard in stream.shards if not shard.startswith("pipe:")})
    caches = {folder: notes for folder in folders if (notes := index_of(folder or ".").get(NOTES)) is not None}
    if caches and len(caches) < len(folders):
        without = next(folder for folder in folders if folder not in caches)
        raise UserError(
            f"{next(iter(caches))} holds features, and {without} does not, or has no index: cache those of all shards "
            "of a source."
        )
    return caches


def check_frames(format: SampleFormat, folder: str, notes: dict[str, Any]) -> None:
    """Whether features are of the frames that a format would read.

    Raises:
        UserError: they are of others, or the format reads no features.
    """
    if not isinstance(format, Conversations):
        raise UserError(f"{folder} holds features, which data.format {type(format).__name__} does not read.")
    if notes["video"] != repr(format.video):
        raise UserError(
            f"the features in {folder} are of other frames of videos, {notes['video']}: set data.format.video to that, "
            "or cache the features anew."
        )

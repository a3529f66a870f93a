"""Synthetic photographs with captions, packed into shards: what the data benchmarks read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.shards.sources import find_shards
from datamodules.shards.write import shard_jobs, write_shards

CAPTION = "a photograph of coarse coloured noise, number {}, as nobody ever took it"
PHOTOGRAPHS = 64
"""Different pictures; the samples repeat them, so that drawing them takes no time."""


def photograph(number: int, times: int = 1) -> bytes:
    """A smooth picture as JPEG: 640 x 480 pixels and about 80 kB, or so many times as wide and high."""
    noise = np.random.default_rng(number).integers(0, 255, (48 * times, 64 * times, 3), dtype=np.uint8)
    stream = io.BytesIO()
    size = (640 * times, 480 * times)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class Photographs:
    """Gives the samples of a shard."""

    def __init__(self) -> None:
        self.pictures = [photograph(number) for number in range(PHOTOGRAPHS)]

    def __call__(self, job: Any) -> Iterator[dict[str, Any]]:
        for index in range(job.start, job.stop):
            caption = CAPTION.format(index)
            picture = self.pictures[index % PHOTOGRAPHS]
            # Plain WebDataset pipelines read the caption as text.
            yield {"__key__": f"{index:07d}", "json": {"captions": [caption]}, "txt": caption.encode(), "jpg": picture}


def write_photographs(folder: Path, samples: int, per_shard: int) -> list[str]:
    jobs = shard_jobs(samples, per_shard)
    write_shards(folder, jobs, Photographs(), made_by={"benchmark": "dataloader"}, workers=2)
    return find_shards(str(folder))

"""Writing shards: tar files of samples, in parallel, and the index that counts what each holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from datamodules.shards import INDEX
from lavi.errors import UserError


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the same samples whatever the number of processes, since the job alone decides them."""

    index: int
    start: int
    stop: int


def shard_jobs(samples: int, per_shard: int) -> list[ShardJob]:
    """Cut ``samples`` into shards of ``per_shard``; the last one takes what is left."""
    starts = range(0, samples, per_shard)
    return [ShardJob(i, s, min(s + per_shard, samples)) for i, s in enumerate(starts)]


def write_shards(
    folder: Path,
    jobs: list[ShardJob],
    make: Callable[[ShardJob], Iterable[dict[str, Any]]],
    *,
    made_by: dict[str, Any],
    workers: int = 2,
    label: str = "writing shards",
) -> None:
    """Write one shard a job, in parallel, then the index; ``folder`` appears only when it is complete.

    Args:
        make: gives a job's samples: ``{"__key__": str, "json": dict, "jpg": bytes, ...}``. Must be picklable.
        made_by: what made the data, kept in the index.

    Raises:
        UserError: ``folder`` exists.
    """
    from rich.progress import track

    if folder.exists():
        raise UserError(f"{folder} exists and is left as it is: choose another folder, or remove it first.")
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    counts = {}
    try:
        with ProcessPoolExecutor(max_workers=min(workers, len(jobs))) as pool:
            futures = [pool.submit(_write_shard, part, job, make) for job in jobs]
            for job, future in track(list(zip(jobs, futures, strict=True)), description=label, transient=True):
                counts[shard_name(job.index)] = future.result()
    except BaseException:
        shutil.rmtree(part)
        raise
    index = {"samples": sum(counts.values()), "shards": counts, "made_by": made_by}
    (part / INDEX).write_text(json.dumps(index, indent=1))
    part.rename(folder)


def shard_name(index: int) -> str:
    """``shard-000012.tar``."""
    return f"shard-{index:06d}.tar"


def _write_shard(folder: Path, job: ShardJob, make: Callable[[ShardJob], Iterable[dict[str, Any]]]) -> int:
    """Write one shard and return how many samples it holds; times and owners are fixed, so bytes are reproducible."""
    count = 0
    with open(folder / shard_name(job.index), "wb") as stream, TarWriter(stream, mtime=0) as writer:
        for sample in make(job):
            writer.write(sample)
            count += 1
    return count

"""Writing shards: tar files of samples, in parallel, and the index that says what each holds.

    train.lock           held while one process writes
    train.part/          what is finished so far; it becomes train/ when all is
      plan.json          of what: another plan is not mixed into it
      shard-000000.tar   only when it is complete
      shard-000000.json  its record; a shard without one is written again

A run that was stopped, at whatever moment and by whatever means, goes on with the shards that are missing, and leaves
the same bytes as one that was not. ``webdataset.TarWriter`` writes the time and the owner into each member and puts a
file in place before it is whole; the shards that are written here are its form, and read by it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from datamodules.shards.counts import Counts
from datamodules.shards.processes import end_with_parent, leave_interrupts_to_parent
from datamodules.shards.sources import INDEX
from lavi.config.files import holding, replacing
from lavi.errors import UserError, reason
from lavi.report import progress

PLAN = "plan.json"
KEY = re.compile(r"(?:[^/\0]+/)*[^./\0]+")  # folders, and a name without a dot
VERSION = 2
PATIENCE = 2.0
"""Seconds to wait for the lock: as long as the processes of a run that was killed need to notice."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: the same samples whatever the number of processes, since the job alone decides them."""

    index: int
    start: int
    stop: int


Make = Callable[[ShardJob], Iterable[dict[str, Any]]]
"""Gives a job's samples: ``{"__key__": str, "json": dict, "jpg": bytes, ...}``. Must be picklable."""


@dataclass(frozen=True)
class Written:
    """The result of writing shards."""

    samples: int
    shards: int
    resumed: int = 0
    """Shards that an earlier run had finished."""
    complete: bool = False
    """The folder was complete already, and is left as it is."""

    def __str__(self) -> str:
        counts = f"{self.samples} samples in {self.shards} shards"
        if self.complete:
            return f"{counts}, there already, left as it is"
        return f"{counts}, {self.resumed} of them finished by an earlier run" if self.resumed else counts


def shard_jobs(
    samples: int, per_shard: int | None = None, *, sizes: Sequence[int] = (), max_bytes: int | None = None
) -> list[ShardJob]:
    """Cut ``samples`` into shards, in order; the last one takes what is left.

    Args:
        per_shard: samples in a shard, at most.
        sizes: bytes of each sample in a tar.
        max_bytes: of a shard, at most; a sample that is larger is a shard of its own.
    """
    starts: list[int] = []
    filled = 0
    # A tar ends with two empty blocks, and is as long as so many whole records.
    room = max_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE if max_bytes else 0
    for index in range(samples):
        size = sizes[index] if max_bytes else 0
        full = per_shard is not None and starts and index - starts[-1] >= per_shard
        if not starts or full or (max_bytes and filled + size > room):
            starts.append(index)
            filled = 0
        filled += size
    return [
        ShardJob(i, start, stop) for i, (start, stop) in enumerate(zip(starts, [*starts[1:], samples], strict=True))
    ]


def shard_name(index: int) -> str:
    """``shard-000012.tar``."""
    return f"shard-{index:06d}.tar"


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing ``folder``; may be nested.

    Raises:
        UserError: another process writes it, or nothing can be written there.
    """
    file = folder.absolute().with_name(f"{folder.absolute().name}.lock")
    busy = f"another process is writing {folder} at this moment: wait for it, or stop it first."
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(holding(FileLock(file, timeout=PATIENCE, is_singleton=True), busy=busy))
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            raise UserError(f"nothing can be written at {folder} ({reason(error)}).") from None
        yield


def write_shards(
    folder: Path,
    jobs: list[ShardJob],
    make: Make,
    *,
    made_by: dict[str, Any],
    workers: int = 2,
    label: str = "writing shards",
    skipped: Sequence[dict[str, Any]] = (),
    notes: Mapping[str, Any] | None = None,
) -> Written:
    """Write one shard a job, in parallel, then the index; ``folder`` appears only when it is complete.

    Each sample's JSON gets ``crc32``, the checksums of its members. A second call goes on with what the first left
    unfinished, and leaves a finished folder as it is.

    Args:
        made_by: what made the data, kept in the index. With the jobs it is the plan: the same plan, the same bytes.
        workers: processes; 0: this one, for a ``make`` that cannot be handed to another.
        skipped: what was left out and why, kept in the index.
        notes: more keys of the index, no part of the plan.

    Raises:
        UserError: ``folder`` or its unfinished part holds something else; another process writes it; ``make`` raised
            one; a process was killed; the disk is full.
    """
    if not jobs:
        raise UserError(f"there is not one sample to write into {folder}.")
    plan = hashlib.sha256(json.dumps([made_by, [[j.start, j.stop] for j in jobs]], sort_keys=True).encode()).hexdigest()
    with lock_folder(folder):
        if folder.exists():
            return _check_complete(folder, plan)
        part = folder.with_name(f"{folder.name}.part")
        try:
            index = {"made_by": made_by, "plan": plan, "skipped": list(skipped), **(notes or {})}
            return _write(folder, part, jobs, make, index, workers=workers, label=label)
        except OSError as error:
            raise UserError(
                f"{part} cannot be written ({reason(error)}): the finished shards are kept, and the same command goes "
                "on with the others."
            ) from None


def _check_complete(folder: Path, plan: str) -> Written:
    """The content of a complete folder.

    Raises:
        UserError: another plan wrote it.
    """
    index = _read(folder / INDEX)
    if index.get("plan") != plan:
        raise UserError(
            f"{folder} exists and is left as it is: it holds other data or was made with other settings. Choose "
            "another folder, or remove it first."
        )
    return Written(index["samples"], len(index["shards"]), resumed=len(index["shards"]), complete=True)


def _write(
    folder: Path,
    part: Path,
    jobs: list[ShardJob],
    make: Make,
    index: dict[str, Any],
    *,
    workers: int,
    label: str,
) -> Written:
    _outlive(part)
    if _read(part / INDEX).get("plan") == index["plan"]:  # killed when only the folder's name was to be given
        return _finish(part, folder, resumed=len(jobs))
    _begin(part, index["plan"])
    finished = [job for job in jobs if _is_finished(part, job)]
    missing = [job for job in jobs if job not in set(finished)]
    if missing:
        done = sum(_read(_record(part, job))["samples"] for job in finished)
        total = done + sum(job.stop - job.start for job in missing)
        with progress(label, total=total, done=done, unit="sample") as update:
            if workers:
                _in_parallel(part, missing, make, workers=workers, update=lambda new: update(done + new))
            else:
                _one_by_one(part, missing, make, update=lambda new: update(done + new))
    records = {shard_name(job.index): _read(_record(part, job)) for job in jobs}
    _sync(part)
    _put(part / INDEX, json.dumps(_index(records) | index, indent=1).encode())
    return _finish(part, folder, resumed=len(finished))


def _outlive(part: Path) -> None:
    """Wait until the processes of a run that was killed are gone: each holds a lock of its own.

    Raises:
        UserError: one does not end.
    """
    busy = f"a process of an earlier run still writes {part}: try again when it is gone."
    for file in part.glob("*.lock"):
        with holding(FileLock(file, timeout=PATIENCE), busy=busy):
            pass


def _begin(part: Path, plan: str) -> None:
    """Begin the part folder for a plan, or go on with it.

    Raises:
        UserError: it holds the shards of another plan.
    """
    begun = _read(part / PLAN).get("plan")
    if begun is None and part.exists():
        # A plan is written first: without one nothing of use is there. But what is no shard is not ours to remove.
        strange = [f.name for f in part.iterdir() if not f.name.startswith((PLAN, "shard-", INDEX, "worker-"))]
        if strange:
            raise UserError(f"{part} is needed for unfinished shards, but holds {strange[0]}: remove it first.")
        shutil.rmtree(part)
    if begun not in (None, plan):
        raise UserError(
            f"{part} holds unfinished shards of other data or other settings: give the command they were begun with, "
            f"or remove {part} to begin anew."
        )
    part.mkdir(exist_ok=True)
    _put(part / PLAN, json.dumps({"plan": plan}).encode())


def _is_finished(part: Path, job: ShardJob) -> bool:
    """Whether a shard is there with its record, whole."""
    record = _read(_record(part, job))
    shard = part / shard_name(job.index)
    return "bytes" in record and shard.is_file() and shard.stat().st_size == record["bytes"]


def _index(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counts = Counts()
    for record in records.values():
        counts += Counts.from_json(record["counts"])
    shards = {name: {key: record[key] for key in ("samples", "bytes", "sha256")} for name, record in records.items()}
    return {"version": VERSION, "samples": counts.samples, "shards": shards, "statistics": counts.summary()}


def _finish(part: Path, folder: Path, *, resumed: int) -> Written:
    """Take away what only an unfinished folder needs, and give the folder its name; killed in between, do so again."""
    index = _read(part / INDEX)
    for file in part.iterdir():
        if file.name != INDEX and file.name not in index["shards"]:
            file.unlink()
    _sync(part)
    part.rename(folder)
    _sync(folder.absolute().parent)
    return Written(index["samples"], len(index["shards"]), resumed=resumed)


def _record(part: Path, job: ShardJob) -> Path:
    return (part / shard_name(job.index)).with_suffix(".json")


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _put(file: Path, data: bytes) -> None:
    with replacing(file) as part:
        part.write_bytes(data)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """What a process is given when it starts."""

    part: Path
    make: Make
    done: Any
    """Shared: samples written of each job, and at the end whether to stop. A process killed can lock no one out."""


_worker: _Worker | None = None
_presence: FileLock | None = None


class _Stopped(Exception):
    pass


def _one_by_one(part: Path, jobs: list[ShardJob], make: Make, *, update: Callable[[int], object]) -> None:
    """Write the shards of ``jobs`` in this process."""
    before = 0
    for job in jobs:
        before += _write_shard(part, job, make, lambda samples, before=before: update(before + samples))  # type: ignore[misc]


def _in_parallel(
    part: Path, jobs: list[ShardJob], make: Make, *, workers: int, update: Callable[[int], object]
) -> None:
    """Write the shards of ``jobs``; the first error stops all."""
    counted = RawArray(ctypes.c_longlong, len(jobs) + 1)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), initializer=_start, initargs=(_Worker(part, make, counted),))
    left = {pool.submit(_work, slot, job) for slot, job in enumerate(jobs)}
    try:
        while left:
            finished, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            update(sum(counted[: len(jobs)]))
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a process that wrote {part} was killed (is the memory enough for {workers} workers?): the finished "
            "shards are kept, and the same command goes on with the others."
        ) from None
    finally:
        counted[len(jobs)] = 1
        pool.shutdown(cancel_futures=True)


def _start(worker: _Worker) -> None:
    """Begin a process: the parent alone hears Ctrl-C, and none outlives it for long."""
    global _worker, _presence
    _worker = worker
    leave_interrupts_to_parent()
    # Locked before the parent is seen to be alive: a run that comes after it cannot miss this process.
    _presence = FileLock(worker.part / f"worker-{os.getpid()}.lock")
    _presence.acquire()
    end_with_parent()


def _work(slot: int, job: ShardJob) -> None:
    """Write one shard in a process of the pool, and say how far it is."""
    assert _worker is not None
    worker = _worker

    def count(samples: int) -> None:
        worker.done[slot] = samples
        if worker.done[-1]:
            raise _Stopped

    _write_shard(worker.part, job, worker.make, count)


def _write_shard(folder: Path, job: ShardJob, make: Make, written: Callable[[int], object]) -> int:
    """Write one shard and its record, each under its name only when it is complete; how many samples it has.

    Args:
        written: called behind each sample with their number.
    """
    shard = folder / shard_name(job.index)
    counts = Counts()
    with replacing(shard) as part, open(part, "wb") as stream:
        summed = _Summed(stream)
        for key, members in _samples(job, make, counts):
            for name, data in sorted(members.items()):
                summed.write(header(f"{key}.{name}", len(data)))
                summed.write(data)
                summed.write(bytes(-len(data) % tarfile.BLOCKSIZE))
            written(counts.samples)
        end = 2 * tarfile.BLOCKSIZE
        summed.write(bytes(end + -(summed.bytes + end) % tarfile.RECORDSIZE))
    record = {"samples": counts.samples, "bytes": summed.bytes, "sha256": summed.sha.hexdigest()}
    _put(_record(folder, job), json.dumps(record | {"counts": counts.to_json()}).encode())
    return counts.samples


def _samples(job: ShardJob, make: Make, counts: Counts) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A job's samples as bytes, checked and counted, with the checksums in their JSON."""
    keys: set[str] = set()
    for sample in make(job):
        key = sample["__key__"]
        if not KEY.fullmatch(key) or ".." in key.split("/") or key in keys:
            raise UserError(f"sample '{key}': a key is given once, has no dot in its name, and leads nowhere else.")
        keys.add(key)
        media = {name: data for name, data in sample.items() if name not in ("__key__", "json")}
        record = sample["json"] | {"crc32": {name: zlib.crc32(data) for name, data in media.items()}}
        counts.add(record, media)
        yield key, {"json": json.dumps(record).encode()} | media


_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
_BLANK = bytearray(tarfile.TarInfo().tobuf(tarfile.PAX_FORMAT))
_BLANK[_CHECKSUM] = b" " * 8  # what a checksum is taken over


def header(name: str, size: int) -> bytes:
    """The header of a member of ``size`` bytes in a tar. Times, owners and rights are those of an empty
    ``TarInfo``: the same names and bytes make the same tar, whenever and by whomever it is written.
    """
    if not name.isascii() or len(name) > tarfile.LENGTH_NAME or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    # The same bytes, in a quarter of the time: tarfile takes as long for a header as for a picture's checksum.
    block = bytearray(_BLANK)
    block[: len(name)] = name.encode()
    block[_SIZE] = b"%011o\0" % size
    block[_CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


class _Summed:
    """A file to write to that knows the checksum and the number of its bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.sha.update(data)
        self.bytes += len(data)
        self.stream.write(data)

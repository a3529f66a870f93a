"""Packing shards, timed: the whole command and without its start, against a bare loop and against copying the files.

The bare loop reads the same files, takes the same checksums and writes them one behind the other in as many processes;
copying never leaves the kernel. ``python benchmarks/dataloader.py`` runs it among its questions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photographs import CAPTION, PHOTOGRAPHS, photograph


def packer(work: Path, *, samples: int, times: int, workers: int, rounds: int = 5) -> list[dict[str, Any]]:
    """The packer, the whole command and without what it takes to start, on photographs ``times`` as wide and high."""
    images = work / f"files-{times}"
    images.mkdir()
    pictures = [photograph(number, times) for number in range(PHOTOGRAPHS)]
    entries = []
    for number in range(samples):
        (images / f"{number:06d}.jpg").write_bytes(pictures[number % PHOTOGRAPHS])
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": CAPTION.format(number)}]
        entries.append({"id": number, "image": f"{number:06d}.jpg", "conversations": turns})
    few, per_shard = samples // 10, 500 // times
    for name, some in (("few", entries[:few]), ("all", entries)):
        (work / f"{name}.json").write_text(json.dumps(some))

    def pack(name: str) -> None:
        what = ["--json", work / f"{name}.json", "--images", images, "--out", work / name]
        how = ["--per-shard", str(per_shard), "--workers", str(workers)]
        command = [sys.executable, "-m", "datamodules.pack", *what, *how]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def bare() -> None:
        (work / "bare").mkdir()
        files = sorted(images.iterdir())
        starts = range(0, samples, per_shard)
        shards = [(work / "bare" / f"{start}", files[start : start + per_shard]) for start in starts]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.starmap(append_files, shards)

    contestants = {
        "copying": lambda: shutil.copytree(images, work / "copying"),
        "bare": bare,
        "start": lambda: pack("few"),
        "whole": lambda: pack("all"),
    }
    times_taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times_taken[name].append(seconds_of(contestant))
        for folder in ("copying", "bare", "few", "all"):
            shutil.rmtree(work / folder)
    bytes_each = sum(map(len, pictures)) / PHOTOGRAPHS
    shutil.rmtree(images)
    rest = [whole - start for whole, start in zip(times_taken["whole"], times_taken["start"], strict=True)]
    records = []
    for name, count, seconds in (
        ("whole command", samples, times_taken["whole"]),
        ("without its start", samples - few, rest),
    ):
        rate = count / statistics.median(seconds)
        ratios = {
            f"speed_over_{other}": statistics.median(
                a * count / samples / b for a, b in zip(times_taken[other], seconds, strict=True)
            )
            for other in ("bare", "copying")
        }
        sized = {"samples_per_s": rate, "mib_per_s": rate * bytes_each / 2**20}
        question = {"question": "packer", "name": f"{bytes_each / 1000:.0f} kB a photograph, {name}"}
        records.append(question | sized | ratios)
    return records


def append_files(out: Path, files: list[Path]) -> None:
    """Read each file, take its checksum and that of all, and write it behind the one before."""
    every = hashlib.sha256()
    with open(out, "wb") as stream:
        for file in files:
            data = file.read_bytes()
            zlib.crc32(data)
            every.update(data)
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that some work takes, until all is on the disk."""
    started = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - started

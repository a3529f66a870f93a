"""Your data, packed into shards. Images and videos are stored as they are.

    python -m datamodules.pack --json train.json --images images --out shards/train
    python -m datamodules.pack --json clips.jsonl --videos clips --out shards/clips --shard-size 500MB
    python -m datamodules.pack --coco captions_train2017.json --images train2017 --out shards/coco
    python -m datamodules.pack --csv faces.csv --columns image=path,answer=name --images faces --out shards/faces
    python -m datamodules.pack --dataset a_dataset --out shards/a_dataset
    python -m datamodules.pack --reader my_package.read data.xml --images images --out shards/mine

JSON is LLaVA's: ``{"id": ..., "image": "file" or ["file", ...], "conversations": [{"from": "human", "value":
"<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}``, as a list or one object a line. An answer may carry
``"family"`` and ``"level"`` beside its value: accuracies are then reported for each. A ``"video"`` is a file, with
``"clip": [start, end]`` in seconds if only that part is meant, or a folder with its frames.

A reader of your own takes the file and gives a `datamodules.formats.files.Source`: its name and such objects.

All entries are checked before the first shard is written. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tarfile import RECORDSIZE
from typing import Any

from datamodules.formats.datasets import open_dataset, read_cell
from datamodules.formats.entries import BadEntry, Cell, Folders, Item, entry_of
from datamodules.formats.files import Source
from datamodules.formats.readers import READERS, own_reader
from datamodules.shards.counts import type_of
from datamodules.shards.processes import in_order
from datamodules.shards.sources import INDEX, read_index
from datamodules.shards.write import ShardJob, lock_folder, shard_jobs, write_shards
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.data.videos import is_video
from lavi.errors import UserError, reason
from lavi.report import track

PER_SHARD = 1000
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """The result of the check. The good entries are in a file, one a line: of any number, little is in memory."""

    file: Path
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Where each entry's line starts."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Bytes of each entry in a tar."""
    digest: str = ""
    """Of all lines: the same data, the same digest."""
    total: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Names of the entries that cannot be packed, by cause."""
    first: list[str] = field(default_factory=list)
    """The errors of the first three, as sentences."""

    def skip(self, error: BadEntry) -> None:
        """Note an entry that cannot be packed."""
        self.skipped.setdefault(error.cause, []).append(error.name.strip("'"))
        if len(self.first) < 3:
            self.first.append(str(error))


def check(source: Source, folders: Folders, file: Path, *, workers: int) -> Checked:
    """Check all entries, and write the good ones to ``file``.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        return _check(source, folders, file, workers=workers)
    except OSError as error:
        raise UserError(f"{file}, a list of the checked entries, cannot be written ({reason(error)}).") from None


def _check(source: Source, folders: Folders, file: Path, *, workers: int) -> Checked:
    checked = Checked(file)
    digest = hashlib.sha256()
    results = in_order(partial(_checked, folders=folders), enumerate(source.items), workers=workers)
    with open(file, "wb") as stream:
        for result in track(results, f"checking {source.name}", total=source.total):
            checked.total += 1
            if isinstance(result, BadEntry):
                checked.skip(result)
                continue
            line, size = result
            digest.update(line)
            checked.offsets.append(stream.tell())
            checked.sizes.append(size)
            stream.write(line)
    checked.digest = digest.hexdigest()
    return checked


def _checked(numbered: tuple[int, Item | BadEntry], folders: Folders) -> tuple[bytes, int] | BadEntry:
    """An entry as a line of the file of all, and its bytes in a tar; or what is wrong with it."""
    try:
        entry = entry_of(*numbered, folders)
    except BadEntry as error:
        return error
    return json.dumps([entry.key, entry.record, entry.media, entry.size]).encode() + b"\n", entry.size


def refuse_too_many(checked: Checked, name: str, max_skipped: float) -> None:
    """Stop before hours of packing what has more broken entries than are allowed.

    Raises:
        UserError: with the first three.
    """
    skipped = sum(map(len, checked.skipped.values()))
    if not checked.offsets or skipped > max_skipped * checked.total:
        first = "; ".join(checked.first) or "it has none"
        more = f"; and {skipped - 3} more" if skipped > 3 else ""
        raise UserError(
            f"{skipped} of {checked.total} entries of {name} cannot be packed, more than --max-skipped={max_skipped:g} "
            f"allows: {first}{more}."
        )


# --- packing ----------------------------------------------------------------------------------------------------------


Dataset = tuple[Path, str | None]
"""A ``datasets`` folder and its split."""


def make_samples(
    job: ShardJob, *, entries: Path, offsets: dict[int, int], folders: Folders, dataset: Dataset
) -> Iterator[dict[str, Any]]:
    """The samples of one shard.

    Args:
        entries: the file of :class:`Checked`.
        offsets: where the first entry of each shard stands in it.

    Raises:
        UserError: a file has gone since the check.
    """
    with open(entries, "rb") as stream:
        stream.seek(offsets[job.index])
        for _ in range(job.start, job.stop):
            key, record, media, _ = json.loads(stream.readline())
            members = {member: _bytes_of(member, where, record, folders, dataset) for member, where in media}
            yield {"__key__": key, "json": record} | members


def _bytes_of(member: str, where: Any, record: dict[str, Any], folders: Folders, dataset: Dataset) -> bytes:
    if not isinstance(where, str):
        return read_cell(open_dataset(*dataset), Cell(*where))
    folder = folders.of("video" if "frames" in record or is_video(type_of(member)) else "image")
    try:
        return (folder / where).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / where} was there when the entries were checked, and now is not: {error}.") from None


def source_of(args: argparse.Namespace) -> tuple[str, Path, Source]:
    """The option that names the source, its file, and its entries.

    Raises:
        UserError: there is nothing, or something else.
    """
    if args.reader is not None:
        name, file = args.reader[0], path(args.reader[1])
        if not file.exists():
            raise UserError(f"--reader: there is no {file}.")
        source = own_reader(name)(file)
        if not isinstance(source, Source):
            raise UserError(f"--reader: {name} gives a {type(source).__name__}, no datamodules.formats.files.Source.")
        return f"reader {name}", file, source
    kind, file = next((kind, file) for kind in READERS if (file := getattr(args, kind)) is not None)
    return kind, file, READERS[kind](file, args.columns, args.split)


def pack(args: argparse.Namespace) -> None:
    """Check all entries, then write the shards."""
    if os.path.exists(args.out) and not (args.out / INDEX).is_file():
        raise UserError(f"{args.out} exists and is left as it is: choose another --out, or remove it first.")
    kind, file, source = source_of(args)
    folders = Folders(args.images, args.videos)
    with lock_folder(args.out):
        entries = args.out.absolute().with_name(f"{args.out.absolute().name}.entries")
        try:
            checked = check(source, folders, entries, workers=args.workers)
            refuse_too_many(checked, file.name, args.max_skipped)
            jobs = shard_jobs(len(checked.offsets), args.per_shard, sizes=checked.sizes, max_bytes=args.shard_size)
            make = partial(
                make_samples,
                entries=entries,
                offsets={job.index: checked.offsets[job.start] for job in jobs},
                folders=folders,
                dataset=(file, args.split),
            )
            written = write_shards(
                args.out,
                jobs,
                make,
                made_by={kind: file.name, "entries": checked.digest},
                workers=args.workers,
                label=f"packing {file.name}",
                skipped=[{"cause": c, "samples": len(ids), "ids": ids} for c, ids in sorted(checked.skipped.items())],
            )
        finally:
            entries.unlink(missing_ok=True)
    print(f"{args.out}: {written}")
    if unreadable := (read_index(str(args.out)) or {})["statistics"]["unreadable"]:
        print(f"{unreadable} images do not open: `python -m datamodules.inspect {args.out} --check` names them")
    for cause, ids in sorted(checked.skipped.items()):
        print(f"skipped {len(ids)} of {checked.total}: {cause} ({', '.join(ids[:3])}{' ...' if ids[3:] else ''})")


# --- the command ------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """``500MB`` as a number of bytes.

    Raises:
        UserError: it is no size, or smaller than any shard.
    """
    size_and_unit = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(size_and_unit[1]) * UNITS[size_and_unit[2]]) if size_and_unit else 0
    if size < RECORDSIZE:
        what = "is no size" if size < 1 else "is smaller than any shard"
        raise UserError(f"--shard-size={text} {what}: say it as 500MB or 2GB.")
    return size


def parse_columns(text: str) -> dict[str, str]:
    """``image=path,answer=reply`` as a mapping.

    Raises:
        UserError: it is of another form.
    """
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if not all(meaning and column for meaning, _, column in pairs):
        raise UserError(f"--columns={text} is not of the form image=path,question=...,answer=...")
    return {meaning.strip(): column.strip() for meaning, _, column in pairs}


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m datamodules.pack", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", type=path, metavar="FILE", help="LLaVA or ShareGPT conversations")
    source.add_argument("--coco", type=path, metavar="FILE", help="COCO captions")
    source.add_argument("--csv", type=path, metavar="FILE", help="a table with a header; .tsv: cells between tabs")
    source.add_argument("--dataset", type=path, metavar="FOLDER", help="of save_to_disk, or with parquet files")
    source.add_argument("--reader", nargs=2, metavar=("NAME", "FILE"), help="a function of your own, and its file")
    parser.add_argument("--split", metavar="NAME", help="which split of a --dataset that has several")
    parser.add_argument("--images", type=path, metavar="FOLDER", help="where the names of images start from")
    parser.add_argument("--videos", type=path, metavar="FOLDER", help="where the names of videos start from")
    parser.add_argument(
        "--columns", default="", metavar="KIND=NAME,...", help="of a table, if their names do not say it"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="the shards")
    parser.add_argument(
        "--per-shard",
        type=whole_number(1),
        metavar="N",
        help=f"samples in a shard (default: {PER_SHARD}, any with --shard-size)",
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="bytes in a shard, at most; as 500MB")
    parser.add_argument("--workers", type=whole_number(1), default=os.cpu_count() or 2, help="processes")
    parser.add_argument("--max-skipped", type=float, default=0.0, help="share of entries that may be broken")
    args = parser.read()
    if args.per_shard is None and args.shard_size is None:
        args.per_shard = PER_SHARD
    if args.split is not None and args.dataset is None:
        raise UserError(f"--split={args.split} is of a --dataset, and none is given.")
    if not 0 <= args.max_skipped <= 1:
        raise UserError(f"--max-skipped={args.max_skipped:g} is a share, from 0 to 1.")
    args.shard_size = parse_size(args.shard_size) if args.shard_size is not None else None
    args.columns = parse_columns(args.columns)
    if args.columns and args.csv is None and args.dataset is None:
        raise UserError("--columns are those of a --csv or a --dataset, and neither is given.")
    pack(args)


if __name__ == "__main__":
    main()

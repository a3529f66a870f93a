"""What data sets come as, and how each is read item by item.

    LLaVA, ShareGPT   [{"id", "image": "a.jpg" or [...], "video": ..., "conversations": [{"from", "value"}, ...]}, ...]
                      as a list, or one object a line (read line by line); "messages" with "role" and "content" too
    COCO captions     {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}
    CSV, TSV          columns image, video or file; question and answer, or caption
    datasets          a folder written by ``save_to_disk``, or one of parquet files; columns as of a CSV, images inside

Each reader gives items in LLaVA's form, or with ``captions``; :func:`datamodules.entries.entry_of` checks one.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from datamodules.counts import UNREADABLE
from datamodules.entries import BadEntry, Cell, Item, listed
from lavi.errors import UserError, nearest
from lavi.video import is_video

COLUMNS = {
    "id": ("id",),
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "file": ("file", "file_name"),
    "question": ("question", "prompt"),
    "answer": ("answer",),
    "caption": ("caption", "captions", "text"),
    "messages": ("messages", "conversations"),
}
"""What a table's columns mean, by their names."""


@dataclass(frozen=True)
class Source:
    """A data set to be packed.

    Args:
        items: in order; an error takes the place of one that cannot be read.
        total: how many, if that is known.
    """

    name: str
    items: Iterable[Item | BadEntry]
    total: int | None = None


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Source:
    """LLaVA's and ShareGPT's JSON, a list or one object a line.

    Raises:
        UserError: not there, not JSON, an empty list.
    """
    if _first_character(file) != "[":
        return Source(file.name, _lines(file))
    entries = _load(file)
    if not entries:
        raise UserError(f"{file} is not a list of conversations, or an empty one.")
    return Source(file.name, entries, len(entries))


def _first_character(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode(errors="replace")
    except OSError as error:
        _unreadable(file, error)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}).") from None
    except OSError as error:
        _unreadable(file, error)


def _unreadable(file: Path, error: OSError) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise UserError(f"there is no {file}.") from None
    raise UserError(f"{file} cannot be read ({error.strerror}).") from None


def _lines(file: Path) -> Iterator[Item | BadEntry]:
    with open(file, "rb") as stream:
        found = False
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                if not found:
                    raise UserError(f"{file} is not JSON, and its line {number} is not either ({error}).") from None
                item = BadEntry(f"of line {number}", "is not JSON")
            found = True
            yield item
        if not found:
            raise UserError(f"{file} is not JSON (it is empty).")


def read_coco(file: Path) -> Source:
    """COCO's captions: one item an image, with all its captions.

    Raises:
        UserError: not there, not JSON, of another form.
    """
    found = _load(file)
    images, annotations = (_dicts(found, key) for key in ("images", "annotations"))
    if not images or not annotations:
        raise UserError(f"{file} is not COCO's captions: it has no lists 'images' and 'annotations'.")
    if not any("caption" in annotation for annotation in annotations):
        raise UserError(f"{file} has annotations without 'caption': COCO's files of captions have it.")
    return Source(file.name, list(_coco_items(images, annotations)), len(images))


def _dicts(found: Any, key: str) -> list[Item]:
    """The list of objects under a key; empty if there is none."""
    listed = found.get(key) if isinstance(found, dict) else None
    return listed if isinstance(listed, list) and all(isinstance(one, dict) for one in listed) else []


def _coco_items(images: list[Item], annotations: list[Item]) -> Iterator[Item | BadEntry]:
    captions: dict[Any, list[Any]] = {image.get("id"): [] for image in images}
    for annotation in annotations:
        number = annotation.get("image_id")
        if number in captions:
            captions[number].append(annotation.get("caption"))
        else:
            yield BadEntry(f"'{annotation.get('id')}'", "describes an image that is not listed")
    for image in images:
        yield {"id": image.get("id"), "image": image.get("file_name"), "captions": captions[image.get("id")]}


# --- tables -----------------------------------------------------------------------------------------------------------


def chosen_columns(found: list[str], given: Mapping[str, str], name: str) -> dict[str, str]:
    """What a table's columns are for: those given, else those with a known name.

    Returns:
        The column of each meaning of :data:`COLUMNS` that there is.

    Raises:
        UserError: a meaning or a column that there is not; nothing that could be trained on.
    """
    for meaning, column in given.items():
        if meaning not in COLUMNS:
            raise UserError(f"--columns: '{meaning}' is no kind of column, {nearest(meaning, COLUMNS)}")
        if column not in found:
            raise UserError(f"--columns: {name} has no column '{column}', {nearest(column, found)}")
    lower = {column.lower(): column for column in reversed(found)}
    guessed = {
        meaning: lower[known]
        for meaning, names in COLUMNS.items()
        for known in reversed(names)
        if known in lower and lower[known] not in given.values()
    }
    chosen = guessed | dict(given)
    if not ({"question", "answer"} <= set(chosen) or {"caption", "messages"} & set(chosen)):
        raise UserError(
            f"{name} has the columns {', '.join(found)}: question and answer, or caption, are needed; say which they "
            "are, as in --columns question=...,answer=..."
        )
    return chosen


def item_of_row(row: Mapping[str, Any], *, name: str) -> Item:
    """A table's row, by what its columns mean, in LLaVA's form or with captions."""
    images, videos = listed(row.get("image")), listed(row.get("video"))
    for file in listed(row.get("file")):
        (videos if is_video(str(file)) else images).append(file)
    item: Item = {"id": row.get("id") or name, "image": images, "video": videos}
    if row.get("messages") is not None:
        return item | {"conversations": row["messages"]}
    if row.get("question") and row.get("answer"):
        return item | {"conversations": _asked(row["question"], row["answer"], images, videos)}
    return item | {"captions": listed(row.get("caption"))}


def _asked(question: Any, answer: Any, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """One turn; what is seen stands before the question, if that does not say where."""
    text = str(question)
    if "<image>" not in text and "<video>" not in text:
        text = "<image>\n" * len(images) + "<video>\n" * len(videos) + text
    return [{"from": "human", "value": text}, {"from": "gpt", "value": str(answer)}]


def read_table(file: Path, columns: Mapping[str, str]) -> Source:
    """A CSV file, or a TSV, with a header.

    Raises:
        UserError: not there, no header, columns that say nothing.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=_delimiter(file)), [])
    except OSError as error:
        _unreadable(file, error)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a table of text ({error}).") from None
    return Source(file.name, _rows(file, header, chosen_columns(header, columns, str(file))))


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() in (".tsv", ".tab") else ","


def _rows(file: Path, header: list[str], columns: dict[str, str]) -> Iterator[Item | BadEntry]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a conversation may be longer than csv's 131072
    with open(file, encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter=_delimiter(file))
        try:
            for number, cells in enumerate(rows):
                if number and cells:
                    yield _row(number, cells, header, columns)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read behind line {rows.line_num} ({error}).") from None


def _row(number: int, cells: list[str], header: list[str], columns: dict[str, str]) -> Item | BadEntry:
    if len(cells) != len(header):
        return BadEntry(
            f"of row {number}", "has another number of cells", f" has {len(cells)} cells, the header {len(header)}"
        )
    named = dict(zip(header, cells, strict=True))
    return item_of_row({meaning: named[column] for meaning, column in columns.items()}, name=str(number))


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


def read_dataset(folder: Path, columns: Mapping[str, str]) -> Source:
    """A ``datasets`` folder, its images as cells.

    Raises:
        UserError: ``datasets`` is not installed; no such folder; columns that say nothing.
    """
    data = _opened(folder)
    images = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    known = {name.lower() for name in COLUMNS["image"]}
    given = dict(columns)
    if images and "image" not in given and not any(name.lower() in known for name in images):
        given["image"] = images[0]
    chosen = chosen_columns(list(data.features), given, str(folder))
    return Source(folder.name, _dataset_items(data, chosen), len(data))


@lru_cache(maxsize=1)
def open_dataset(folder: Path) -> Any:
    """What :func:`read_dataset` read, opened once in each process."""
    return _opened(folder)


def _opened(folder: Path) -> Any:
    """A ``datasets.Dataset`` that gives its rows as Arrow stores them; nothing is decoded."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("--dataset needs the package `datasets`: pip install 'lavi[datasets]'.") from None
    import pyarrow as pa

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}.")
    datasets.disable_progress_bars()
    parquet = sorted(map(str, folder.rglob("*.parquet")))
    try:
        if parquet:
            found = datasets.load_dataset("parquet", data_files=parquet, split="train")
        else:
            found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} is neither written by save_to_disk nor a folder of parquet files ({said})."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        raise UserError(
            f"{folder} has the splits {', '.join(found)}: give one of them, as in {folder}/{next(iter(found))}."
        )
    return found.with_format("arrow")


def _dataset_items(data: Any, columns: dict[str, str]) -> Iterator[Item]:
    names = list(dict.fromkeys(columns.values()))
    first = 0
    for table in data.select_columns(names).iter(batch_size=64):
        for row, values in enumerate(table.to_pylist(), start=first):
            meant = {meaning: _without_nulls(values[column]) for meaning, column in columns.items()}
            if "image" in columns:
                meant["image"] = [
                    _cell(image, row, columns["image"], number) for number, image in enumerate(listed(meant["image"]))
                ]
            yield item_of_row(meant, name=str(row))
        first += len(table)


def _without_nulls(value: Any) -> Any:
    """Arrow gives each object all keys that any has; those it never had are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _cell(image: Any, row: int, column: str, number: int) -> Any:
    """An image that is inside, or the file that it is in."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        return image.get("path") if isinstance(image, dict) else image
    try:
        with Image.open(io.BytesIO(data)) as opened:
            kind = (opened.format or "").lower()
    except UNREADABLE:
        kind = "not an image"
    return Cell({"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind), len(data), zlib.crc32(data), row, column, number)


def read_cell(data: Any, cell: Cell) -> bytes:
    """The bytes of a cell."""
    value = listed(data[cell.row].column(cell.column).to_pylist()[0])[cell.number]
    found: bytes = value["bytes"] if isinstance(value, dict) else value
    return found


READERS: dict[str, Callable[[Path, Mapping[str, str]], Source]] = {
    "json": lambda file, _: read_json(file),
    "coco": lambda file, _: read_coco(file),
    "csv": read_table,
    "dataset": read_dataset,
}
"""By the option that names the source."""

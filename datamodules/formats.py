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
import errno
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, NoReturn

from PIL import Image

from datamodules.counts import UNREADABLE
from datamodules.entries import BadEntry, Cell, Item, listed
from lavi.errors import UserError, nearest, reason
from lavi.images import JSON_TEXT, what_it_is
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
NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
"""What the system says of a cache that cannot be written."""


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
    head = _head(file)
    if not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return Source(file.name, _lines(file))
    entries = _load(file)
    if not entries:
        raise UserError(f"{file} is not a list of conversations, or an empty one.")
    return Source(file.name, entries, len(entries))


def _head(file: Path, *allowed: str) -> bytes:
    """The first bytes of a file.

    Args:
        allowed: what of :func:`lavi.images.what_it_is` the file may be, besides JSON.

    Raises:
        UserError: it cannot be read, or is something else altogether.
    """
    try:
        with open(file, "rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        _unreadable(file, error)
    found = what_it_is(head)
    if found and found not in (JSON_TEXT, *allowed):
        raise UserError(f"{file} is {found}.")
    return head


def _load(file: Path) -> Any:
    _head(file)
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
            except (ValueError, RecursionError):
                if not found:
                    _load(file)  # one object over many lines, or no JSON at all
                    raise UserError(
                        f"{file} is one JSON object: a list of conversations is needed, or one object a line."
                    ) from None
                item = BadEntry(f"of line {number}", "is not JSON")
            found = True
            yield item


def read_coco(file: Path) -> Source:
    """COCO's captions: one item an image, with all its captions.

    Raises:
        UserError: not there, not JSON, of another form.
    """
    found = _load(file)
    images, annotations = (_dicts(found, key) for key in ("images", "annotations"))
    if not images or not annotations:
        raise UserError(f"{file} is not COCO's captions: it has no lists 'images' and 'annotations'.")
    if not all(isinstance(image.get("id"), str | int) for image in images):
        raise UserError(f"{file} lists images whose 'id' is no number and no text.")
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
        if isinstance(number, str | int) and number in captions:
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


def item_of_row(row: Mapping[str, Any], *, name: str) -> Item | BadEntry:
    """A table's row, by what its columns mean, in LLaVA's form or with captions; or what is wrong with it.

    Numbers, truth values and dates in the place of a text are said as Python writes them (``0``, ``False``,
    ``2024-05-01``). No text at all, blanks and NaN are nothing. A list or a mapping is none of these: a question, an
    answer and each of the captions is one text.
    """
    try:
        return _item(row, name)
    except BadEntry as error:
        return error


def _item(row: Mapping[str, Any], name: str) -> Item:
    images, videos = listed(row.get("image")), listed(row.get("video"))
    for file in listed(row.get("file")):
        (videos if is_video(str(file)) else images).append(file)
    given = row.get("id")
    called = name if given is None or given == "" else str(given)
    item: Item = {"id": called, "image": images, "video": videos}
    if row.get("messages") is not None:
        return item | {"conversations": row["messages"]}
    question, answer = (_cell_text(row.get(meaning), f"'{called}'", meaning) for meaning in ("question", "answer"))
    if question is not None and answer is not None:
        return item | {"conversations": _asked(question, answer, images, videos)}
    captions = [_cell_text(caption, f"'{called}'", "caption") for caption in listed(row.get("caption"))]
    if not any(captions) and {"question", "answer"} <= row.keys():
        raise BadEntry(f"'{called}'", f"has no {'question' if question is None else 'answer'}")
    return item | {"captions": captions}


def _cell_text(value: Any, called: str, meaning: str) -> str | None:
    """What a cell says, as :func:`item_of_row` has it; None: nothing.

    Raises:
        BadEntry: it is no text.
    """
    if value is None or value != value:
        return None
    if isinstance(value, list | tuple | dict | bytes):
        what = {dict: "mapping", bytes: "number of bytes"}.get(type(value), "list")
        article = "an" if meaning == "answer" else "a"
        raise BadEntry(called, f"has {article} {meaning} that is a {what}, and no text")
    text = str(value)
    return text if text.strip() else None


def _asked(question: str, answer: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """One turn; what is seen stands before the question, if that does not say where."""
    if "<image>" not in question and "<video>" not in question:
        question = "<image>\n" * len(images) + "<video>\n" * len(videos) + question
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read_table(file: Path, columns: Mapping[str, str]) -> Source:
    """A CSV file, or a TSV, with a header.

    Raises:
        UserError: not there, no header, columns that say nothing.
    """
    _head(file)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=_delimiter(file)), [])
    except OSError as error:
        _unreadable(file, error)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a table of text ({error}).") from None
    chosen = chosen_columns(header, columns, str(file))
    if twice := [column for column in chosen.values() if header.count(column) > 1]:
        raise UserError(f"{file} has two columns '{twice[0]}': give them different names.")
    return Source(file.name, _rows(file, header, chosen))


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


def read_dataset(folder: Path, columns: Mapping[str, str], split: str | None = None) -> Source:
    """A ``datasets`` folder, its images as cells.

    Args:
        split: which one, of a folder that has several.

    Raises:
        UserError: ``datasets`` is not installed; no such folder; several splits; columns that say nothing.
    """
    data = _opened(folder, split)
    images = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    known = {name.lower() for name in COLUMNS["image"]}
    given = dict(columns)
    if images and "image" not in given and not any(name.lower() in known for name in images):
        given["image"] = images[0]
    chosen = chosen_columns(list(data.features), given, str(folder))
    return Source(folder.name, _dataset_items(data, chosen), len(data))


@lru_cache(maxsize=1)
def open_dataset(folder: Path, split: str | None) -> Any:
    """What :func:`read_dataset` read, opened once in each process."""
    return _opened(folder, split)


def _opened(folder: Path, split: str | None) -> Any:
    """A ``datasets.Dataset`` that gives its rows as Arrow stores them; nothing is decoded."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("--dataset needs the package `datasets`: pip install 'lavi[datasets]'.") from None
    import pyarrow as pa

    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}.")
    datasets.disable_progress_bars()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".parquet", ".arrow"))
    for file in files:
        _head(file, "a parquet file")
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    try:
        if parquet:
            splits = _parquet_splits(folder, parquet)
            found = datasets.load_dataset("parquet", data_files=splits[_chosen(splits, split, folder)], split="train")
        else:
            found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        if (why := reason(error)) in NO_ROOM:
            raise UserError(
                f"{folder} cannot be copied into the cache of `datasets` ({why}): set HF_HOME to a folder with room."
            ) from None
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} is neither written by save_to_disk nor a folder of parquet files ({said})."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split is None:
            raise UserError(
                f"{folder} has the splits {', '.join(found)}: give one of them, as in {folder}/{next(iter(found))}."
            )
        found = found[_chosen(dict(found), split, folder)]
    elif split is not None and not parquet:
        raise UserError(f"--split={split}: {folder} holds one set without splits, leave it out.")
    return found.with_format("arrow")


def _chosen(splits: Mapping[str, Any], split: str | None, folder: Path) -> str:
    """The split to read: the one that is asked for, or the only one.

    Raises:
        UserError: there are several, or there is no such one.
    """
    named = sorted((name for name in splits if name), key=lambda name: (name != "train", name))
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None:
        others = " and files that name none" if "" in splits else ""
        raise UserError(
            f"{folder} has the splits {', '.join(named)}{others}: give one of them, as in --split={named[0]}."
        )
    if not named:
        raise UserError(f"--split={split}: the files of {folder} name no splits, leave it out.")
    if split not in named:
        raise UserError(f"--split={split}: {folder} has no such split, {nearest(split, named)}")
    return split


def _parquet_splits(folder: Path, files: Sequence[Path]) -> dict[str, list[str]]:
    """Parquet files by the splits that a dataset card declares, or their names tell; "" where they tell none."""
    declared = _declared_splits(folder)
    splits: dict[str, list[str]] = {}
    for file in files:
        split = declared.get(os.path.abspath(file), "") if declared else split_of(file.relative_to(folder))
        splits.setdefault(split, []).append(str(file))
    return splits


def _declared_splits(folder: Path) -> dict[str, str]:
    """The split of each file that the dataset card ``README.md`` declares; of several configurations CONFIG/SPLIT."""
    import yaml
    from datasets.data_files import DataFilesDict, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        found = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
        configs = {name: given["data_files"] for name, given in found.items() if given.get("data_files")}
        splits = {
            name: DataFilesDict.from_patterns(sanitize_patterns(files), base_path=str(folder))
            for name, files in configs.items()
        }
    except (ValueError, OSError, yaml.YAMLError):  # a card that declares nothing that could be followed
        return {}
    return {
        os.path.abspath(file): f"{name}/{split}" if len(splits) > 1 else str(split)
        for name, by_split in splits.items()
        for split, files in by_split.items()
        for file in files
    }


def split_of(file: PurePath) -> str:
    """The split that a file's name tells, by the names that ``datasets`` knows; "" if it tells none.

    Of ``data/train-00000-of-00002.parquet`` and of ``train/0000.parquet`` it is ``train``, of ``dev.parquet``
    ``validation``.
    """
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS, SPLIT_PATTERN_SHARDED
    from datasets.utils.py_utils import glob_pattern_to_regex, string_to_dict

    named = string_to_dict(file.name, glob_pattern_to_regex(PurePath(SPLIT_PATTERN_SHARDED).name))
    told = file.parent if named else file.with_suffix("")
    words = re.split(f"[{NON_WORDS_CHARS}/]+", str(told).lower())
    found = [str(split) for word in words for split, keywords in SPLIT_KEYWORDS.items() if word in keywords]
    return "/".join(dict.fromkeys([*found, named["split"]] if named else found))


def _dataset_items(data: Any, columns: dict[str, str]) -> Iterator[Item | BadEntry]:
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


READERS: dict[str, Callable[[Path, Mapping[str, str], str | None], Source]] = {
    "json": lambda file, columns, split: read_json(file),
    "coco": lambda file, columns, split: read_coco(file),
    "csv": lambda file, columns, split: read_table(file, columns),
    "dataset": read_dataset,
}
"""By the option that names the source."""

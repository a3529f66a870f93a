"""Sources of data as entries: what is said, and where its images and videos are; the bytes are read later.

    LLaVA, ShareGPT   [{"id", "image": "a.jpg" or [...], "video": ..., "conversations": [{"from", "value"}, ...]}, ...]
                      as a list, or one object a line (read line by line); "messages" with "role" and "content" too
    COCO captions     {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}
    CSV, TSV          columns image, video or file; question and answer, or caption
    datasets          a folder written by ``save_to_disk``, or one of parquet files; columns as of a CSV, images inside

Each reader gives items in LLaVA's form, or with ``captions``; :func:`entry_of` checks one and finds its files.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image

from datamodules.conversation import messages_of
from datamodules.counts import UNREADABLE
from datamodules.shards import IMAGE_TYPES
from lavi.errors import UserError, nearest
from lavi.video import VIDEO_TYPES, is_video

Item = dict[str, Any]
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
TYPES = {"image": IMAGE_TYPES, "video": VIDEO_TYPES}
BLOCK = 512
"""Bytes a tar's headers and members are rounded up to."""


class BadEntry(Exception):
    """An entry that cannot be packed.

    Args:
        name: the entry's.
        cause: for counting, the same words for the same cause.
        what: the rest of the sentence that begins with the entry, if it says more.
    """

    def __init__(self, name: str, cause: str, what: str = "") -> None:
        super().__init__(f"entry {name}{what or ' ' + cause}")
        self.name, self.cause = name, cause


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


class Cell(NamedTuple):
    """An image inside a ``datasets`` folder."""

    kind: str
    size: int
    crc32: int
    row: int
    column: str
    number: int
    """Of the row's images."""


@dataclass(frozen=True)
class Entry:
    """One sample to be: its key, its JSON, and for each member where its bytes are."""

    key: str
    record: dict[str, Any]
    media: list[tuple[str, str | Cell]]
    """Member, and its file below the folder of its kind, or its cell."""
    size: int
    """Bytes in a tar."""


@dataclass(frozen=True)
class Folders:
    """Where the files that the data name start from. What leads out of them is refused; links inside are followed."""

    images: Path | None = None
    videos: Path | None = None

    def of(self, kind: str) -> Path:
        """The folder of images, or of videos.

        Raises:
            UserError: none was given, or it is not there.
        """
        folder = self.images if kind == "image" else self.videos
        if folder is None:
            raise UserError(f"the data name {kind}s: say with --{kind}s in which folder they are.")
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}, where --{kind}s says the {kind}s are.")
        return folder


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
    images, videos = _listed(row.get("image")), _listed(row.get("video"))
    for file in _listed(row.get("file")):
        (videos if is_video(str(file)) else images).append(file)
    item: Item = {"id": row.get("id") or name, "image": images, "video": videos}
    if row.get("messages") is not None:
        return item | {"conversations": row["messages"]}
    if row.get("question") and row.get("answer"):
        return item | {"conversations": _asked(row["question"], row["answer"], images, videos)}
    return item | {"captions": _listed(row.get("caption"))}


def _asked(question: Any, answer: Any, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """One turn; what is seen stands before the question, if that does not say where."""
    text = str(question)
    if "<image>" not in text and "<video>" not in text:
        text = "<image>\n" * len(images) + "<video>\n" * len(videos) + text
    return [{"from": "human", "value": text}, {"from": "gpt", "value": str(answer)}]


def _listed(value: Any) -> list[Any]:
    """A value, or several, as a list; nothing is none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) and not isinstance(value, Cell) else [value]


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
                    _cell(image, row, columns["image"], number) for number, image in enumerate(_listed(meant["image"]))
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
    value = _listed(data[cell.row].column(cell.column).to_pylist()[0])[cell.number]
    found: bytes = value["bytes"] if isinstance(value, dict) else value
    return found


# --- one entry --------------------------------------------------------------------------------------------------------


def entry_of(index: int, item: Any, folders: Folders) -> Entry:
    """Check one item, and find its files.

    Raises:
        BadEntry: it cannot be packed.
        UserError: no folder is given for its files.
    """
    if isinstance(item, BadEntry):
        raise item
    if not isinstance(item, dict):
        raise BadEntry(str(index), "has no 'conversations'")
    name = str(index if item.get("id") is None else item["id"])
    called = f"'{name}'"
    files = {kind: _named(item, kind, called) for kind in ("image", "video")}
    if isinstance(item.get("captions"), list):
        record, kinds = _captions(item, files, called)
    else:
        record, kinds = _conversation(index, item, files, called)
    media, more = _media(files, kinds, item, folders, called)
    record |= more
    key = f"{index:08d}-{_safe(name)}"
    members = [len(json.dumps(record).encode()) + 32 * len(media), *(size for _, _, size in media)]
    headers = BLOCK if key.isascii() else 3 * BLOCK  # a name in another script has a header of its own
    size = sum(headers + -(-member // BLOCK) * BLOCK for member in members)
    return Entry(key, record, [(member, where) for member, where, _ in media], size)


def _safe(name: str) -> str:
    """A name as the second half of a key: the first makes it unique, a dot or a slash would end it."""
    return re.sub(r"[./\\\x00-\x1f\x7f]", "_", name.encode(errors="replace").decode())[:60]


def _named(item: Item, kind: str, called: str) -> list[Any]:
    """The files or cells that an item names."""
    found = _listed(item.get(kind, item.get(f"{kind}s")))
    if not all(isinstance(file, str | Cell) and file for file in found):
        raise BadEntry(called, f"names {kind}s that are no file names")
    return found


def _captions(item: Item, files: dict[str, list[Any]], called: str) -> tuple[Item, list[str]]:
    captions = item["captions"]
    if not all(isinstance(caption, str) for caption in captions) or not any(caption.strip() for caption in captions):
        raise BadEntry(called, "has no captions, nor a question with an answer")
    kinds = ["image"] * len(files["image"]) + ["video"] * len(files["video"])
    if not kinds:
        raise BadEntry(called, "names no image and no video that its captions describe")
    return {"captions": captions}, kinds


def _conversation(index: int, item: Item, files: dict[str, list[Any]], called: str) -> tuple[Item, list[str]]:
    """Messages, and in their order whether an image or a video is shown."""
    turns = item.get("conversations", item.get("messages"))
    if not isinstance(turns, list):
        raise BadEntry(str(index), "has no 'conversations'")
    messages = _messages(turns, called)
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise BadEntry(called, "has no answer", " has no answer (no turn from 'gpt')")
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    shown = [part for part in parts if part["type"] in TYPES]
    if files["video"] and not files["image"] and all(part["type"] == "image" for part in shown):
        for part in shown:  # LLaVA's video data mark a video with <image>
            part["type"] = "video"
    kinds = [part["type"] for part in shown]
    for kind, named in files.items():
        if kinds.count(kind) != len(named):
            marks = kinds.count(kind)
            raise BadEntry(
                called, f"has another number of {kind}s than of <{kind}> marks",
                f" names {len(named)} {kind}s, and has {marks} <{kind}> marks",
            )  # fmt: skip
    return {"messages": messages}, kinds


def _messages(turns: list[Any], called: str) -> list[dict[str, Any]]:
    try:
        return [
            _of_parts(turn, called)
            if isinstance(turn, dict) and isinstance(turn.get("content"), list)
            else messages_of([turn])[0]
            for turn in turns
        ]
    except UserError as error:
        cause = "has a turn without text, or from an unknown role"
        raise BadEntry(called, cause, f" {str(error).rstrip('.')}") from None


def _of_parts(turn: dict[str, Any], called: str) -> dict[str, Any]:
    """A message whose content is parts already."""
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TYPES and not (kind == "text" and isinstance(part.get("text"), str)):
            raise BadEntry(called, "has a message with a part that is no text, image or video")
    parts = [
        {"type": p["type"], "text": p["text"]} if p["type"] == "text" else {"type": p["type"]} for p in turn["content"]
    ]
    return messages_of([turn | {"content": ""}])[0] | {"content": parts}


# --- files ------------------------------------------------------------------------------------------------------------

Located = tuple[str, str | Cell, int]
"""Member, where its bytes are, how many."""


def _media(
    files: dict[str, list[Any]], kinds: list[str], item: Item, folders: Folders, called: str
) -> tuple[list[Located], Item]:
    """The members in the order in which they are shown, and what the JSON says of videos."""
    left = {kind: iter(named) for kind, named in files.items()}
    given = [(kind, next(left[kind])) for kind in kinds]
    more = _clip(item, files["video"], called)
    framed = [kind == "video" and _is_folder(folders, file) for kind, file in given]
    if any(framed):
        if not all(framed):
            raise BadEntry(called, "has the frames of a video beside other images or videos")
        groups = [_frames(folders, file, called) for _, file in given]
        more |= {"frames": [len(group) for group in groups]} | _fps(item, called)
        found = [located for group in groups for located in group]
    else:
        found = [_located(kind, file, folders, called) for kind, file in given]
    if len(found) == 1 and not more.get("frames"):
        return found, more
    return [(f"{number}.{kind}", file, size) for number, (kind, file, size) in enumerate(found)], more


def _is_folder(folders: Folders, file: str | Cell) -> bool:
    return isinstance(file, str) and _leads_inside(file) and (folders.of("video") / file).is_dir()


def _leads_inside(file: str) -> bool:
    return not (file.startswith(("/", "\\")) or Path(file).is_absolute() or ".." in re.split(r"[/\\]", file))


def _located(kind: str, file: str | Cell, folders: Folders, called: str) -> Located:
    """One image or video: its type, where it is, its size."""
    if isinstance(file, Cell):
        ending, size = file.kind, file.size
    else:
        ending, size = Path(file).suffix.lower().lstrip("."), _size(folders.of(kind), file, kind, called)
    if ending not in TYPES[kind]:
        shown = f"of type '{ending}'" if isinstance(file, Cell) else f"'{file}'"
        raise BadEntry(called, f"has {kind}s of another type", f": {kind} {shown} is none of {', '.join(TYPES[kind])}")
    return ending, file, size


def _size(folder: Path, file: str, kind: str, called: str) -> int:
    """Bytes of a file, which must be one and stay below its folder."""
    if not _leads_inside(file):
        what = f": {kind} '{file}' leads out of the folder of the {kind}s"
        raise BadEntry(called, f"names {kind}s that lead out of their folder", what)
    try:
        found = os.stat(folder / file)
    except (OSError, ValueError):
        what = f": there is no {kind} {folder / file}"
        raise BadEntry(called, f"names {kind}s that are not there", what) from None
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        raise BadEntry(called, f"names {kind}s that are empty", f": {kind} {folder / file} is empty, or no file")
    return found.st_size


def _frames(folders: Folders, name: str, called: str) -> list[Located]:
    """The images of a folder in natural order: ``frame2.jpg`` before ``frame10.jpg``."""
    folder = folders.of("video")
    images = [file for file in os.listdir(folder / name) if Path(file).suffix.lower().lstrip(".") in IMAGE_TYPES]
    if not images:
        raise BadEntry(called, "names a folder without frames", f": {folder / name} has no image in it")
    files = [f"{name.rstrip('/')}/{file}" for file in sorted(images, key=_natural)]
    return [(Path(file).suffix.lower().lstrip("."), file, _size(folder, file, "video", called)) for file in files]


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _clip(item: Item, videos: list[Any], called: str) -> Item:
    """``clip`` as ``[start, end]`` in seconds."""
    clip = item.get("clip")
    if clip is None:
        return {}
    numbers = isinstance(clip, list) and len(clip) == 2 and all(_is_number(second) for second in clip)
    if not numbers or not 0 <= clip[0] < clip[1] or len(videos) != 1:
        raise BadEntry(called, "has a clip that is not [start, end] in seconds of one video")
    return {"clip": clip}


def _fps(item: Item, called: str) -> Item:
    fps = item.get("fps")
    if fps is not None and not (_is_number(fps) and fps > 0):
        raise BadEntry(called, "has an fps that is not above 0")
    return {} if fps is None else {"fps": fps}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


READERS: dict[str, Callable[[Path, Mapping[str, str]], Source]] = {
    "json": lambda file, _: read_json(file),
    "coco": lambda file, _: read_coco(file),
    "csv": read_table,
    "dataset": read_dataset,
}
"""By the option that names the source."""

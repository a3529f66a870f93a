"""Tables: CSV and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.formats.entries import BadEntry, Item, listed
from datamodules.formats.files import Source, allow_long_cells, read_head, reading
from lavi.data.videos import is_video
from lavi.errors import UserError, nearest

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
"""The names of columns, by their meaning."""


def chosen_columns(columns: list[str], named: Mapping[str, str], name: str) -> dict[str, str]:
    """What a table's columns are for: those named, else those with a known name.

    Returns:
        The column of each meaning of :data:`COLUMNS` that there is.

    Raises:
        UserError: a meaning or a column that there is not; nothing that could be trained on.
    """
    for meaning, column in named.items():
        if meaning not in COLUMNS:
            raise UserError(f"--columns: '{meaning}' is no kind of column, {nearest(meaning, COLUMNS)}")
        if column not in columns:
            raise UserError(f"--columns: {name} has no column '{column}', {nearest(column, columns)}")
    lower = {column.lower(): column for column in reversed(columns)}
    guessed = {
        meaning: lower[known]
        for meaning, names in COLUMNS.items()
        for known in reversed(names)
        if known in lower and lower[known] not in named.values()
    }
    chosen = guessed | dict(named)
    if not ({"question", "answer"} <= set(chosen) or {"caption", "messages"} & set(chosen)):
        raise UserError(
            f"{name} has the columns {', '.join(columns)}: question and answer, or caption, are needed; say which they "
            "are, as in --columns question=...,answer=..."
        )
    return chosen


def item_of_row(row: Mapping[str, Any], *, name: str) -> Item | BadEntry:
    """A table's row, by the meaning of its columns, in LLaVA's form or with captions; or what is wrong with it.

    Numbers, truth values and dates instead of a text become the text that Python writes (``0``, ``False``,
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
    row_id = row.get("id")
    called = name if row_id is None or row_id == "" else str(row_id)
    item: Item = {"id": called, "image": images, "video": videos}
    if row.get("messages") is not None:
        return item | {"conversations": row["messages"]}
    question, answer = (_cell_text(row.get(meaning), f"'{called}'", meaning) for meaning in ("question", "answer"))
    if question is not None and answer is not None:
        return item | {"conversations": _one_turn(question, answer, images, videos)}
    captions = [_cell_text(caption, f"'{called}'", "caption") for caption in listed(row.get("caption"))]
    if not any(captions) and {"question", "answer"} <= row.keys():
        raise BadEntry(f"'{called}'", f"has no {'question' if question is None else 'answer'}")
    return item | {"captions": captions}


def _cell_text(value: Any, called: str, meaning: str) -> str | None:
    """The text of a cell, as :func:`item_of_row` has it; None: nothing.

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


def _one_turn(question: str, answer: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    """One turn; marks of its images and videos stand before the question, if it has none itself."""
    if "<image>" not in question and "<video>" not in question:
        question = "<image>\n" * len(images) + "<video>\n" * len(videos) + question
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read_table(file: Path, columns: Mapping[str, str]) -> Source:
    """A CSV file, or a TSV, with a header.

    Raises:
        UserError: not there, no header, columns of no known meaning.
    """
    read_head(file)
    try:
        with reading(file), open(file, encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=_delimiter(file)), [])
    except csv.Error as error:
        raise UserError(f"{file} is not a table of text ({error}).") from None
    if not any(header):
        raise UserError(f"{file} has no header: its first line names the columns.")
    chosen = chosen_columns(header, columns, str(file))
    if twice := [column for column in chosen.values() if header.count(column) > 1]:
        raise UserError(f"{file} has two columns '{twice[0]}': give them different names.")
    return Source(file.name, _rows(file, header, chosen))


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() in (".tsv", ".tab") else ","


def _rows(file: Path, header: list[str], columns: dict[str, str]) -> Iterator[Item | BadEntry]:
    allow_long_cells()
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

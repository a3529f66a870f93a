"""What all readers of data sets share: opening a file, and what they give."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.formats.entries import BadEntry, Item
from lavi.data.images import JSON_TEXT, what_it_is
from lavi.errors import UserError


@dataclass(frozen=True)
class Source:
    """A data set to be packed.

    Args:
        items: in order; an error instead of one that cannot be read.
        total: how many, if that is known.
    """

    name: str
    items: Iterable[Item | BadEntry]
    total: int | None = None


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """While a file is read: what the system refuses is an error of the user's.

    Raises:
        UserError: there is no such file, it cannot be read, or it is no text.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no {file}.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def allow_long_cells() -> None:
    """Let cells of CSV files be longer than csv's 131072 characters: a conversation may be."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def read_head(file: Path, *allowed: str) -> bytes:
    """The first bytes of a file.

    Args:
        allowed: what of :func:`lavi.data.images.what_it_is` the file may be, besides JSON.

    Raises:
        UserError: it cannot be read, or is something else altogether.
    """
    with reading(file), open(file, "rb") as stream:
        head = stream.read(4096)
    kind = what_it_is(head)
    if kind and kind not in (JSON_TEXT, *allowed):
        raise UserError(f"{file} is {kind}.")
    return head


def load_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    read_head(file)
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}).") from None

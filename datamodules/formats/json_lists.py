"""LLaVA's and ShareGPT's JSON: a list, or one object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from datamodules.formats.entries import BadEntry, Item
from datamodules.formats.files import Source, load_json, read_head
from lavi.errors import UserError


def read_json(file: Path) -> Source:
    """LLaVA's and ShareGPT's JSON, a list or one object a line.

    Raises:
        UserError: not there, not JSON, an empty list.
    """
    head = read_head(file)
    if not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return Source(file.name, _lines(file))
    entries = load_json(file)
    if not entries:
        raise UserError(f"{file} is not a list of conversations, or an empty one.")
    return Source(file.name, entries, len(entries))


def _lines(file: Path) -> Iterator[Item | BadEntry]:
    with open(file, "rb") as stream:
        any_line = False
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                if not any_line:
                    load_json(file)  # one object over many lines, or no JSON at all
                    raise UserError(
                        f"{file} is one JSON object: a list of conversations is needed, or one object a line."
                    ) from None
                item = BadEntry(f"of line {number}", "is not JSON")
            any_line = True
            yield item

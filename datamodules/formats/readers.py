"""What data sets come as, and how each is read item by item.

    LLaVA, ShareGPT   [{"id", "image": "a.jpg" or [...], "video": ..., "conversations": [{"from", "value"}, ...]}, ...]
                      as a list, or one object a line (read line by line); "messages" with "role" and "content" too
    COCO captions     {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}
    CSV, TSV          columns image, video or file; question and answer, or caption
    datasets          a folder written by ``save_to_disk``, or one of parquet files; columns as of a CSV, images inside

Each reader gives items in LLaVA's form, or with ``captions``; :func:`datamodules.formats.entries.entry_of` checks one.
A reader of one's own is a function from the file to a :class:`datamodules.formats.files.Source`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from datamodules.formats.captions import read_coco
from datamodules.formats.datasets import read_dataset
from datamodules.formats.files import Source
from datamodules.formats.json_lists import read_json
from datamodules.formats.tables import read_table
from lavi.errors import UserError, one_line

READERS: dict[str, Callable[[Path, Mapping[str, str], str | None], Source]] = {
    "json": lambda file, columns, split: read_json(file),
    "coco": lambda file, columns, split: read_coco(file),
    "csv": lambda file, columns, split: read_table(file, columns),
    "dataset": read_dataset,
}
"""By the option that names the source."""


def own_reader(name: str) -> Callable[[Path], Source]:
    """The function that a dotted path names.

    Raises:
        UserError: there is no such function.
    """
    module, _, function = name.rpartition(".")
    try:
        reader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reader: there is no {name} ({one_line(error)}): name a function, as a_module.read."
        ) from None
    if not callable(reader):
        raise UserError(f"--reader: {name} is no function: it takes the file, and gives a {Source.__qualname__}.")
    return cast(Callable[[Path], Source], reader)

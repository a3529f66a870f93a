"""What data sets come as, and how each is read item by item.

    LLaVA, ShareGPT   [{"id", "image": "a.jpg" or [...], "video": ..., "conversations": [{"from", "value"}, ...]}, ...]
                      as a list, or one object a line (read line by line); "messages" with "role" and "content" too
    COCO captions     {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}
    CSV, TSV          columns image, video or file; question and answer, or caption
    datasets          a folder written by ``save_to_disk``, or one of parquet files; columns as of a CSV, images inside

Each reader gives items in LLaVA's form, or with ``captions``; :func:`datamodules.formats.entries.entry_of` checks one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from datamodules.formats.captions import read_coco
from datamodules.formats.datasets import read_dataset
from datamodules.formats.files import Source
from datamodules.formats.json_lists import read_json
from datamodules.formats.tables import read_table

READERS: dict[str, Callable[[Path, Mapping[str, str], str | None], Source]] = {
    "json": lambda file, columns, split: read_json(file),
    "coco": lambda file, columns, split: read_coco(file),
    "csv": lambda file, columns, split: read_table(file, columns),
    "dataset": read_dataset,
}
"""By the option that names the source."""

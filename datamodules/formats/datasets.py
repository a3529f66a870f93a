"""Folders of Hugging Face `datasets`: save_to_disk, or parquet files."""

from __future__ import annotations

import errno
import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from datamodules.formats.entries import BadEntry, Cell, Item, listed
from datamodules.formats.files import Source, read_head
from datamodules.formats.tables import COLUMNS, chosen_columns, item_of_row
from datamodules.shards.counts import UNREADABLE
from lavi.errors import UserError, nearest, reason

NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
"""The system's messages about a cache that cannot be written."""


def read_dataset(folder: Path, columns: Mapping[str, str], split: str | None = None) -> Source:
    """A ``datasets`` folder, its images as cells.

    Args:
        split: which one, of a folder that has several.

    Raises:
        UserError: ``datasets`` is not installed; no such folder; several splits; columns of no known meaning.
    """
    data = _opened(folder, split)
    images = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    known = {name.lower() for name in COLUMNS["image"]}
    named = dict(columns)
    if images and "image" not in named and not any(name.lower() in known for name in images):
        named["image"] = images[0]
    chosen = chosen_columns(list(data.features), named, str(folder))
    return Source(folder.name, _dataset_items(data, chosen), len(data))


@lru_cache(maxsize=1)
def open_dataset(folder: Path, split: str | None) -> Any:
    """The dataset of :func:`read_dataset`, opened once in each process."""
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
        read_head(file, "a parquet file")
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    try:
        if parquet:
            splits = _parquet_splits(folder, parquet)
            data = datasets.load_dataset("parquet", data_files=splits[_chosen(splits, split, folder)], split="train")
        else:
            data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        if (why := reason(error)) in NO_ROOM:
            raise UserError(
                f"{folder} cannot be copied into the cache of `datasets` ({why}): set HF_HOME to a folder with room."
            ) from None
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} is neither written by save_to_disk nor a folder of parquet files ({cause})."
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split is None:
            raise UserError(
                f"{folder} has the splits {', '.join(data)}: give one of them, as in {folder}/{next(iter(data))}."
            )
        data = data[_chosen(dict(data), split, folder)]
    elif split is not None and not parquet:
        raise UserError(f"--split={split}: {folder} holds one set without splits, leave it out.")
    return data.with_format("arrow")


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
        metadata = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
        configs = {name: config["data_files"] for name, config in metadata.items() if config.get("data_files")}
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
    path = file.parent if named else file.with_suffix("")
    words = re.split(f"[{NON_WORDS_CHARS}/]+", str(path).lower())
    splits = [str(split) for word in words for split, keywords in SPLIT_KEYWORDS.items() if word in keywords]
    return "/".join(dict.fromkeys([*splits, named["split"]] if named else splits))


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
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


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
    content: bytes = value["bytes"] if isinstance(value, dict) else value
    return content

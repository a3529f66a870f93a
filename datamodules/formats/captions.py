"""COCO's captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.formats.entries import BadEntry, Item
from datamodules.formats.files import Source, load_json
from lavi.errors import UserError


def read_coco(file: Path) -> Source:
    """COCO's captions: one item an image, with all its captions.

    Raises:
        UserError: not there, not JSON, of another form.
    """
    content = load_json(file)
    images, annotations = (_dicts(content, key) for key in ("images", "annotations"))
    if not images or not annotations:
        raise UserError(f"{file} is not COCO's captions: it has no lists 'images' and 'annotations'.")
    if not all(isinstance(image.get("id"), str | int) for image in images):
        raise UserError(f"{file} lists images whose 'id' is no number and no text.")
    if not any("caption" in annotation for annotation in annotations):
        raise UserError(f"{file} has annotations without 'caption': COCO's files of captions have it.")
    return Source(file.name, list(_coco_items(images, annotations)), len(images))


def _dicts(content: Any, key: str) -> list[Item]:
    """The list of objects under a key; empty if there is none."""
    listed = content.get(key) if isinstance(content, dict) else None
    return listed if isinstance(listed, list) and all(isinstance(item, dict) for item in listed) else []


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

"""Shards: tar files of samples, written whole and read as a deterministic stream.

A shard holds, for each sample, ``key.json`` (``{"messages": [...]}``) and its images: ``key.jpg`` for one,
``key.0.jpg``, ``key.1.jpg`` ... for several (jpg, jpeg, png or webp). ``index.json`` beside the shards counts the
samples of each, so that a shard cut short is noticed: a tar reader takes it for a shorter one.

The order in which samples come is a function of (seed, epoch, rank, worker) alone. A position in the stream is
therefore one number, and resuming is skipping: without decoding, without a shuffle buffer to save.
"""

from __future__ import annotations

import json
import logging
import random
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import braceexpand
import webdataset.tariterators as wds
from PIL import Image

from lavi import images
from lavi.batch import Sample
from lavi.errors import UserError

log = logging.getLogger("lavi")

INDEX = "index.json"
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")


class BrokenSample(Exception):
    """One sample that cannot be used, with its cause."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"sample '{key}': {cause}")
        self.key, self.cause = key, cause


# --- finding ----------------------------------------------------------------------------------------------------------


def find_shards(source: str) -> list[str]:
    """The shard files of a folder, a file, or a brace pattern (``shards/{000..009}.tar``), in order.

    Raises:
        UserError: nothing there.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(str(p) for p in path.glob("*.tar"))
        if not found:
            raise UserError(
                f"the shard folder {source} has no .tar file: pack your data with `python -m datamodules.pack`."
            )
        return found
    found = list(braceexpand.braceexpand(source))
    missing = [p for p in found if not Path(p).is_file()]
    if missing:
        raise UserError(
            f"no shards at {missing[0]}: make the built-in data with `python -m datamodules.scenes`, "
            "or pack your own with `python -m datamodules.pack`."
        )
    return found


def expected_samples(shard: str) -> int | None:
    """How many samples the index says this shard holds; None without an index."""
    index = Path(shard).parent / INDEX
    if not index.is_file():
        return None
    try:
        return json.loads(index.read_text())["shards"].get(Path(shard).name)
    except (json.JSONDecodeError, KeyError, AttributeError):
        raise UserError(f"{index} is not a shard index: remove it, or pack the data again.") from None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_shard(shard: str) -> Iterator[dict[str, Any]]:
    """The raw samples of one shard: ``{"__key__": str, "json": bytes, "jpg": bytes, ...}``.

    A shard that ends early, or holds fewer samples than its index says, yields a :class:`BrokenSample` at the end:
    the loss is counted, never silent.
    """
    count = 0
    try:
        with open(shard, "rb") as stream:
            members = ({**m, "__url__": shard} for m in wds.tar_file_iterator(stream))
            for sample in wds.group_by_keys(members, handler=_reraise):
                count += 1
                yield sample
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        yield {"__key__": shard, "__broken__": f"cannot be read after {count} samples ({error})"}
        return
    expected = expected_samples(shard)
    if expected is not None and count != expected:
        yield {"__key__": shard, "__broken__": f"holds {count} samples, its index says {expected}"}


def _reraise(error: Exception) -> bool:
    raise error


def decode(raw: dict[str, Any]) -> Sample:
    """Decode one raw sample.

    Raises:
        BrokenSample: JSON that is none, no messages, no answer, an image that does not open or is missing.
    """
    key = raw["__key__"]
    if "__broken__" in raw:
        raise BrokenSample(key, raw["__broken__"])
    if "json" not in raw:
        raise BrokenSample(key, "has no .json member with its messages")
    try:
        messages = json.loads(raw["json"])["messages"]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise BrokenSample(key, "its .json member is not JSON") from None
    except (KeyError, TypeError):
        raise BrokenSample(key, "its JSON has no 'messages'") from None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "role" in m and "content" in m for m in messages
    ):
        raise BrokenSample(key, "its 'messages' are not a list of {'role', 'content'}")
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise BrokenSample(key, "its conversation has no answer (no message of role 'assistant')")
    return Sample(key, messages, [open_image(raw[name], key, name) for name in image_members(raw)])


def image_members(raw: dict[str, Any]) -> list[str]:
    """The names of a sample's image members, in order: ``jpg``, or ``0.jpg``, ``1.jpg``, ..."""
    numbered = [(m, name) for name in raw if (m := re.fullmatch(rf"(?:(\d+)\.)?({'|'.join(IMAGE_TYPES)})", name))]
    return [name for _, name in sorted(numbered, key=lambda pair: int(pair[0][1] or 0))]


def open_image(data: bytes, key: str, name: str) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        BrokenSample: it is not an image, is cut short, or has more than :data:`lavi.images.MAX_PIXELS`.
    """
    try:
        return images.open_image(data, name=f"its member '{name}'")
    except UserError as error:
        raise BrokenSample(key, str(error).rstrip(".")) from None


@dataclass(frozen=True)
class Slot:
    """Which part of a stream is read here: the rank among ranks, the worker among this rank's workers."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def index(self) -> int:
        return self.rank * self.workers + self.worker

    @property
    def count(self) -> int:
        return self.ranks * self.workers


@dataclass(frozen=True)
class ShardStream:
    """Raw samples of many shards in a reproducible order.

    Args:
        shards: the shard files.
        seed: of the order.
        shuffle: the size of the shuffle buffer; 0 keeps the order of the shards.
    """

    shards: list[str]
    seed: int = 0
    shuffle: int = 1000

    def check(self, slots: int) -> None:
        """Refuse fewer shards than readers: a reader without data would hang the others.

        Raises:
            UserError: with the numbers.
        """
        if len(self.shards) < slots:
            raise UserError(
                f"{len(self.shards)} shards cannot feed {slots} readers (ranks x workers): "
                f"use at most {len(self.shards)} workers in all (data.workers=...), or pack into more shards."
            )

    def epoch(self, epoch: int, slot: Slot) -> Iterator[dict[str, Any]]:
        """One pass over this slot's shards: the shards in an order all slots agree on, samples through a buffer."""
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        samples = (sample for shard in shards[slot.index :: slot.count] for sample in read_shard(shard))
        if not self.shuffle:
            yield from samples
            return
        yield from shuffled(samples, self.shuffle, random.Random(f"{self.seed}/{epoch}/{slot.index}"))


def shuffled(samples: Iterable[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """Shuffle through a buffer of ``size`` samples: each new one takes the place of a random one, which leaves."""
    buffer: list[Any] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = rng.randrange(size)
        buffer[place], sample = sample, buffer[place]
        yield sample
    rng.shuffle(buffer)
    yield from buffer

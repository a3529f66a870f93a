"""What shards hold, in numbers: images, videos, conversations, bytes by type, lengths of texts, sizes of images."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from datamodules.shards.read import IMAGE_TYPES
from lavi.data.images import BROKEN
from lavi.data.videos import is_video

UNREADABLE = (*BROKEN, Image.DecompressionBombError)


@dataclass
class Counts:
    """Counted sample by sample; two add up to the counts of both."""

    samples: int = 0
    conversations: int = 0
    captions: int = 0
    turns: int = 0
    """Messages of conversations."""
    images: int = 0
    videos: int = 0
    frames: int = 0
    """Images that are frames of videos; not among ``images``."""
    unreadable: int = 0
    """Images without a header that Pillow knows."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes by type of member."""
    text: Counter[str] = field(default_factory=Counter)
    """Conversations and captions by the power of two that their number of characters stays below."""
    widths: Counter[str] = field(default_factory=Counter)
    """Images by their width, in pixels."""
    heights: Counter[str] = field(default_factory=Counter)

    def add(self, record: dict[str, Any], media: Mapping[str, bytes]) -> None:
        """Count one sample: its JSON, and its other members."""
        self.samples += 1
        turns = turns_of(record)
        captions = captions_of(record)
        self.conversations += bool(turns)
        self.turns += len(turns)
        self.captions += len(captions)
        frames = [number for number in _list(record.get("frames")) if isinstance(number, int)]
        stills = [data for name, data in media.items() if type_of(name) in IMAGE_TYPES]
        for text in captions or ["".join(texts_of(record))]:
            self.text[str(1 << len(text).bit_length())] += 1
        self.frames += sum(frames)
        self.images += len(stills) - sum(frames)
        self.videos += sum(map(is_video, media)) + len(frames)
        for name, data in media.items():
            self.sizes[type_of(name)] += len(data)
        for data in stills:
            self._measure(data)

    def _measure(self, data: bytes) -> None:
        try:
            with Image.open(io.BytesIO(data)) as image:  # the header alone: nothing is decoded
                width, height = image.size
        except UNREADABLE:
            self.unreadable += 1
            return
        self.widths[str(width)] += 1
        self.heights[str(height)] += 1

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Counts:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in record.items()
        }
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """All counts as JSON; :meth:`from_json` reads them back."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }

    def summary(self) -> dict[str, Any]:
        """The counts as an index has them: of widths and heights only the smallest, the median and the largest."""
        text = {f"<{limit}": self.text[limit] for limit in sorted(self.text, key=int)}
        spread = {name: spread_of(getattr(self, name)) for name in ("widths", "heights")}
        return self.to_json() | {"text": text} | spread


def spread_of(values: Counter[str]) -> dict[str, int] | None:
    """Smallest, median and largest of counted values; None of none."""
    if not values:
        return None
    ordered = sorted(Counter({int(value): count for value, count in values.items()}).elements())
    return {"min": ordered[0], "median": statistics.median_low(ordered), "max": ordered[-1]}


def type_of(member: str) -> str:
    """``jpg`` of ``0.jpg``."""
    return member.rpartition(".")[2]


def captions_of(record: dict[str, Any]) -> list[str]:
    """The captions of a sample."""
    captions = record.get("captions", record.get("caption"))
    return [captions] if isinstance(captions, str) else [text for text in _list(captions) if isinstance(text, str)]


def turns_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a sample, in either form."""
    return [turn for turn in _list(record.get("messages", record.get("conversations"))) if isinstance(turn, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def texts_of(record: dict[str, Any]) -> Iterator[str]:
    """All texts of a sample."""
    yield from captions_of(record)
    for turn in turns_of(record):
        content = turn.get("content", turn.get("value"))
        for part in content if isinstance(content, list) else [{"text": content}]:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]

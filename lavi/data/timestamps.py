"""Telling a model how long a video is and when its frames are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lavi.batch import CachedVisual, Video, visual_parts
from lavi.errors import UserError


def add_timestamps(messages: Sequence[dict[str, Any]], videos: Sequence[Video | CachedVisual]) -> list[dict[str, Any]]:
    """The messages with a text part behind each video that says how long it is and when its frames are shown.

    LLaVA-Video's time instruction (arXiv 2410.02713), in its shortest form; it leaves out what is not known.

    Args:
        messages: left as they are; strings, and parts of other types, stay.
        videos: in the order of the ``{"type": "video"}`` parts; if no message has such parts, nothing is added.

    Raises:
        UserError: the parts and the videos are not equally many.
    """
    parts = sum(part["type"] == "video" for part in visual_parts(messages))
    if parts not in (0, len(videos)):
        raise UserError(f"a conversation has {parts} video parts and {len(videos)} videos: give each its part.")
    coming = iter(videos)
    return [_with_timestamps(message, coming) for message in messages]


def _with_timestamps(message: dict[str, Any], videos: Iterator[Video | CachedVisual]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        parts.append(part)
        if part["type"] == "video" and (text := time_instruction(next(videos))):
            parts.append({"type": "text", "text": text})
    return message | {"content": parts}


def time_instruction(video: Video | CachedVisual) -> str:
    """``This video lasts 12.0 seconds; its 2 frames are from 3.0, 9.0 seconds.`` and a new line; empty if not known."""
    if not video.seconds:
        return ""
    count = len(video.seconds)
    times = ", ".join(f"{second:.1f}" for second in video.seconds)
    frames = f"its {count} frames are" if count > 1 else "its one frame is"
    lasts = "" if video.duration is None else f"this video lasts {video.duration:.1f} seconds; "
    sentence = f"{lasts}{frames} from {times} seconds.\n"
    return sentence[0].upper() + sentence[1:]

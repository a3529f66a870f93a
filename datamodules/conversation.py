"""What a shard's raw samples say: the forms a conversation comes in, made one.

``messages`` as chat templates know them; ``conversations`` in LLaVA's and ShareGPT's form, their ``<image>`` and
``<video>`` marks as parts; captions as the answer to a request. Images and videos are decoded here, late: behind the
shuffling, in the process that reads.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from datamodules.shards import MEDIA, BrokenSample, Raw, damage_of
from datamodules.video_text import clip_of, extracted
from lavi import images
from lavi.batch import Sample, Visual, visual_parts
from lavi.errors import UserError
from lavi.video import FrameSampling, is_video, read_video

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""Who speaks, as LLaVA and ShareGPT spell it."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What an image member may be, whatever its name says: no other of Pillow's decoders runs on data from elsewhere."""
MARK = re.compile(r"<(image|video)>\n?")


@dataclass(frozen=True)
class Reading:
    """How raw samples become conversations.

    Args:
        video: which frames of a video are seen.
        caption_prompt: the request that a caption answers.
    """

    video: FrameSampling = field(default_factory=FrameSampling)
    caption_prompt: str = "Describe this briefly."


def decode(raw: Raw, reading: Reading | None = None) -> Sample:
    """Decode one raw sample.

    Raises:
        BrokenSample: JSON that is none, no messages, no answer, an image or a video that does not open or was altered.
    """
    reading = reading or Reading()
    said = said_by(raw)
    try:
        messages = _messages(raw, said, reading)
        seen = _visuals(raw, said, messages, reading.video)
    except UserError as error:
        raise BrokenSample(raw["__key__"], str(error).rstrip(".")) from None
    return Sample(raw["__key__"], messages, seen)


# --- words ------------------------------------------------------------------------------------------------------------

FORMS = ("messages", "conversations", "captions", "caption")


def said_by(raw: Raw) -> dict[str, Any]:
    """A sample's JSON, after the checks that need no decoding; a ``.txt`` member is the ``caption`` of one without.

    Raises:
        BrokenSample: it is missing, no JSON, or of no form known here; a member that is not what was packed.
    """
    if "__broken__" in raw:
        raise BrokenSample(raw["__key__"], raw["__broken__"], lost=raw.get("__lost__", 1))
    try:
        said = json.loads(raw.get("json", b"{}"))
    except (ValueError, RecursionError):  # brackets in brackets, thousands deep
        raise BrokenSample(raw["__key__"], "its .json member is not JSON") from None
    cause = None
    if isinstance(said, dict) and "txt" in raw and not any(form in said for form in FORMS):
        said["caption"] = raw["txt"].decode(errors="replace")
    elif "json" not in raw:
        cause = "has no .json member with its messages, and no .txt member with a caption"
    elif not isinstance(said, dict) or not any(form in said for form in FORMS):
        cause = "its JSON has no 'messages', 'conversations' or 'captions'"
    if cause or (cause := damage_of(raw, said.get("crc32"))):
        raise BrokenSample(raw["__key__"], cause)
    return said


def _messages(raw: Raw, said: dict[str, Any], reading: Reading) -> list[dict[str, Any]]:
    """Of whichever form there is."""
    if "messages" in said:
        messages = _with_parts(said["messages"]) if visual_members(raw) else said["messages"]
    elif "conversations" in said:
        messages = messages_of(said["conversations"])
    else:
        messages = _captioned(raw, said, reading)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError("its 'messages' are not a list of {'role', 'content'} with text, or parts, as content")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise UserError("its conversation has no answer (no message of role 'assistant')")
    return messages


def _with_parts(messages: Any) -> Any:
    """Marks inside plain texts as parts, as other libraries' ``messages`` have them."""
    if not isinstance(messages, list):
        return messages
    return [
        m | {"content": _parts(m["content"])} if isinstance(m, dict) and isinstance(m.get("content"), str) else m
        for m in messages
    ]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    )


def messages_of(turns: Any) -> list[dict[str, Any]]:
    """Turns ``{"from": "human", "value": "<image>\\nwhat?"}`` as messages, each mark as a part of its own.

    Raises:
        UserError: a turn that is none, or from somebody unknown.
    """
    if not isinstance(turns, list):
        raise UserError("its 'conversations' are not a list")
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from", turn.get("role", "")))) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise UserError(f"has a turn without 'value', or from neither of {', '.join(ROLES)}")
        tags = {key: turn[key] for key in ("family", "level") if key in turn}
        messages.append({"role": role, "content": _parts(text), **tags})
    return messages


def _parts(text: str) -> str | list[dict[str, str]]:
    """Text with marks as parts; text without stays text."""
    pieces = MARK.split(text)  # text, kind, text, kind, text ...
    if len(pieces) == 1:
        return text
    parts = [{"type": "text", "text": pieces[0]}]
    for kind, behind in zip(pieces[1::2], pieces[2::2], strict=True):
        parts += [{"type": kind}, {"type": "text", "text": behind}]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _captioned(raw: Raw, said: dict[str, Any], reading: Reading) -> list[dict[str, Any]]:
    """A request, and a caption as its answer; of several, another one each epoch."""
    captions = said.get("captions", said.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError("its captions are not texts")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise UserError("its conversation has no answer (its captions are empty)")
    # Begun at a place that the key decides: else all images would show their first captions together.
    chosen = captions[(zlib.crc32(raw["__key__"].encode()) + raw.get("__epoch__", 0)) % len(captions)]
    kinds = ["video" if is_video(name) else "image" for name in visual_members(raw)]
    kinds = ["video"] * len(said["frames"]) if isinstance(said.get("frames"), list) else kinds
    if not kinds:
        raise UserError("has a caption, and no image or video that it describes")
    parts: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    request = {"role": "user", "content": [*parts, {"type": "text", "text": reading.caption_prompt}]}
    return [request, {"role": "assistant", "content": chosen}]


# --- images and videos ------------------------------------------------------------------------------------------------


def visual_members(raw: Raw) -> list[str]:
    """The names of a sample's images and videos, in order: ``jpg``, or ``0.jpg``, ``1.mp4``, ..."""
    numbered = [(int(match[1] or 0), name) for name in raw if (match := MEDIA.fullmatch(name))]
    return [name for _, name in sorted(numbered)]


def _visuals(raw: Raw, said: dict[str, Any], messages: list[dict[str, Any]], sampling: FrameSampling) -> list[Visual]:
    names = visual_members(raw)
    frames = said.get("frames")
    asked = [part["type"] for part in visual_parts(messages)]
    if frames is None and asked == ["video"] and not any(map(is_video, names)):
        frames = [len(names)]
    if frames is not None:
        return list(extracted(_Opened(raw, names), frames, said.get("fps"), sampling))
    clip = clip_of(said.get("clip"))
    return [
        read_video(raw[name], sampling, clip=clip, name=f"its member '{name}'")
        if is_video(name)
        else open_image(raw[name], name)
        for name in names
    ]


class _Opened(Sequence[Image.Image]):
    """Images, each opened when it is asked for: of a thousand frames a few are kept."""

    def __init__(self, raw: Raw, names: Sequence[str]) -> None:
        self.raw, self.names = raw, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Opened(self.raw, self.names[at])
        return open_image(self.raw[self.names[at]], self.names[at])


def open_image(data: bytes, name: str) -> Image.Image:
    """An image member, decoded to RGB.

    Raises:
        UserError: it is not an image, is cut short, or has more than :data:`lavi.images.MAX_PIXELS`.
    """
    return images.open_image(data, name=f"its member '{name}'", formats=FORMATS)

"""The built-in format: the forms in which a shard's sample writes a conversation, to messages.

``messages`` as chat templates know them; ``conversations`` in LLaVA's and ShareGPT's form, their ``<image>`` and
``<video>`` marks as parts; captions as the answer to a request. Images and videos are decoded here, late: behind the
shuffling, in the process that reads.
"""

from __future__ import annotations

import json
import mimetypes
import re
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from datamodules.formats.base import SampleFormat
from datamodules.formats.features import MEMBER, read_features
from datamodules.formats.frames import OpenedWhenAsked, clip_of, extracted
from datamodules.shards.read import IMAGE_TYPES, MEDIA, BrokenSample, Raw, check_intact, damage_of
from lavi.batch import Sample, Visual, text_of, visual_parts
from lavi.data import images
from lavi.data.frame_sampling import FrameSampling
from lavi.data.images import JSON_TEXT, what_it_is
from lavi.data.text import HALF_A_CHARACTER, is_writable
from lavi.data.videos import VIDEO_TYPES, is_video, read_video
from lavi.errors import UserError

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
"""The role of each name that LLaVA and ShareGPT give a speaker."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats of an image member, whatever its name says: no other of Pillow's decoders runs on data from elsewhere."""
READ = (*IMAGE_TYPES, *VIDEO_TYPES)
MARK = re.compile(r"<(image|video)>\n?")
LABELS = ("family", "level")
"""Keys of a turn beside its text: accuracies are reported for each value of them."""


@dataclass(frozen=True)
class Conversations(SampleFormat):
    """The built-in format: conversations and captions in JSON, with images and videos.

    Args:
        video: which frames of a video are used.
        caption_prompt: the request that a caption answers.
    """

    video: FrameSampling = field(default_factory=FrameSampling)
    caption_prompt: str = "Describe this briefly."

    def decode(self, raw: Raw) -> Sample:
        """Decode one raw sample.

        Raises:
            BrokenSample: JSON that is none, no messages, no answer, an image or a video that does not open or was
                altered.
        """
        record = parse_record(raw)
        try:
            messages = _messages(raw, record, self.caption_prompt)
            check_marks(raw, record, messages)
            decode = partial(_visuals, raw, record, messages, self.video)
            images = read_features(raw, record, decode) if MEMBER in raw else decode()
        except UserError as error:
            raise BrokenSample(raw["__key__"], str(error).rstrip(".")) from None
        return Sample(raw["__key__"], messages, images)

    def check(self, raw: Raw) -> dict[str, Any]:
        """The JSON of a raw sample, after all checks that need no decoding of images and videos.

        Raises:
            BrokenSample: as :meth:`decode`.
        """
        record = parse_record(raw)
        try:
            check_marks(raw, record, _messages(raw, record, self.caption_prompt))
        except UserError as error:
            raise BrokenSample(raw["__key__"], str(error).rstrip(".")) from None
        return record


# --- words ------------------------------------------------------------------------------------------------------------

FORMS = ("messages", "conversations", "captions", "caption")


def parse_record(raw: Raw) -> dict[str, Any]:
    """A sample's JSON, after the checks that need no decoding; a ``.txt`` member is the ``caption`` of one without.

    Raises:
        BrokenSample: it is missing, no JSON, or of no form known here; a member that is not what was packed.
    """
    check_intact(raw)
    try:
        record = json.loads(raw.get("json", b"{}"))
    except (ValueError, RecursionError):  # brackets in brackets, thousands deep
        kind = what_it_is(raw["json"])
        what = f"is {kind}" if kind and kind != JSON_TEXT else "is not JSON"
        raise BrokenSample(raw["__key__"], f"its .json member {what}") from None
    cause = None
    if isinstance(record, dict) and "txt" in raw and not any(form in record for form in FORMS):
        record["caption"], cause = _caption(raw["txt"])
    elif "json" not in raw:
        cause = "has no .json member with its messages, and no .txt member with a caption" + _edge_note(raw)
    elif not isinstance(record, dict) or not any(form in record for form in FORMS):
        cause = "its JSON has no 'messages', 'conversations' or 'captions'"
    if cause or (cause := damage_of(raw, record.get("crc32"))) or (cause := _unread(raw)):
        raise BrokenSample(raw["__key__"], cause)
    return record


def _caption(text: bytes) -> tuple[str, str | None]:
    """A ``.txt`` member, and what is wrong with it."""
    try:
        return text.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return "", "its .txt member is not UTF-8"


def _edge_note(raw: Raw) -> str:
    """Where the rest of a sample may be."""
    return " (it stands at the edge of its shard: the rest may be in another one)" if "__edge__" in raw else ""


def _unread(raw: Raw) -> str | None:
    """A sample whose only images or videos are of types that are not read is none about nothing."""
    if visual_members(raw):
        return None
    for kind in raw.get("__others__", ()):
        if (mimetypes.guess_type(f"x.{kind}")[0] or "").startswith(("image/", "video/")):
            return f"its '{kind}' is not read: images and videos are {', '.join(READ)}, as KEY.jpg or KEY.0.jpg"
    return None


def _messages(raw: Raw, record: dict[str, Any], caption_prompt: str) -> list[dict[str, Any]]:
    """The conversation of a record, in whichever form it comes."""
    if record.get("messages") is not None:
        messages = _with_parts(record["messages"])
    elif record.get("conversations") is not None:
        messages = messages_of(record["conversations"])
    else:
        messages = _captioned(raw, record, caption_prompt)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError("its 'messages' are not a list of {'role', 'content'} with text, or parts, as content")
    messages = [_labelled(message) for message in messages]
    if not all(is_writable(message.get(label) or "") for message in messages for label in ("role", *LABELS)):
        raise UserError(HALF_A_CHARACTER)
    texts = [text_of(message["content"]) for message in messages]
    if not is_writable("".join(texts)):
        raise UserError(HALF_A_CHARACTER)
    if missing := missing_answer(messages):
        raise UserError(f"its conversation {missing} (a message of role 'assistant' is empty, or there is none)")
    return messages


def missing_answer(messages: list[dict[str, Any]]) -> str | None:
    """What a conversation lacks that cannot be trained on; None: nothing. Words of the user's may stand at its end.

    An empty answer would be trained as one: to say nothing.
    """
    answers = [text_of(message["content"]).strip() for message in messages if message["role"] == "assistant"]
    if not any(answers):
        return "has no answer"
    return None if all(answers) else "has no answer to one of its questions"


def _labelled(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose labels for accuracies are texts.

    Raises:
        UserError: one is no text and no number.
    """
    for label in LABELS:
        if message.get(label) is not None and (text := as_text(message[label])) != message[label]:
            if text is None:
                raise UserError(f"has a turn whose '{label}' is no text")
            message = message | {label: text}
    return message


def as_text(value: Any) -> str | None:
    """A text, or a number or a truth value as JSON writes it (``0``, ``false``); None of anything else."""
    if isinstance(value, bool | int | float) and value == value:
        return json.dumps(value)
    return value if isinstance(value, str) else None


def check_indices(messages: Any) -> None:
    """Whether parts that number their images do so in the order in which they are shown, which is that of the images.

    Numbers may begin anywhere, and anew in a later message.

    Raises:
        UserError: they are all different, and in another order.
    """
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    for kind in ("image", "video"):
        numbers = [part["index"] for part in parts if part.get("type") == kind and isinstance(part.get("index"), int)]
        if len(set(numbers)) == len(numbers) and numbers != sorted(numbers):
            raise UserError(f"its parts number their {kind}s {numbers}, which is not the order in which they stand")


def plain_parts(content: list[Any]) -> list[Any]:
    """The parts of a message's content without keys that no template reads; what is no part stays as it is."""
    keys = {"text": ("type", "text"), "image": ("type",), "video": ("type",)}
    return [
        {key: part[key] for key in keys[part["type"]] if key in part}
        if isinstance(part, dict) and part.get("type") in ("text", "image", "video")
        else part
        for part in content
    ]


def _with_parts(messages: Any) -> Any:
    """Messages with the marks inside plain texts as parts, as other libraries write ``messages``."""
    if not isinstance(messages, list):
        return messages
    check_indices(messages)
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    parts = [
        _parts(content) if isinstance(content, str) else plain_parts(content) if isinstance(content, list) else None
        for content in contents
    ]
    return [m if content is None else m | {"content": content} for m, content in zip(messages, parts, strict=True)]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(_is_part(part) for part in content))


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in ("image", "video") or (part.get("type") == "text" and isinstance(part.get("text"), str))


def messages_of(turns: Any) -> list[dict[str, Any]]:
    """Turns ``{"from": "human", "value": "<image>\\nwhat?"}`` as messages, each mark as a part of its own.

    A value that is a number or a truth value becomes the text that JSON writes.

    Raises:
        UserError: a turn that is none, or from somebody unknown.
    """
    if not isinstance(turns, list):
        raise UserError("its 'conversations' are not a list")
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from", turn.get("role", "")))) if isinstance(turn, dict) else None
        text = as_text(turn.get("value", turn.get("content"))) if isinstance(turn, dict) else None
        if role is None or text is None:
            raise UserError(f"has a turn without 'value' (a text), or from neither of {', '.join(ROLES)}")
        labels = {label: turn[label] for label in LABELS if label in turn}
        messages.append(_labelled({"role": role, "content": _parts(text), **labels}))
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


def _captioned(raw: Raw, record: dict[str, Any], caption_prompt: str) -> list[dict[str, Any]]:
    """A request, and a caption as its answer; of several, another one each epoch."""
    captions = record.get("caption") if record.get("captions") is None else record["captions"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError("its captions are not texts")
    captions = [caption.strip() for caption in captions if caption.strip()]
    if not captions:
        raise UserError("its conversation has no answer (its captions are empty)")
    # The key decides which is first: else all images would show their first captions together.
    caption = captions[(zlib.crc32(raw["__key__"].encode()) + raw.get("__epoch__", 0)) % len(captions)]
    kinds = ["video" if is_video(name) else "image" for name in visual_members(raw)]
    kinds = ["video"] * len(record["frames"]) if isinstance(record.get("frames"), list) else kinds
    if not kinds:
        raise UserError("has a caption, and no image or video that it describes")
    parts: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    request = {"role": "user", "content": [*parts, {"type": "text", "text": caption_prompt}]}
    return [request, {"role": "assistant", "content": caption}]


def check_marks(raw: Raw, record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Compare the images and videos that messages ask for with those that are there; without marks any number will do.

    Raises:
        UserError: they are not equally many.
    """
    marks = [part["type"] for part in visual_parts(messages)]
    names = visual_members(raw)
    frames = record.get("frames")
    count = len(frames) if isinstance(frames, list) else len(names)
    if not marks or len(marks) == count or _are_frames(marks, names):
        return
    if len(marks) < count:
        raise UserError("its messages ask for fewer images and videos than it has")
    others = raw.get("__others__")
    unread = f" (its member '{others[0]}' is not read)" if others else ""
    raise UserError("its messages ask for more images and videos than it has" + (unread or _edge_note(raw)))


def _are_frames(marks: list[str], names: list[str]) -> bool:
    """Whether a sample's images are the frames of the one video that its messages ask for."""
    return marks == ["video"] and bool(names) and not any(map(is_video, names))


# --- images and videos ------------------------------------------------------------------------------------------------


def visual_members(raw: Raw) -> list[str]:
    """The names of a sample's images and videos, in order: ``jpg``, or ``0.jpg``, ``1.mp4``, ..."""
    numbered = [(int(match[1] or 0), name) for name in raw if (match := MEDIA.fullmatch(name))]
    return [name for _, name in sorted(numbered)]


def _visuals(raw: Raw, record: dict[str, Any], messages: list[dict[str, Any]], sampling: FrameSampling) -> list[Visual]:
    names = visual_members(raw)
    frames, clip = record.get("frames"), clip_of(record.get("clip"))
    marks = [part["type"] for part in visual_parts(messages)]
    if frames is None and _are_frames(marks, names):
        frames = [len(names)]
    if frames is not None:
        images = OpenedWhenAsked(names, lambda name: open_image(raw[name], name))
        return list(extracted(images, frames, record.get("fps"), sampling, clip=clip))
    return [
        read_video(raw[name], sampling, clip=clip, name=f"its member '{name}'")
        if is_video(name)
        else open_image(raw[name], name)
        for name in _as_marked(names, marks)
    ]


def _as_marked(names: list[str], marks: list[str]) -> list[str]:
    """The members in the order in which messages ask for images and videos, each kind in its own order."""
    of_kind = {"image": [n for n in names if not is_video(n)], "video": [n for n in names if is_video(n)]}
    if any(len(of) != marks.count(kind) for kind, of in of_kind.items()):
        return names  # without marks; or of another kind than these say, such as an animation that is shown as a video
    left = {kind: iter(of) for kind, of in of_kind.items()}
    return [next(left[kind]) for kind in marks]


def open_image(data: bytes, name: str) -> Image.Image:
    """An image member, decoded to RGB.

    Raises:
        UserError: it is not an image, is cut short, or has more than :data:`lavi.data.images.MAX_PIXELS`.
    """
    return images.open_image(data, name=f"its member '{name}'", formats=FORMATS)

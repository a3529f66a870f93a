"""One entry of a data set: checked, its files looked up; the bytes are read later, by the process that packs them."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

from datamodules.formats.conversations import as_text, check_indices, messages_of, missing_answer, plain_parts
from datamodules.formats.frames import is_number
from datamodules.shards.read import IMAGE_TYPES
from lavi.data.images import what_it_is
from lavi.data.text import HALF_A_CHARACTER, is_writable
from lavi.data.videos import VIDEO_TYPES
from lavi.errors import UserError, reason

Item = dict[str, Any]
TYPES = {"image": IMAGE_TYPES, "video": VIDEO_TYPES}
OPENS = {
    "image": ("a JPEG image", "a PNG image", "a WEBP image", "a GIF image"),
    "video": ("an mp4 or mov video", "an mkv or webm video", "a GIF image"),
}
"""What a file may be by its first bytes, whatever its name says; one that is nothing known is left to the decoder."""


class BadEntry(Exception):
    """An entry that cannot be packed.

    Args:
        name: the entry's.
        cause: for counting, the same words for the same cause.
        what: the rest of the sentence that begins with the entry, if it says more.
    """

    def __init__(self, name: str, cause: str, what: str = "") -> None:
        name, cause, what = (text.encode(errors="backslashreplace").decode() for text in (name, cause, what))
        super().__init__(name, cause, what)  # the arguments of the error in another process
        self.name, self.cause, self.what = name, cause, what

    def __str__(self) -> str:
        return f"entry {self.name}{self.what or ' ' + self.cause}"


class Cell(NamedTuple):
    """An image inside a ``datasets`` folder."""

    kind: str
    size: int
    crc32: int
    row: int
    column: str
    number: int
    """Of the row's images."""


@dataclass(frozen=True)
class Entry:
    """One sample to be: its key, its JSON, and for each member where its bytes are."""

    key: str
    record: dict[str, Any]
    media: list[tuple[str, str | Cell]]
    """Member, and its file below the folder of its kind, or its cell."""
    size: int
    """Bytes in a tar."""


@dataclass(frozen=True)
class Folders:
    """Where the files that the data name start from. What leads out of them is refused; links inside are followed.

    Raises:
        UserError: one is not there.
    """

    images: Path | None = None
    videos: Path | None = None

    def __post_init__(self) -> None:
        for kind, folder in (("image", self.images), ("video", self.videos)):
            if folder is not None and not os.path.isdir(folder):
                raise UserError(f"there is no folder {folder}, where --{kind}s says the {kind}s are.")

    def of(self, kind: str) -> Path:
        """The folder of images, or of videos.

        Raises:
            UserError: none was given.
        """
        folder = self.images if kind == "image" else self.videos
        if folder is None:
            raise UserError(f"the data name {kind}s: say with --{kind}s in which folder they are.")
        return folder


# --- one entry --------------------------------------------------------------------------------------------------------


def entry_of(index: int, item: Any, folders: Folders) -> Entry:
    """Check one item, and find its files.

    Raises:
        BadEntry: it cannot be packed.
        UserError: no folder is given for its files.
    """
    if isinstance(item, BadEntry):
        raise item
    if not isinstance(item, dict):
        raise BadEntry(str(index), "has no 'conversations'")
    name = str(index if item.get("id") is None else item["id"])
    called = f"'{name}'"
    files = {kind: _named(item, kind, called) for kind in ("image", "video")}
    if isinstance(item.get("captions"), list):
        record, kinds = _captions(item, files, called)
    else:
        record, kinds = _conversation(index, item, files, called)
    media, more = _media(files, kinds, item, folders, called)
    record |= more
    if not is_writable(json.dumps(record, ensure_ascii=False)):
        raise BadEntry(called, HALF_A_CHARACTER)
    key = f"{index:08d}-{_safe(name)}"
    members = [len(json.dumps(record).encode()) + 32 * len(media), *(size for _, _, size in media)]
    headers = BLOCKSIZE if key.isascii() else 3 * BLOCKSIZE  # a name in another script has a header of its own
    size = sum(headers + -(-member // BLOCKSIZE) * BLOCKSIZE for member in members)
    return Entry(key, record, [(member, where) for member, where, _ in media], size)


def _safe(name: str) -> str:
    """A name as the second half of a key: the first makes it unique, a dot or a slash would end it."""
    return re.sub(r"[./\\\x00-\x1f\x7f]", "_", name.encode(errors="replace").decode())[:60]


def _named(item: Item, kind: str, called: str) -> list[Any]:
    """The files or cells that an item names, under either spelling of the kind."""
    one, several = listed(item.get(kind)), listed(item.get(f"{kind}s"))
    if one and several and one != several:
        raise BadEntry(called, f"names other {kind}s under '{kind}' than under '{kind}s'")
    named = one or several
    if not all(isinstance(file, str | Cell) and file for file in named):
        raise BadEntry(called, f"names {kind}s that are no file names")
    return named


def _captions(item: Item, files: dict[str, list[Any]], called: str) -> tuple[Item, list[str]]:
    captions = [as_text(caption) for caption in item["captions"] if caption is not None]
    if None in captions:
        raise BadEntry(called, "has a caption that is no text")
    if not any(caption and caption.strip() for caption in captions):
        raise BadEntry(called, "has no captions, nor a question with an answer")
    kinds = ["image"] * len(files["image"]) + ["video"] * len(files["video"])
    if not kinds:
        raise BadEntry(called, "names no image and no video that its captions describe")
    return {"captions": captions}, kinds


def _conversation(index: int, item: Item, files: dict[str, list[Any]], called: str) -> tuple[Item, list[str]]:
    """Messages, and in their order whether an image or a video is shown."""
    turns = item.get("conversations", item.get("messages"))
    if not isinstance(turns, list):
        raise BadEntry(str(index), "has no 'conversations'")
    messages = _messages(turns, called)
    if missing := missing_answer(messages):
        raise BadEntry(called, missing, f" {missing} (a turn from 'gpt' is empty, or there is none)")
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    shown = [part for part in parts if part["type"] in TYPES]
    if files["video"] and not files["image"] and all(part["type"] == "image" for part in shown):
        for part in shown:  # LLaVA's video data mark a video with <image>
            part["type"] = "video"
    kinds = [part["type"] for part in shown]
    for kind, named in files.items():
        if kinds.count(kind) != len(named):
            marks = kinds.count(kind)
            raise BadEntry(
                called, f"has another number of {kind}s than of <{kind}> marks",
                f" names {len(named)} {kind}s, and has {marks} <{kind}> marks",
            )  # fmt: skip
    return {"messages": messages}, kinds


def _messages(turns: list[Any], called: str) -> list[dict[str, Any]]:
    try:
        check_indices(turns)
    except UserError as error:
        raise BadEntry(called, "numbers its images in another order than it shows them", f": {error}") from None
    try:
        return [
            _of_parts(turn, called)
            if isinstance(turn, dict) and isinstance(turn.get("content"), list)
            else messages_of([turn])[0]
            for turn in turns
        ]
    except UserError as error:
        cause = "has a turn without text, or from an unknown role"
        raise BadEntry(called, cause, f" {str(error).rstrip('.')}") from None


def _of_parts(turn: dict[str, Any], called: str) -> dict[str, Any]:
    """A message whose content is parts already."""
    for part in turn["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TYPES and not (kind == "text" and isinstance(part.get("text"), str)):
            raise BadEntry(called, "has a message with a part that is no text, image or video")
    return messages_of([turn | {"content": ""}])[0] | {"content": plain_parts(turn["content"])}


def listed(value: Any) -> list[Any]:
    """A value, or several, as a list; nothing is none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) and not isinstance(value, Cell) else [value]


# --- files ------------------------------------------------------------------------------------------------------------

Located = tuple[str, str | Cell, int]
"""Member, where its bytes are, how many."""


def _media(
    files: dict[str, list[Any]], kinds: list[str], item: Item, folders: Folders, called: str
) -> tuple[list[Located], Item]:
    """The members in the order in which they are shown, and what the JSON says of videos."""
    left = {kind: iter(named) for kind, named in files.items()}
    files_of_kinds = [(kind, _below(folders, kind, next(left[kind]))) for kind in kinds]
    more = _clip(item, files["video"], called)
    framed = [kind == "video" and _is_folder(folders, file) for kind, file in files_of_kinds]
    if any(framed):
        if not all(framed):
            raise BadEntry(called, "has the frames of a video beside other images or videos")
        groups = [_frames(folders, file, called) for _, file in files_of_kinds]
        more |= {"frames": [len(group) for group in groups]} | _fps(item, called)
        if "clip" in more and "fps" not in more:
            raise BadEntry(called, "has a clip of extracted frames, and no 'fps' that says how many are a second")
        located = [located for group in groups for located in group]
    else:
        located = [_located(kind, file, folders, called) for kind, file in files_of_kinds]
    if len(located) == 1 and not more.get("frames"):
        return located, more
    return [(f"{number}.{kind}", file, size) for number, (kind, file, size) in enumerate(located)], more


def _below(folders: Folders, kind: str, file: Any) -> Any:
    """A file's name from its folder on, also of one that is named from the root."""
    if isinstance(file, str) and os.path.isabs(file):
        folder = folders.of(kind)
        for root in (os.path.abspath(folder), os.path.realpath(folder)):
            if file.startswith(f"{root}/"):
                return os.path.relpath(file, root)
    return file


def _is_folder(folders: Folders, file: str | Cell) -> bool:
    return isinstance(file, str) and _leads_inside(file) and os.path.isdir(folders.of("video") / file)


def _leads_inside(file: str) -> bool:
    return not (file.startswith(("/", "\\")) or os.path.isabs(file) or ".." in re.split(r"[/\\]", file))


def _located(kind: str, file: str | Cell, folders: Folders, called: str) -> Located:
    """One image or video: its type, where it is, its size."""
    if isinstance(file, Cell):
        ending, size = file.kind, file.size
    else:
        ending, size = _ending(file), _size(folders.of(kind), file, kind, called)
    if ending not in TYPES[kind]:
        shown = f"of type '{ending}'" if isinstance(file, Cell) else f"'{file}'"
        raise BadEntry(called, f"has {kind}s of another type", f": {kind} {shown} is none of {', '.join(TYPES[kind])}")
    return ending, file, size


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower().lstrip(".")


def _size(folder: Path, file: str, kind: str, called: str) -> int:
    """Bytes of a file, which must be one and stay below its folder."""
    if "://" in file:
        raise BadEntry(called, f"names {kind}s by URL", f": {kind} '{file}' is a URL: download it, and name the file")
    if not _leads_inside(file):
        what = f": {kind} '{file}' leads out of the folder of the {kind}s"
        raise BadEntry(called, f"names {kind}s that lead out of their folder", what)
    try:
        status = os.stat(os.path.join(folder, file))
    except (OSError, ValueError):
        what = f": there is no {kind} {folder / file}"
        raise BadEntry(called, f"names {kind}s that are not there", what) from None
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise BadEntry(called, f"names {kind}s that are empty", f": {kind} {folder / file} is empty, or no file")
    content = "image" if _ending(file) in IMAGE_TYPES else "video"  # the frames of a video are images
    if instead := _other_content(folder / file, content):
        raise BadEntry(called, f"names {kind}s that are something else", f": {kind} {folder / file} is {instead}")
    return status.st_size


def _other_content(file: Path, content: str) -> str | None:
    """What a file is that should be an image or a video; None if it may be one."""
    try:
        with open(file, "rb") as stream:
            kind = what_it_is(stream.read(BLOCKSIZE))
    except OSError as error:
        return f"a file that cannot be read ({reason(error)})"
    return kind if kind and kind not in OPENS[content] else None


def _frames(folders: Folders, name: str, called: str) -> list[Located]:
    """The images of a folder in natural order: ``frame2.jpg`` before ``frame10.jpg``."""
    folder = folders.of("video")
    try:
        images = [file for file in os.listdir(folder / name) if _ending(file) in IMAGE_TYPES]
    except OSError as error:
        what = f": {folder / name} cannot be read ({reason(error)})"
        raise BadEntry(called, "names a folder that cannot be read", what) from None
    if not images:
        raise BadEntry(called, "names a folder without frames", f": {folder / name} has no image in it")
    files = [f"{name.rstrip('/')}/{file}" for file in sorted(images, key=natural_order)]
    return [(_ending(file), file, _size(folder, file, "video", called)) for file in files]


def natural_order(name: str) -> list[tuple[str, int]]:
    """The key that sorts ``frame2.jpg`` before ``frame10.jpg``."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _clip(item: Item, videos: list[Any], called: str) -> Item:
    """``clip`` as ``[start, end]`` in seconds."""
    clip = item.get("clip")
    if clip is None:
        return {}
    numbers = isinstance(clip, list) and len(clip) == 2 and all(map(is_number, clip))
    if not numbers or not 0 <= clip[0] < clip[1] or len(videos) != 1:
        raise BadEntry(called, "has a clip that is not [start, end] in seconds of one video")
    return {"clip": clip}


def _fps(item: Item, called: str) -> Item:
    fps = item.get("fps")
    if fps is not None and not (is_number(fps) and fps > 0):
        raise BadEntry(called, "has an fps that is not above 0")
    return {} if fps is None else {"fps": fps}

"""Shards: tar files of samples, read as a deterministic stream.

A shard holds, for each sample, ``KEY.json`` and its images and videos: ``KEY.jpg`` for one, ``KEY.0.jpg``,
``KEY.1.mp4`` ... for several. ``index.json`` beside the shards counts the samples of each. What is read of a sample:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, ...]}
    {"conversations": [{"from": "human", "value": "<image>\\nwhat?"}, ...]}         LLaVA's and ShareGPT's form
    {"captions": ["a red circle", ...]}, {"caption": ...}, or KEY.txt              a caption; of several, one an epoch
    besides: "crc32" of the members, "clip" [start, end] of a video in seconds, "frames" and "fps" of extracted frames

Nothing is lost in silence. A tar that is damaged or cut short reads, to most readers, as a shorter one: here it must
end with its end mark and hold what its index says, and what is missing is counted. A member that was altered does not
pass its checksum. Members of other types are never read, so that none is ever unpickled.

The order of the samples is a function of (seed, epoch, rank, worker) alone, and a :class:`StreamPosition` in it is a
shard, a record and how many of a shuffled block were taken: to resume is to read one block, whatever the length of the
epoch.
"""

from __future__ import annotations

import itertools
import random
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self, cast

from datamodules.shards.sources import INDEX, open_shard, read_index, samples_of
from lavi.data.images import what_it_is
from lavi.data.videos import VIDEO_TYPES
from lavi.errors import UserError, reason

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MEDIA = re.compile(rf"(?:(\d+)\.)?({'|'.join((*IMAGE_TYPES, *VIDEO_TYPES))})")
"""Types of the members that are images and videos, with their number if there are several."""
NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
"""A member's key, and its type behind the first dot of the file name (WebDataset's convention)."""
LARGEST_BLOCK = 256 * 2**20
"""A shuffled block is closed early above this many bytes, so that videos do not fill the memory."""

Raw = dict[str, Any]
"""``{"__key__", "__shard__", "json": bytes, "jpg": bytes, ...}``; a broken one: its cause and how many are lost.

``__others__`` are the types of its members that are not read; ``__edge__``: it is the first or the last of its shard.
"""


class BrokenSample(Exception):
    """One sample that cannot be used, or several that are missing, with the cause."""

    def __init__(self, key: str, cause: str, *, lost: int = 1) -> None:
        super().__init__(f"sample '{key}': {cause}")
        self.key, self.cause, self.lost = key, cause, lost


def check_intact(raw: Raw) -> None:
    """Refuse a record that the reader could not read.

    Raises:
        BrokenSample: with the reader's cause and the number of samples that are lost.
    """
    if "__broken__" in raw:
        raise BrokenSample(raw["__key__"], raw["__broken__"], lost=raw.get("__lost__", 1))


# --- one shard --------------------------------------------------------------------------------------------------------


class DamagedTar(Exception):
    """A tar whose headers cannot be followed to its end mark."""


class _Header(tarfile.TarInfo):
    """A header that must be sound: tarfile takes one that is not, in the middle of a file, for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end mark
            raise
        except tarfile.HeaderError as error:
            raise DamagedTar(f"no tar header where one must stand ({error})") from None


class _Bounded:
    """A stream of which never more is asked for than it has: a damaged header asks for exabytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.end = stream, stream.seek(0, 2)
        stream.seek(0)
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.end - self.stream.tell())
        return self.stream.read(left if size < 0 else min(size, left))


DAMAGE = (DamagedTar, tarfile.TarError, EOFError, ValueError, OSError, OverflowError, RecursionError, TypeError)
"""What reading a damaged tar raises."""


@lru_cache(maxsize=64)
def _index_as_written(folder: str, written: float) -> dict[str, Any]:
    return read_index(folder) or {}


def index_of(folder: str) -> dict[str, Any]:
    """The index of a folder, read once, and again when it has been written anew; empty where there is none.

    Raises:
        UserError: there is an index, and it is none.
    """
    if "://" in folder:
        return _index_as_written(folder, 0.0)
    file = Path(folder, INDEX).absolute()
    return _index_as_written(str(file.parent), file.stat().st_mtime if file.exists() else 0.0)


def index_entry(shard: str) -> Any:
    """What the index beside a shard says of it; None without one.

    Raises:
        UserError: there is an index, and it is none.
    """
    if shard.startswith("pipe:"):
        return None
    folder, _, name = shard.rpartition("/")
    return index_of(folder or ".").get("shards", {}).get(name)


def expected_samples(shard: str) -> int | None:
    """How many samples the index beside a shard says it holds; None without one."""
    entry = index_entry(shard)
    return None if entry is None else samples_of(entry)


def read_shard(shard: str, first: int = 0, *, types: Collection[str] = ()) -> Iterator[Raw]:
    """The records of one shard, from record ``first`` on (those before are passed over without being read).

    Args:
        types: of members that are read besides JSON, texts, images and videos.

    A shard that is damaged, ends early, or holds fewer samples than its index says, ends with a broken record that
    counts what is missing; without an index it counts as one.
    """
    number, unread = 0, False
    head: bytes | None = None
    cause: str | None = None
    try:
        with open_shard(shard) as file:
            stream = _Bounded(file)
            head = stream.read(tarfile.BLOCKSIZE)
            stream.seek(0)
            for group in _groups(stream, types):
                members = _read(stream, group, types) if number >= first else None
                number += 1
                if members is not None:
                    yield {"__key__": group.key, "__shard__": shard, **members}
    except DAMAGE as error:
        unread = isinstance(error, OSError)
        if isinstance(error, FileNotFoundError):
            cause = "the shard is not there"
        elif not number and head is not None and (kind := what_it_is(head)) and kind != "a tar file":
            cause = f"is no tar file: it is {kind}"
        else:
            cause = f"cannot be read after {number} samples ({reason(error)})"
    expected = expected_samples(shard)
    lost = 0 if expected is None else expected - number
    if cause is None and lost:
        cause = f"holds {number} samples, its index says {expected}"
    if cause is not None:
        cause += f": {lost} samples are lost" if lost > 1 else ""
        broken = {"__broken__": cause, "__lost__": max(1, lost), "__unread__": unread}
        yield {"__key__": shard, "__shard__": shard, **broken}


@dataclass
class _Group:
    """Members that stand together under one key."""

    key: str
    extents: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Where the bytes of each begin, and how many they are."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Why members that should be read cannot be."""
    at_edge: bool = False
    """It is the first or the last of its shard: a part may stand in another one."""
    broken: str | None = None


def _groups(stream: _Bounded, types: Collection[str]) -> Iterator[_Group]:
    """The members of a tar, sample by sample."""
    keys: set[str] = set()
    read: dict[str, tuple[int, int]] = {}
    """Where the bytes of each file are: a hard link has none of its own."""
    group, last = _Group("", at_edge=True), -1
    with tarfile.open(fileobj=cast(Any, stream), mode="r:", tarinfo=_Header) as tar:
        for member in iter(tar.next, None):
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.offset <= last or member.size < 0:
                raise DamagedTar("a header leads back to where the file was read already")
            last = member.offset
            named = NAME.fullmatch(member.name)
            if named is None:
                continue
            key, kind = named[1], named[2].lower()
            extent = read.get(member.linkname) if member.islnk() else (member.offset_data, member.size)
            problem = _problem(member, extent)
            if problem and not _is_read(kind, types):
                continue
            if key != group.key or kind in group.extents or kind in group.unusable:
                if _holds_something(group):
                    yield _checked(group, keys)
                group = _Group(key, at_edge=not keys)
            if problem or extent is None:
                group.unusable[kind] = problem
            else:
                group.extents[kind] = read[member.name] = extent
        _check_end(stream, tar.offset)  # type: ignore[attr-defined]
    if _holds_something(group):
        group.at_edge = True
        yield _checked(group, keys)


def _is_read(kind: str, types: Collection[str]) -> bool:
    return kind in ("json", "txt") or kind in types or MEDIA.fullmatch(kind) is not None


_FOLDER = "is a folder"


def _problem(member: tarfile.TarInfo, extent: tuple[int, int] | None) -> str:
    """Why a member has no bytes that could be read; empty if it has."""
    if extent is None:
        return "is a hard link to a file that does not stand before it: write the shard with tar --hard-dereference"
    if member.issym():
        return "is a symbolic link, which a shard cannot follow: write it with tar --dereference"
    if member.isdir():
        return _FOLDER
    if member.issparse():
        return "is a sparse file: write the shard with tar without --sparse"
    return "" if member.isreg() or member.islnk() else "is a device or a pipe, and no file"


def _holds_something(group: _Group) -> bool:
    """A folder that happens to be named like a member is no sample."""
    return bool(group.extents) or any(problem != _FOLDER for problem in group.unusable.values())


def _check_end(stream: _Bounded, offset: int) -> None:
    """Behind the end mark there is nothing: zeros instead of a header look like one, and samples follow."""
    stream.seek(offset)
    while rest := stream.read(2**20):
        if rest.count(0) < len(rest):
            raise DamagedTar("zeros where a header must stand")


def _checked(group: _Group, keys: set[str]) -> _Group:
    """The group, with what is wrong with it; its key as text that can be written."""
    key = group.key
    group.key = key.encode(errors="backslashreplace").decode()
    if key in keys:
        group.broken = (
            "its key comes a second time in this shard (the members of a sample stand together: tar --sort=name)"
        )
    elif key.startswith(("/", "\\")) or ".." in PurePosixPath(key).parts or ".." in key.split("\\"):
        group.broken = "the name of its members leads out of the shard"
    elif group.unusable:
        kind, problem = next(iter(group.unusable.items()))
        group.broken = f"its member '{kind}' {problem}"
    keys.add(key)
    return group


def _read(stream: _Bounded, group: _Group, types: Collection[str]) -> dict[str, Any]:
    """The bytes of the members of known types; of others only the type: they are never read."""
    if group.broken:
        return {"__broken__": group.broken}
    members: dict[str, Any] = {"__edge__": True} if group.at_edge else {}
    for kind, (start, size) in group.extents.items():
        if not _is_read(kind, types):
            members.setdefault("__others__", []).append(kind)
            continue
        stream.seek(start)
        members[kind] = stream.read(size)
        if len(members[kind]) != size:
            raise EOFError("the file ends inside a member")
    return members


def damage_of(raw: Raw, sums: Any) -> str | None:
    """What is wrong with the members for which a sample gives checksums; None: nothing."""
    for kind, checksum in sums.items() if isinstance(sums, dict) else ():
        if kind in raw.get("__others__", ()):
            continue  # it is there, and of a type that was not asked for
        if not isinstance(raw.get(kind), bytes):
            return f"its member {kind!r} is missing"
        if zlib.crc32(raw[kind]) != checksum:
            return f"its member '{kind}' was altered: it has another checksum than it was packed with"
    return None


# --- many shards ------------------------------------------------------------------------------------------------------


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


class StreamPosition(NamedTuple):
    """Where a slot stands in a stream: behind ``taken`` records of the block that starts at a record of a shard."""

    epoch: int = 0
    shard: int = 0
    """Of this slot's shards, in the order of the epoch."""
    record: int = 0
    taken: int = 0


@dataclass(frozen=True)
class ShardStream:
    """Raw samples of many shards in a reproducible order.

    Args:
        shards: where they are.
        seed: of the order.
        shuffle: how many samples are read into a block and given in random order; 0 keeps the order of the shards.
        resampled: each slot draws shards at random, some twice, some never, instead of sharing them out.
        types: of members that are read besides JSON, texts, images and videos.
    """

    shards: list[str]
    seed: int = 0
    shuffle: int = 1000
    resampled: bool = False
    types: tuple[str, ...] = ()

    def check(self, slots: int) -> None:
        """Refuse fewer shards than slots: one without data would hang the others.

        Raises:
            UserError: with the numbers.
        """
        if len(self.shards) < slots and not self.resampled:
            raise UserError(
                f"{len(self.shards)} shards cannot feed {slots} readers (ranks x workers): use at most "
                f"{len(self.shards)} readers in all (data.workers=...), pack into more shards, or draw them at random "
                "(data.resampled=true)."
            )

    @property
    def samples(self) -> int | None:
        """How many there are, as the indices say; None if one is missing."""
        counts = [expected_samples(shard) for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count is not None)

    def order(self, epoch: int, slot: Slot) -> list[str]:
        """The shards that a slot reads in an epoch; an order all slots agree on is shared out among them."""
        if self.resampled:
            draw = random.Random(f"{self.seed}/{epoch}/{slot.index}/shards")
            return draw.choices(self.shards, k=max(1, len(self.shards) // slot.count))
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        return shards[slot.index :: slot.count]

    def epoch(self, epoch: int, slot: Slot) -> Iterator[Raw]:
        """One pass over this slot's shards."""
        for _, raw in self.records(slot, StreamPosition(epoch)):
            if raw is None:
                return
            yield raw

    def records(self, slot: Slot, position: StreamPosition) -> Iterator[tuple[StreamPosition, Raw | None]]:
        """Records from a position on, without end, each with the position behind it; None when an epoch is complete."""
        for epoch in itertools.count(position.epoch):
            records = self._in_order(self.order(epoch, slot), position)
            any_record = False
            for start, block in _blocks(records, self.shuffle):
                any_record = True
                if self.shuffle:
                    random.Random(f"{self.seed}/{epoch}/{slot.index}/{start}").shuffle(block)
                block.reverse()
                taken, size = position.taken, len(block)
                del block[size - min(taken, size) :]
                while block:  # emptied as it is used: the next one fills meanwhile
                    raw, taken = block.pop(), taken + 1
                    raw["__epoch__"] = epoch
                    yield StreamPosition(epoch, *start, taken), raw
                position = StreamPosition()
            if not any_record and position == StreamPosition(epoch):
                raise UserError(f"there is not one sample in {self.order(epoch, slot)[0]} and those behind it.")
            position = StreamPosition(epoch + 1)
            yield position, None

    def _in_order(self, shards: list[str], position: StreamPosition) -> Iterator[tuple[tuple[int, int], Raw]]:
        """Records with the shard and the record they are, from a position on."""
        for shard in range(position.shard, len(shards)):
            first = position.record if shard == position.shard else 0
            for number, raw in enumerate(read_shard(shards[shard], first, types=self.types), start=first):
                yield (shard, number), raw


def _blocks(records: Iterator[tuple[tuple[int, int], Raw]], size: int) -> Iterator[tuple[tuple[int, int], list[Raw]]]:
    """Cut records into blocks of ``size`` (at least one), each with where its first is."""
    block: list[Raw] = []
    start, size_in_bytes = (0, 0), 0
    for position, raw in records:
        if not block:
            start, size_in_bytes = position, 0
        block.append(raw)
        size_in_bytes += sum(len(value) for value in raw.values() if isinstance(value, bytes))
        # A shard that cannot be read is reported at once, not behind all others that cannot.
        if len(block) >= max(1, size) or size_in_bytes > LARGEST_BLOCK or "__lost__" in raw:
            yield start, block
            block = []
    if block:
        yield start, block

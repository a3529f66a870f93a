"""Decoding videos, the same way wherever one comes from: a shard, a file on the command line.

    packets   | K  p  p  p | K  p  p  p | K  p  p  p |     read once, nothing decoded: when each frame is shown
    chosen            ^               ^        ^           from those times
    decoded     K  p  p         K  p  p    K  p            from the key frame before each; only the chosen are converted

The same file gives the same frames on every machine: one decoding thread, no clock, no guessing from frame rates.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from lavi.batch import Video
from lavi.data.frame_sampling import TICK, FrameSampling
from lavi.data.images import what_it_is
from lavi.errors import UserError

VIDEO_TYPES = ("mp4", "webm", "mkv", "gif")
"""Endings of the files that are read as videos."""

MAX_PIXELS = 50_000_000
"""A video whose frames have more pixels than this is refused before one is decoded; 8K has 33 million."""

CLIP_SLACK = 1.0
"""Seconds that a clip may end behind its video: annotations are rounded to whole seconds."""

DEMUXERS = "mov,matroska,gif"
"""FFmpeg's readers of mp4 and mov, of mkv and webm, of gif. No other is tried: no playlists, no lists of files."""

SEGMENT = b"\x18\x53\x80\x67"
"""What stands before all that an mkv holds."""

MATROSKA_SLACK = 0.05
"""Seconds by which a whole mkv's packets may end before the duration in its header."""

WORTH = 4
"""Frames between here and a key frame further on from which seeking is cheaper than decoding through."""


def is_video(name: str) -> bool:
    """Whether a file of this name is read as a video."""
    return name.lower().rpartition(".")[2] in VIDEO_TYPES


def read_video(
    source: Path | str | bytes,
    sampling: FrameSampling,
    *,
    clip: tuple[float, float] | None = None,
    name: str | None = None,
    clip_slack: float = CLIP_SLACK,
) -> Video:
    """Decode the frames that ``sampling`` keeps, to upright RGB.

    Of mp4 (mov), webm, mkv and gif: the first video stream that is no cover picture; sound is not decoded, and no file
    or address that the video may refer to is opened. A file cut short or damaged is used if each frame chosen of the
    *whole* of it is there; where a stream does not say how long it is (live webm, fragments), a cut between two frames
    cannot be seen.

    Args:
        source: a file, or its bytes.
        clip: from which second to which; by default all.
        name: what an error calls it; by default the file.
        clip_slack: up to so many seconds behind the video a clip's end is the video's end.

    Returns:
        F frames with the seconds at which they are shown, and the duration: of the clip, where there is one, else of
        the video.

    Raises:
        UserError: no such file; not a video, or one of more than :data:`MAX_PIXELS`; no frames; it is cut short or
            damaged; a clip that ends before it begins, or lies outside the video; a clip without a key frame.
    """
    called = name or ("this" if isinstance(source, bytes) else str(source))
    if clip is not None and not 0 <= clip[0] < clip[1] < math.inf:
        raise UserError(f"the clip {span(*clip)} of {called} is none: it runs from a second to a later one.")
    with _file(source) as file:
        table = _scanned(file, called, until=clip[1] if clip else None)
        start, stop = _cut_to(clip, table, called, clip_slack)
        chosen = sampling.pick(table.seconds, start, stop, keys=table.keys)
        if not chosen:
            raise UserError(f"{called} has no key frame in {span(start, stop)}: sample it how=uniform, or how=fps.")
        _check_all_there(sampling, table, start, stop, called)
        frames = _decoded(file, table, chosen, called)
    return Video(frames, [max(0.0, table.seconds[i] - start) for i in chosen], stop - start)


@dataclass(frozen=True)
class _Table:
    """The frames of a stream as its packets tell them, F of them in the order they are shown; nothing is decoded."""

    pts: list[int]
    keys: list[bool]
    seconds: list[float]
    end: float
    """When the last frame that is there is over, in seconds."""
    length: float
    """When the video is over, in seconds: later than ``end`` where it is cut short; inf where that is not known."""

    @property
    def is_cut(self) -> bool:
        return self.length > self.end

    def key_before(self, index: int) -> int:
        """The number of the key frame from which this frame can be decoded."""
        return next((i for i in range(index, 0, -1) if self.keys[i]), 0)


def _cut_to(clip: tuple[float, float] | None, table: _Table, called: str, slack: float) -> tuple[float, float]:
    """The seconds from which frames are taken."""
    if clip is None:
        return 0.0, table.length
    start, stop = clip
    if start >= table.length or stop > table.length + slack:
        raise UserError(f"the clip {span(start, stop)} lies outside {called}, which lasts {table.length:.2f} seconds.")
    return start, min(stop, table.length)


def _check_all_there(sampling: FrameSampling, table: _Table, start: float, stop: float, called: str) -> None:
    """Refuse a video that is cut before a frame that would be taken."""
    if not table.is_cut or stop <= table.end:
        return
    if sampling.how == "keyframes" or math.isinf(stop) or sampling.moments(start, stop)[-1] >= table.end:
        whole = "" if math.isinf(table.length) else f" of {table.length:.2f}"
        raise UserError(f"{called} is cut short: its frames end after {table.end:.2f}{whole} seconds.")


def span(start: float, stop: float) -> str:
    """Two times as an error has them."""
    return f"[{start:g}, {stop:g}]"


@contextmanager
def _file(source: Path | str | bytes) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - closed below; errors of reading are not for this handler
    except FileNotFoundError:
        raise UserError(f"there is no video {source}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read as a video ({getattr(error, 'strerror', error)}).") from None
    with file:
        yield file


@contextmanager
def _opened(file: BinaryIO, called: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, closed behind.

    FFmpeg gets the open file and may open nothing else: no protocol is allowed, references in a mov are not followed.
    """
    file.seek(0)
    try:
        with av.open(
            file,
            "r",
            metadata_errors="replace",
            io_open=_open_nothing,
            # Stream options, too: finding out what is in a stream may decode its first frame.
            options={"max_pixels": str(MAX_PIXELS)},
            container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none", "enable_drefs": "0"},
        ) as container:
            yield container, _video_stream(container, called)
    except (av.FFmpegError, OSError, ValueError) as error:
        file.seek(0)
        kind = what_it_is(file.read(512))
        if kind and "video" not in kind:
            raise UserError(
                f"{called} does not open as a video (it is {kind}), which is {_either(VIDEO_TYPES)}."
            ) from None
        cause = getattr(error, "strerror", None) or error
        raise UserError(
            f"{called} does not open as a video ({cause}): it is damaged, cut short, or no {_either(VIDEO_TYPES)}."
        ) from None


def _open_nothing(url: str, flags: int, options: dict[str, Any]) -> BinaryIO:
    raise PermissionError(f"a video may not open {url}")


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _video_stream(container: InputContainer, called: str) -> VideoStream:
    if not container.streams:
        raise UserError(f"{called} is cut short: it ends before it says what is in it.")
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UserError(f"{called} has no video stream: it is sound alone, or cut short.")
    stream = streams[0]
    if stream.codec_context is None:
        raise UserError(f"{called} is of a codec that is not decoded here, or damaged: convert it to h264.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width * height:  # what FFmpeg says of some codecs when it was stopped by max_pixels
        raise UserError(f"{called} has frames of no known size, or of more than the {MAX_PIXELS} pixels decoded.")
    if width * height > MAX_PIXELS:
        raise UserError(f"{called} has frames of {width}x{height} pixels, more than the {MAX_PIXELS} decoded.")
    return stream


def _scanned(file: BinaryIO, called: str, *, until: float | None) -> _Table:
    """Read the packets, up to the second ``until``, and decode nothing.

    Raises:
        UserError: not a video, or without a frame.
    """
    with _opened(file, called) as (container, stream):
        tick = stream.time_base or Fraction(1, av.time_base)
        origin = Fraction(container.start_time or 0, av.time_base)
        frames: dict[int, tuple[bool, int]] = {}  # by time stamp: key frame, ticks it is shown
        read, last, through = 0, 0.0, True
        for packet in _packets(container):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or packet.is_corrupt:  # the flush behind the last one, or what a cut has left of one
                continue
            last = max(last, float((stamp + (packet.duration or 0)) * (packet.time_base or tick) - origin))
            if packet.stream_index != stream.index:
                continue
            read += 1
            if packet.size and not packet.is_discard:
                frames[stamp] = packet.is_keyframe, packet.duration or 0
            if until is not None and packet.dts is not None and packet.dts * tick - origin > until:
                through = False
                break
        if not frames:
            raise UserError(f"{called} has no frames: it is empty or cut short.")
        pts = sorted(frames)
        gap = max((after - before for before, after in pairwise(pts)), default=0)
        shown = [float(stamp * tick - origin) for stamp in pts]
        end = float((pts[-1] + (frames[pts[-1]][1] or gap)) * tick - origin)
        last = max(last, end)
        length = _length(container, stream, file, read=read, last=last, origin=float(origin)) if through else None
        if length == math.inf:
            end = shown[-1]  # of the last frame only a part may be there
        return _Table(pts, [frames[stamp][0] for stamp in pts], shown, end, max(length or 0.0, end))


def _length(
    container: InputContainer, stream: VideoStream, file: BinaryIO, *, read: int, last: float, origin: float
) -> float | None:
    """How long a video that is cut short was, inf if that is not known; None if it is not cut.

    Args:
        read: packets of the stream that are there.
        last: when the last packet of any stream is over, in seconds: sound may go on behind the last frame.
        origin: what the file's clock shows at its start, in seconds.
    """
    promised = (container.duration or 0) / av.time_base
    if container.format.name == "gif":
        return None if _gif_is_ended(file) else math.inf
    if read < len(stream.index_entries):  # an mp4 lists all its packets
        return max(promised, last + TICK)
    if container.format.name.startswith("matroska"):
        return _matroska_length(file, promised, last=last, origin=origin)
    return None


def _matroska_length(file: BinaryIO, promised: float, *, last: float, origin: float) -> float | None:
    """As :func:`_length`. The header's duration is the time of the end (FFmpeg) or the length (mkvmerge): where the
    clock does not begin at 0 these are two, and only what is shorter than both is cut for certain.
    """
    shorter, longer = sorted((promised, promised - origin))
    if longer <= last + MATROSKA_SLACK or (shorter <= last + MATROSKA_SLACK and not _matroska_ends_early(file)):
        return None
    return promised if abs(origin) < TICK else math.inf


def _matroska_ends_early(file: BinaryIO) -> bool:
    """Whether the file has fewer bytes than its header announces; one written as it was filmed announces none."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(4096)
    first, start = _ebml_size(head, 4)  # behind the four bytes that say it is EBML
    if head[start + first : start + first + 4] != SEGMENT:
        return False
    announced, start = _ebml_size(head, start + first + 4)
    return announced is not None and start + announced > size


def _ebml_size(head: bytes, at: int) -> tuple[Any, int]:
    """A number of bytes in EBML, whose first byte says how many the number has, and where it ends; None: unknown."""
    width = 9 - head[at : at + 1].ljust(1, b"\1")[0].bit_length()
    value = int.from_bytes(head[at : at + width], "big") & ~(1 << 7 * width)
    return (None if value == (1 << 7 * width) - 1 else value), at + width


def _packets(container: InputContainer) -> Iterator[av.Packet]:
    """All packets in the order of the file; what lies behind damage is lost, like what lies behind a cut."""
    try:
        yield from container.demux()
    except av.FFmpegError:
        return


def _gif_is_ended(file: BinaryIO) -> bool:
    """Whether a gif's last byte is its end mark: nothing else tells a whole one from one that is cut short."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 64))
    return file.read().rstrip(b"\0").endswith(b";")


def _decoded(file: BinaryIO, table: _Table, chosen: list[int], called: str) -> list[Image.Image]:
    """The chosen frames, F of them. Where seeking does not find one (a wrong index), all is decoded through.

    Raises:
        UserError: one cannot be decoded.
    """
    frames: list[Image.Image] = []
    for seeking in (True, False):
        with _opened(file, called) as (container, stream):
            frames = list(_frames(container, stream, table, chosen, seeking=seeking))
        if len(frames) == len(chosen):
            return frames
    raise UserError(
        f"{called} is damaged: its frame at {table.seconds[chosen[len(frames)]]:.2f} seconds does not decode."
    )


def _frames(
    container: InputContainer, stream: VideoStream, table: _Table, chosen: list[int], *, seeking: bool
) -> Iterator[Image.Image]:
    """The chosen frames up to the first that does not come."""
    stream.codec_context.thread_count = 1  # reading workers are processes already
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    frames, position = _in_order(container, stream), -1
    for index in chosen:
        key = table.key_before(index)
        if seeking and key - position > WORTH:
            try:
                container.seek(table.pts[key], stream=stream)
            except av.FFmpegError:
                return
            frames = _in_order(container, stream)
        frame = next((f for f in frames if f.pts is not None and f.pts >= table.pts[index]), None)
        if frame is None or frame.pts != table.pts[index] or frame.is_corrupt:
            return
        position = index
        yield _upright(frame)


def _in_order(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames from here on, in the order they are shown; a packet that does not decode is left out."""
    try:
        for packet in container.demux(stream):
            if not packet.size and packet.pts is not None:
                continue  # an empty sample would end the decoding
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue
    except av.FFmpegError:  # the demuxer stops here
        return


# The matrix moves (x, y) to (a x + c y, b x + d y), y downwards; by the signs of a, b, c, d:
_TURNS: dict[tuple[int, ...], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # clockwise by 90 degrees
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_ROTATED: dict[int, tuple[int, ...]] = {
    90: (0, -1, 1, 0),
    180: (-1, 0, 0, -1),
    -180: (-1, 0, 0, -1),
    -90: (0, 1, -1, 0),
}
"""By degrees counterclockwise."""


def _upright(frame: VideoFrame) -> Image.Image:
    """The frame in RGB, turned as its display matrix says; matrices that do more than turn and mirror are left."""
    image: Image.Image = frame.to_image(threads=1)
    turn = _TURNS.get(_signs(frame))
    return image if turn is None else image.transpose(turn)


def _signs(frame: VideoFrame) -> tuple[int, ...]:
    """Of the display matrix's a, b, c, d; () without one."""
    try:
        sides: Any = frame.side_data
        matrix = sides[SideData.DISPLAYMATRIX]
    except KeyError:
        return ()
    except ValueError:  # there is side data that PyAV does not know: the rotation alone can be had
        return _ROTATED.get(frame.rotation, ())
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return tuple((n > 0) - (n < 0) for n in (a, b, c, d))

"""Decoding videos: the frames that were asked for and no others, at their true times; what is none says so."""

from __future__ import annotations

import copy
import gc
import io
import math
import random
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.formats.frames import from_frames
from lavi.batch import Video
from lavi.data import videos as video_files
from lavi.data.frame_sampling import FrameSampling
from lavi.data.timestamps import add_timestamps
from lavi.data.videos import is_video, read_video
from lavi.errors import UserError

STEP = 10
"""Frame number n is grey of this times n: that is how the frames that come back are known."""
ALL = FrameSampling(frames=1000)


def grey(number: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), STEP * number, np.uint8)


def encode(
    file: Path,
    frames: list[np.ndarray],
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    ticks: list[int] | None = None,
    rate: int = 10,
    sound: float = 0,
    gop: int = 5,
    **muxer: str,
) -> bytes:
    """Frames at ``rate`` a second, or at ``ticks`` of that; with ``sound`` seconds of silence."""
    with av.open(str(file), "w", format=kind, options=muxer) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2] if frames else (32, 32)
        stream.pix_fmt, stream.codec_context.gop_size, stream.codec_context.thread_count = "yuv420p", gop, 1
        if sound:
            heard = container.add_stream("libopus", rate=48000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, int(48000 * sound)), np.int16), "s16", "mono")
            samples.sample_rate = 48000
            container.mux(heard.encode(samples))
            container.mux(heard.encode(None))
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = ticks[number] if ticks else number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.read_bytes()


def gif(frames: list[Image.Image], milliseconds: int | list[int] = 100, **settings: Any) -> bytes:
    stream = io.BytesIO()
    frames[0].save(
        stream, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, disposal=2, loop=0, **settings
    )
    return stream.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "header first": {"movflags": "faststart"},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "mpeg4": {"codec": "mpeg4"},
    "webm": {"kind": "webm", "codec": "libvpx-vp9"},
    "mkv": {"kind": "matroska"},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two seconds of 20 frames, in each container."""
    folder, frames = tmp_path_factory.mktemp("videos"), [grey(number) for number in range(20)]
    videos = {name: encode(folder / name, frames, **kind) for name, kind in KINDS.items()}
    return videos | {"gif": gif([Image.fromarray(frame[..., 0]) for frame in frames])}


EACH = pytest.mark.parametrize("name", [*KINDS, "gif"])


def numbers(video: Video) -> list[int]:
    """Which frames these are."""
    assert all(frame.mode == "RGB" for frame in video.frames)
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in video.frames]


# --- which frames -----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (FrameSampling(frames=4), [2, 7, 12, 17]),
        (FrameSampling(frames=1), [10]),
        (FrameSampling(frames=20), list(range(20))),
        (FrameSampling(frames=30), list(range(20))),
        (FrameSampling(how="fps", fps=5, frames=50), list(range(0, 20, 2))),
        (FrameSampling(how="fps", fps=100, frames=1000), list(range(20))),
        (FrameSampling(how="fps", fps=5, frames=4), [2, 7, 12, 17]),
        (FrameSampling(how="fps", fps=0.1, frames=4), [0]),
    ],
    ids=str,
)
def test_the_frames_that_were_asked_for_come_back(
    videos: dict[str, bytes], name: str, sampling: FrameSampling, expected: list[int]
) -> None:
    video = read_video(videos[name], sampling)
    assert numbers(video) == expected
    assert video.seconds == pytest.approx([number / 10 for number in expected])
    assert video.duration == pytest.approx(2)
    assert video.frames[0].size == (32, 32)


def test_a_file_gives_what_its_bytes_give(videos: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(videos["mp4"])
    for source in (tmp_path / "video", str(tmp_path / "video")):
        video, other = read_video(source, ALL), read_video(videos["mp4"], ALL)
        assert [frame.tobytes() for frame in video.frames] == [frame.tobytes() for frame in other.frames]
        assert video.seconds == other.seconds


@EACH
def test_a_clip_is_the_frames_on_screen_in_it(videos: dict[str, bytes], name: str) -> None:
    video = read_video(videos[name], ALL, clip=(0.5, 1.0))
    assert numbers(video) == [5, 6, 7, 8, 9]
    assert video.seconds == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])  # of the clip, as its duration is
    assert video.duration == pytest.approx(0.5)
    assert numbers(read_video(videos[name], FrameSampling(frames=2), clip=(1.0, 2.5))) == [12, 17]
    assert numbers(read_video(videos[name], ALL, clip=(1.32, 1.34))) == [13]


@pytest.mark.parametrize("name", ["mp4", "webm", "mkv", "fragments"])
def test_key_frames_are_those_that_are_stored(videos: dict[str, bytes], name: str) -> None:
    with av.open(io.BytesIO(videos[name])) as container:
        stored = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert 3 < len(stored) < 10
    assert numbers(read_video(videos[name], FrameSampling(how="keyframes", frames=20))) == stored
    thinned = numbers(read_video(videos[name], FrameSampling(how="keyframes", frames=2)))
    assert len(thinned) == 2
    assert set(thinned) <= set(stored)
    with pytest.raises(UserError, match="no key frame"):
        read_video(videos[name], FrameSampling(how="keyframes"), clip=(stored[1] / 10 + 0.1, stored[1] / 10 + 0.2))


@pytest.mark.parametrize("name", ["mp4", "mkv"])
def test_times_are_those_of_the_frames_not_of_a_rate(tmp_path: Path, name: str) -> None:
    ticks = [0, 1, 2, 10, 11, 30]
    data = encode(tmp_path / "v", [grey(number) for number in range(6)], ticks=ticks, **KINDS[name])
    video = read_video(data, ALL)
    assert numbers(video) == list(range(6))
    assert video.seconds == pytest.approx([tick / 10 for tick in ticks])
    assert video.duration is not None
    assert video.duration >= 3.0
    # On screen at 0, 1, 2 seconds.
    assert numbers(read_video(data, FrameSampling(how="fps", fps=1), clip=(0, 3))) == [0, 3, 4]
    # The fourth is on screen in the middle of two parts, and comes once.
    assert numbers(read_video(data, FrameSampling(frames=4), clip=(0, 3))) == [2, 4]


def test_sound_that_goes_on_is_not_part_of_the_video(tmp_path: Path) -> None:
    data = encode(tmp_path / "v", [grey(number) for number in range(10)], sound=2, **KINDS["mkv"])
    video = read_video(data, FrameSampling(frames=5))
    assert numbers(video) == [1, 3, 5, 7, 9]
    assert video.duration == pytest.approx(1, abs=0.02)


def test_gifs_move_at_their_own_times_on_white() -> None:
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (number, 0, number + 1, 1))
    video = read_video(gif(frames, [100, 500, 200]), ALL)
    assert video.seconds == pytest.approx([0, 0.1, 0.6])
    assert video.duration == pytest.approx(0.8)
    for number, frame in enumerate(video.frames):
        assert [frame.getpixel((x, 0)) == (255, 0, 0) for x in range(3)] == [x == number for x in range(3)]
        assert frame.getpixel((7, 7)) == (255, 255, 255)


@pytest.mark.parametrize("how", ["uniform", "fps", "keyframes"])
def test_a_still_gif_is_one_frame(how: Any) -> None:
    assert numbers(read_video(gif([Image.new("L", (8, 8), 70)]), FrameSampling(how=how))) == [7]


MATRICES = {
    (1, 0, 0, 1): "ABCD",
    (0, 1, -1, 0): "CADB",
    (-1, 0, 0, -1): "DCBA",
    (0, -1, 1, 0): "BDAC",
    (-1, 0, 0, 1): "BADC",
    (1, 0, 0, -1): "CDAB",
    (0, 1, 1, 0): "ACBD",
    (0, -1, -1, 0): "DBCA",
}
"""A telephone's turns and mirrors, and where the quarters ABCD of what is stored appear, row by row."""


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_frames_stand_upright(tmp_path: Path, matrix: tuple[int, ...]) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    for letter, (y, x) in zip("ABCD", ((0, 0), (0, 32), (16, 0), (16, 32)), strict=True):
        stored[y : y + 16, x : x + 32] = 40 + 40 * "ABCD".index(letter)
    data = bytearray(encode(tmp_path / "v", [stored]))
    a, b, c, d = (n << 16 for n in matrix)
    at = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    frame = np.asarray(read_video(bytes(data), ALL).frames[0])[..., 0].astype(float)
    assert frame.shape == ((32, 64) if matrix[0] else (64, 32))
    rows, columns = frame.shape
    quarters = frame.reshape(2, rows // 2, 2, columns // 2).mean(axis=(1, 3)).flatten()
    assert "".join("ABCD"[round((value - 40) / 40)] for value in quarters) == MATRICES[matrix]


def test_side_data_of_a_newer_ffmpeg_leaves_the_rotation() -> None:
    class Frame:
        rotation = -90

        @property
        def side_data(self) -> None:
            raise ValueError("31 is not a valid Type")

    assert video_files._signs(Frame()) == (0, 1, -1, 0)  # type: ignore[arg-type]


def test_titles_of_any_encoding_are_no_matter(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        container.metadata["title"] = "titled"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(3), format="rgb24")))
        container.mux(stream.encode(None))
    data = (tmp_path / "v.mp4").read_bytes()
    assert b"titled" in data
    assert numbers(read_video(data.replace(b"titled", b"t\xeft\xe9\xff\xfe"), ALL)) == [3]


# --- no more than needed ----------------------------------------------------------------------------------------------


@EACH
def test_seeking_changes_nothing(videos: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [read_video(videos[name], FrameSampling(frames=count)) for count in (1, 3, 20)]
    for worth in (0, 10**9):
        monkeypatch.setattr(video_files, "WORTH", worth)
        for count, other in zip((1, 3, 20), whole, strict=True):
            video = read_video(videos[name], FrameSampling(frames=count))
            assert [frame.tobytes() for frame in video.frames] == [frame.tobytes() for frame in other.frames]


def test_what_seeking_does_not_find_is_decoded_through(
    videos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = video_files._frames
    monkeypatch.setattr(
        video_files, "_frames", lambda *args, seeking: whole(*args, seeking=False) if not seeking else ()
    )
    assert numbers(read_video(videos["mp4"], FrameSampling(frames=4))) == [2, 7, 12, 17]


def test_only_what_is_kept_is_converted_and_little_more_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(tmp_path / "v", [grey(number % 20) for number in range(100)], gop=10, **KINDS["webm"])
    in_order, upright, done = video_files._in_order, video_files._upright, {"decoded": 0, "converted": 0}

    def decoding(*args: Any) -> Any:
        for frame in in_order(*args):
            done["decoded"] += 1
            yield frame

    def converting(frame: Any) -> Any:
        done["converted"] += 1
        return upright(frame)

    monkeypatch.setattr(video_files, "_in_order", decoding)
    monkeypatch.setattr(video_files, "_upright", converting)
    read_video(data, FrameSampling(frames=2))  # numbers 25 and 75, behind the key frames 20 and 70
    assert done == {"decoded": 12, "converted": 2}


def test_files_are_closed(videos: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "good.mp4").write_bytes(videos["mp4"])
    (tmp_path / "bad.mp4").write_bytes(videos["mp4"][:800])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        read_video(tmp_path / "good.mp4", FrameSampling())
        with pytest.raises(UserError):
            read_video(tmp_path / "bad.mp4", FrameSampling())
        gc.collect()
    assert not [warning for warning in warned if "mp4" in str(warning.message)]


@EACH
def test_too_many_pixels_are_refused_before_decoding(
    videos: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_files, "MAX_PIXELS", 1000)
    monkeypatch.setattr(video_files, "_frames", lambda *args, **more: pytest.fail("it was decoded"))
    with pytest.raises(
        UserError, match=r"it has frames of (32x32 pixels, more|no known size, or of more) than the 1000"
    ):
        read_video(videos[name], FrameSampling(), name="it")


# --- what is no video -------------------------------------------------------------------------------------------------


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def test_what_is_no_video_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = {"nothing": b"", "text": b"text, not frames " * 100, "a picture": picture()}
    for data in wrong.values():
        (tmp_path / "wrong.mp4").write_bytes(data)
        with pytest.raises(UserError, match=r"wrong\.mp4 does not open as a video \(.*mp4, webm, mkv or gif") as caught:
            read_video(tmp_path / "wrong.mp4", FrameSampling())
        assert "object at" not in str(caught.value)
    with pytest.raises(UserError, match=r"there is no video .*gone\.mp4"):
        read_video(tmp_path / "gone.mp4", FrameSampling())
    with pytest.raises(UserError, match="cannot be read as a video"):
        read_video(tmp_path, FrameSampling())
    assert capfd.readouterr().err == ""


def test_lists_and_other_formats_are_not_followed(tmp_path: Path) -> None:
    """A file that names others: FFmpeg would read them."""
    inside = tmp_path / "inside.ts"
    encode(inside, [grey(number) for number in range(5)], kind="mpegts")
    lists = (
        f"ffconcat version 1.0\nfile {inside}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{inside}\n#EXT-X-ENDLIST\n",
    )
    for data in (*(text.encode() for text in lists), inside.read_bytes()):
        with pytest.raises(UserError, match="does not open"):
            read_video(data, FrameSampling())
    with pytest.raises(PermissionError, match="may not open"):
        video_files._open_nothing("http://example.org", 0, {})


def test_sound_alone_and_no_frames(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        heard = container.add_stream("aac", rate=48000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        samples.sample_rate = 48000
        container.mux(heard.encode(samples))
        container.mux(heard.encode(None))
    with pytest.raises(UserError, match=r"sound\.mp4 has no video stream"):
        read_video(tmp_path / "sound.mp4", FrameSampling())
    data = encode(tmp_path / "v", [grey(1)], movflags="frag_keyframe+empty_moov")
    with pytest.raises(UserError, match="it has no frames"):
        read_video(data[: data.index(b"moof") - 4], FrameSampling(), name="it")


@pytest.mark.parametrize("name", ["mp4", "header first", "mpeg4", "webm", "mkv", "gif"])
def test_a_video_cut_short_is_what_it_was_or_refused(videos: dict[str, bytes], name: str) -> None:
    """Never other frames than those of the whole: not spread over the part that is there."""
    data, refused = videos[name], 0
    for frames in (1, 4, 20):
        whole = read_video(data, FrameSampling(frames=frames))
        for percent in (1, 10, 30, 50, 60, 70, 80, 90, 95, 97, 99, 99.5):
            try:
                video = read_video(data[: int(len(data) * percent / 100)], FrameSampling(frames=frames))
            except UserError:
                refused += 1
                continue
            assert video.seconds == whole.seconds, percent
            assert [f.tobytes() for f in video.frames] == [f.tobytes() for f in whole.frames], percent
            assert percent > 50
    assert refused >= 12


# --- clocks that do not begin at 0 ------------------------------------------------------------------------------------

CLOCKS = pytest.mark.parametrize("name", ["webm", "mkv"])


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], bytes]:
    """Two seconds of 20 frames whose clock begins at so many tenths of a second."""
    folder, frames = tmp_path_factory.mktemp("late"), [grey(number) for number in range(20)]
    return {
        (name, start): encode(folder / name, frames, ticks=[start + n for n in range(20)], **KINDS[name])
        for name in ("mp4", "fragments", "webm", "mkv")
        for start in (1, 50)
    }


def with_duration(data: bytes, seconds: float) -> bytes:
    """A Matroska file whose header gives another duration: mkvmerge writes the length where FFmpeg writes the end."""
    at = data.index(b"\x44\x89\x88") + 3
    return data[:at] + struct.pack(">d", 1000 * seconds) + data[at + 8 :]


@pytest.mark.parametrize("start", [1, 50])
@pytest.mark.parametrize("name", ["mp4", "fragments", "webm", "mkv"])
def test_seconds_are_counted_from_the_start_whatever_the_clock_shows(
    late: dict[tuple[str, int], bytes], name: str, start: int
) -> None:
    data = late[name, start]
    video = read_video(data, ALL)
    assert numbers(video) == list(range(20))
    assert video.seconds == pytest.approx([number / 10 for number in range(20)])
    assert video.duration == pytest.approx(2)
    assert numbers(read_video(data, FrameSampling(frames=4))) == [2, 7, 12, 17]
    assert numbers(read_video(data, ALL, clip=(0.5, 1.0))) == [5, 6, 7, 8, 9]
    with pytest.raises(UserError, match=r"lasts 2\.00 seconds"):
        read_video(data, ALL, clip=(0.5, 5.5))


@CLOCKS
@pytest.mark.parametrize("start", [1, 50])
@pytest.mark.parametrize("by", ["FFmpeg", "mkvmerge"])
def test_a_late_clock_hides_no_cut(late: dict[tuple[str, int], bytes], name: str, start: int, by: str) -> None:
    data = late[name, start] if by == "FFmpeg" else with_duration(late[name, start], 2)
    for frames in (4, 20):
        whole = read_video(data, FrameSampling(frames=frames))
        refused = 0
        for percent in (30, 50, 60, 70, 80, 90, 95, 97, 99):
            try:
                video = read_video(data[: int(len(data) * percent / 100)], FrameSampling(frames=frames))
            except UserError:
                refused += 1
            else:
                assert (video.seconds, numbers(video)) == (whole.seconds, numbers(whole)), percent
        assert refused >= 4
    cut = data[: int(len(data) * 0.9)]
    with pytest.raises(UserError, match=r"it is cut short: its frames end after 1\.\d\d"):
        read_video(cut, ALL, name="it")
    assert numbers(read_video(cut, ALL, clip=(0.2, 0.6))) == [2, 3, 4, 5]


@CLOCKS
def test_a_recording_that_announces_nothing_is_whole(tmp_path: Path, name: str) -> None:
    """What a browser records: no duration, no size, and a clock that began before."""
    ticks = [7 + number for number in range(20)]
    data = encode(tmp_path / "v", [grey(number) for number in range(20)], ticks=ticks, live="1", **KINDS[name])
    video = read_video(data, ALL)
    assert (numbers(video), video.seconds[0], video.duration) == (list(range(20)), 0.0, pytest.approx(2))


def test_sound_may_begin_before_the_frames(tmp_path: Path) -> None:
    data = encode(
        tmp_path / "v", [grey(n) for n in range(10)], ticks=[5 + n for n in range(10)], sound=2, **KINDS["mkv"]
    )
    video = read_video(data, ALL)
    assert numbers(video) == list(range(10))
    assert video.seconds[0] == pytest.approx(0.5, abs=0.01)


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["header first", "webm", "gif"])
def test_a_cut_says_where_and_a_clip_before_it_is_good(videos: dict[str, bytes], name: str) -> None:
    data = videos[name][: int(len(videos[name]) * 0.9)]
    with pytest.raises(UserError, match=r"it is cut short: its frames end after 1\.\d\d"):
        read_video(data, ALL, name="it")
    with pytest.raises(UserError, match="cut short"):
        read_video(data, FrameSampling(how="keyframes"))
    assert numbers(read_video(data, ALL, clip=(0.2, 0.6))) == [2, 3, 4, 5]
    with pytest.raises(UserError, match="cut short"):  # within the last frame
        read_video(videos["header first"][:-4], ALL)


def test_a_damaged_frame_that_is_wanted_is_refused(videos: dict[str, bytes]) -> None:
    with av.open(io.BytesIO(videos["webm"])) as container:
        packet = next(p for p in container.demux(video=0) if p.pts == 700)
        at = videos["webm"].index(bytes(packet))
        data = bytearray(videos["webm"])
        data[at : at + packet.size] = b"\xff" * packet.size
    with pytest.raises(UserError, match=r"it is damaged: its frame at 0\.70 seconds does not decode"):
        read_video(bytes(data), ALL, name="it")
    assert numbers(read_video(bytes(data), FrameSampling(frames=2))) == [5, 15]


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ((1.0, 0.5), r"the clip \[1, 0.5\] of it is none"),
        ((1.0, 1.0), "none"),
        ((-1.0, 1.0), "none"),
        ((math.nan, 1.0), "none"),
        ((0.0, math.inf), "none"),
        ((2.0, 2.5), "outside it, which lasts 2.00"),
        ((0.0, 3.5), "outside it"),
    ],
)
def test_clips_that_are_none(videos: dict[str, bytes], clip: tuple[float, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_video(videos["mp4"], FrameSampling(), clip=clip, name="it")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_no_damage_escapes_as_another_error(videos: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(videos[rng.choice(sorted(videos))])
    for _ in range(rng.choice([1, 2, 16])):
        data[rng.randrange(min(len(data), rng.choice([64, 900, len(data)])))] = rng.randrange(256)
    if rng.random() < 0.2:
        at = rng.randrange(len(data))
        del data[at : at + rng.randrange(100)]
    sampling = FrameSampling(how=rng.choice(["uniform", "fps", "keyframes"]), frames=rng.choice([1, 4, 30]))
    try:
        video = read_video(bytes(data), sampling, clip=rng.choice([None, (0.5, 1.0)]))
    except UserError:
        return
    assert 0 < len(video.frames) == len(video.seconds) <= sampling.frames
    assert video.seconds == sorted(video.seconds)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"how": "random"}, {"frames": 0}, {"frames": 2.5}, {"frames": True}, {"fps": 0}, {"fps": math.nan}, {"fps": "2"}],
    ids=str,
)
def test_samplings_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        FrameSampling(**wrong)


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.floats(0.01, 5), min_size=1, max_size=40),
    how=st.sampled_from(["uniform", "fps", "keyframes"]),
    frames=st.integers(1, 50),
    fps=st.floats(0.1, 60),
)
def test_frames_are_few_in_order_and_never_twice(gaps: list[float], how: Any, frames: int, fps: float) -> None:
    seconds = [0.0, *np.cumsum(gaps)]
    stop = seconds[-1] + 1
    picked = FrameSampling(how=how, frames=frames, fps=fps).pick(seconds, 0.0, stop)
    assert picked == sorted(set(picked))
    assert 1 <= len(picked) <= frames
    assert 0 <= picked[0] <= picked[-1] < len(seconds)
    if how == "uniform" and len(seconds) <= frames:
        assert len(picked) == len(seconds)


def test_names_of_videos() -> None:
    assert all(map(is_video, ("mp4", "a.MP4", "0.webm", "a.b.mkv", "x.gif")))
    assert not any(map(is_video, ("a.jpg", "mp4.txt", "json", "")))


# --- in words ---------------------------------------------------------------------------------------------------------


def test_times_are_told_behind_each_video() -> None:
    frame = Image.new("RGB", (1, 1))
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "video"}, {"type": "video"}]},
        {"role": "assistant", "content": "yes", "family": "f"},
    ]
    before = copy.deepcopy(messages)
    videos = [Video([frame] * 2, [0.5, 3.26], 12.0), Video([frame]), Video([frame], [1.0])]
    timed = add_timestamps(messages, videos)
    assert messages == before
    assert [timed[0], timed[2]] == [before[0], before[2]]
    assert timed[1]["content"] == [
        {"type": "video"},
        {"type": "text", "text": "This video lasts 12.0 seconds; its 2 frames are from 0.5, 3.3 seconds.\n"},
        {"type": "image"},
        {"type": "video"},
        {"type": "video"},
        {"type": "text", "text": "Its one frame is from 1.0 seconds.\n"},
    ]
    with pytest.raises(UserError, match="3 video parts and 2 videos"):
        add_timestamps(messages, videos[:2])


def test_extracted_frames_are_thinned_as_a_video_is(videos: dict[str, bytes]) -> None:
    images = read_video(videos["mp4"], ALL).frames
    for sampling in (FrameSampling(frames=4), FrameSampling(how="fps", fps=5, frames=50), ALL):
        video, same = from_frames(images, sampling, fps=10), read_video(videos["mp4"], sampling)
        assert numbers(video) == numbers(same)
        assert video.seconds == pytest.approx(same.seconds)
        assert video.duration == pytest.approx(same.duration)
    untimed = from_frames(images, FrameSampling(how="fps", frames=4), fps=None)
    assert (numbers(untimed), untimed.seconds, untimed.duration) == ([2, 7, 12, 17], [], None)
    assert numbers(from_frames(images, FrameSampling(how="keyframes", frames=4), fps=None)) == [2, 7, 12, 17]
    for fps in (0, math.nan):
        with pytest.raises(UserError, match="fps"):
            from_frames(images, ALL, fps=fps)
    with pytest.raises(UserError, match="no frames"):
        from_frames([], ALL, fps=1)

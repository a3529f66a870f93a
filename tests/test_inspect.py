"""Looking at shards: the numbers, what is broken, the sheet; never a traceback."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from datamodules import inspect
from datamodules.formats.conversations import Conversations
from datamodules.inspect import pictures_of, scan
from datamodules.shards.read import BrokenSample, read_shard
from datamodules.shards.sources import find_shards
from datamodules.shards.write import ShardJob, shard_jobs, write_shards


@pytest.fixture
def run(run):  # type: ignore[no-untyped-def]
    """Runs ``python -m datamodules.inspect ARGUMENTS``: (status, what it prints)."""

    def call(*arguments: object) -> tuple[int, str]:
        status, out, err = run("datamodules.inspect", *arguments)
        assert "Traceback" not in err
        return status, out + err

    return call


def jpeg(width: int, height: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 50).save(stream, "JPEG")
    return stream.getvalue()


def video(colours: list[int]) -> bytes:
    """A frame a second, each of one grey."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=1)
        track.width = track.height = 32
        for grey in colours:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), format="rgb24")
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return stream.getvalue()


GREYS = [0, 60, 120, 180, 250]
TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how much is $x_ or 五?"}]},
        {"role": "assistant", "content": "$1"}]  # fmt: skip


def samples(job: ShardJob) -> Iterator[dict[str, Any]]:
    """Of four: a conversation on an image, one on two frames, captions, captions of a video."""
    for number in range(job.start, job.stop):
        first: dict[str, Any] = {"__key__": f"{number:03d}"}
        image = jpeg(30 + number)
        kind = number % 4
        if kind == 0:
            yield first | {"json": {"messages": TALK}, "jpg": image}
        elif kind == 1:
            said = [{"role": "user", "content": [{"type": "video"}]}, TALK[1]]
            yield first | {"json": {"messages": said, "frames": [2], "fps": 1}, "0.jpg": image, "1.jpg": image}
        elif kind == 2:
            yield first | {"json": {"captions": ["red", "a red thing"]}, "jpg": image}
        else:
            yield first | {"json": {"captions": ["grey"]}, "mp4": video(GREYS)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "good"
    write_shards(folder, shard_jobs(16, 8), samples, made_by={"test": 1})
    return folder


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    shutil.copytree(written, tmp_path / "good")
    return tmp_path / "good"


def rewrite(shard: Path, change: Any) -> None:
    """Write a shard again with its members changed: ``change(name, data)`` gives the data, or None to leave it out."""
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            changed = change(name, data)
            if changed is not None:
                info = tarfile.TarInfo(name)
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_the_numbers_are_those_of_the_index(run, shards: Path, tokenizer: str) -> None:  # type: ignore[no-untyped-def]
    status, out = run(shards, "--tokenizer", tokenizer)
    assert status == 0, out
    statistics = json.loads((shards / "index.json").read_text())["statistics"]
    shown = flat(out)
    expected = {
        "good samples": 16,
        "conversations": 8,
        "turns": 16,
        "captions": 12,
        "images": 8,
        "videos": 8,
        "frames": 8,
    }
    for name, number in expected.items():
        assert f" {name} {number} " in shown, name
        assert statistics[name.removeprefix("good ")] == number
    assert f"bytes of mp4 {statistics['sizes']['mp4']:,}" in shown
    assert f"< 64 {sum(1 for n in range(16) if n % 4 in (0, 1, 1, 2)) + 4}" in shown  # widths: 30 to 45, frames twice
    assert "tokens of a sample" in shown
    contents = scan((raw for shard in find_shards(str(shards)) for raw in read_shard(shard)), check=True)
    assert contents.counts.summary() == statistics


def test_a_limit_and_a_pattern_look_at_less(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    assert "good samples 5 " in flat(run(shards, "--limit", 5)[1])
    assert "good samples 8 " in flat(run(f"{shards}/shard-{{000001..000001}}.tar")[1])


def test_each_kind_of_damage_is_named_with_its_key(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    def harm(name: str, data: bytes) -> bytes | None:
        if name == "000.jpg":
            return data[:-1] + b"x"
        if name == "001.0.jpg":
            return None
        return {"002.json": b"{", "003.json": b'{"text": 1}', "004.json": b"[" * 100000}.get(name, data)

    rewrite(shards / "shard-000000.tar", harm)
    status, out = run(shards)
    assert status == 1
    shown = flat(out)
    assert "its member 'jpg' was altered" in shown
    assert "its member '0.jpg' is missing" in shown
    assert "is not JSON 2 002, 004" in shown
    assert "has no 'messages', 'conversations' or 'captions' 1 003" in shown
    assert "good samples 11 " in shown


def test_only_check_decodes_and_sums(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    """A picture cut before it was packed has a sound header and a sound checksum."""

    def cut(name: str, data: bytes) -> bytes:
        kept = data[: len(data) // 2]
        if name == "000.json":
            return json.dumps({"messages": TALK, "crc32": {"jpg": zlib.crc32(jpegs["000.jpg"])}}).encode()
        if name == "000.jpg":
            jpegs[name] = kept
        return jpegs.get(name, data)

    jpegs: dict[str, bytes] = {}
    rewrite(shards / "shard-000000.tar", cut)  # the first time to know the cut picture
    rewrite(shards / "shard-000000.tar", lambda name, data: cut(name, data) if name == "000.json" else data)
    assert run(shards)[0] == 0
    status, out = run(shards, "--check")
    assert status == 1
    assert "its member 'jpg' is not an image that opens" in flat(out)
    assert "another sha256 than its index says 1 shard-000000.tar" in flat(out)


def test_shards_cut_short_or_gone_are_named(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    first = shards / "shard-000000.tar"
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    (shards / "shard-000001.tar").unlink()
    status, out = run(shards)
    assert status == 1
    assert "the shard is not there" in flat(out)
    good = int(flat(out).split("good samples ")[1].split()[0])
    assert f" {8 - good} shard-000000.tar" in flat(out)


def test_keys_that_come_twice_are_broken(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    (shards / "index.json").unlink()
    shutil.copy(shards / "shard-000000.tar", shards / "again.tar")
    status, out = run(shards)
    assert status == 1
    assert "8 keys come more than once" in flat(out)
    assert "000 2" in flat(out)


@pytest.mark.parametrize("name", ["sheet.png", "deeper/sheet.pdf"])
def test_a_sheet_is_drawn_of_every_kind_of_sample(run, shards: Path, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    status, out = run(shards, "--sheet", tmp_path / name)
    assert status == 0, out
    assert "16 samples" in out
    if name.endswith("png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > 1000
            assert len(sheet.convert("RGB").getcolors(10**7) or []) > 100


def test_a_video_shows_its_first_middle_and_last_frame() -> None:
    frames = pictures_of({"__key__": "k", "json": b"{}", "mp4": video(GREYS)})
    greys = [np.asarray(frame).mean() for frame in frames]
    assert np.abs(np.array(greys) - [GREYS[0], GREYS[2], GREYS[-1]]).max() < 12
    assert pictures_of({"__key__": "k", "mp4": b"none"}) == []


def test_samples_kept_for_the_sheet_come_from_everywhere() -> None:
    said = json.dumps({"captions": ["x"]}).encode()
    records = [{"__key__": f"{n:03d}", "json": said, "jpg": b"never opened"} for n in range(1000)]
    kept = [int(raw["__key__"]) for raw in scan(records, check=False, sheet=40).sheet]
    assert len(set(kept)) == 40
    assert min(kept) < 200 < 800 < max(kept)


def test_images_that_are_missing_are_named_without_decoding(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A hard link of tar's is its image; a mark without a member is not."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, member in (("0", jpeg(40)), ("1", "0.jpg"), ("2", None)):
            said = json.dumps({"messages": TALK}).encode()
            if member is not None:
                header = tarfile.TarInfo(f"{key}.jpg")
                if isinstance(member, str):
                    header.type, header.linkname = tarfile.LNKTYPE, member
                header.size = len(member) if isinstance(member, bytes) else 0
                tar.addfile(header, io.BytesIO(member) if isinstance(member, bytes) else None)
            header = tarfile.TarInfo(f"{key}.json")
            header.size = len(said)
            tar.addfile(header, io.BytesIO(said))
    for options in ((), ("--check",)):
        status, out = run(tmp_path / "a.tar", *options)
        assert status == 1
        assert "good samples 2 " in flat(out)
        assert "images 2 " in flat(out)
        assert "its messages ask for more images and videos than it has" in flat(out)


def test_what_cannot_be_written_or_read_is_said_before_the_work(  # type: ignore[no-untyped-def]
    run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "scan", lambda *given, **more: pytest.fail("it looked"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments, words in [
        (("--sheet", tmp_path / "sheet.txt"), "cannot be written as '.txt': name it .png, .pdf or .svg"),
        (("--sheet", tmp_path / "sheet"), "cannot be written as ''"),
        (("--sheet", shards / "index.json" / "sheet.png"), "cannot be written"),
        (("--tokenizer", "~/gone"), f"{tmp_path}/gone has no tokenizer"),
        (("--limit", -1), "--limit: a whole number from 1, not '-1'"),
        (("--limit", "nan"), "--limit: a whole number from 1, not 'nan'"),
    ]:
        status, out = run("~/good", *arguments)
        assert (status, words in out) == (2, True), out
    assert not (tmp_path / "sheet").exists()


def test_mistakes_are_sentences(run, shards: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for arguments, words in [
        ((tmp_path / "gone",), "no shards at"),
        ((shards, "--limit", 0), "--limit: a whole number from 1"),
        ((shards, "--tokenizer", tmp_path), "has no tokenizer"),
        ((shards, "--sheet", tmp_path / "sheet.txt"), "cannot be written"),
        ((shards, "--sheet", shards / "index.json" / "sheet.png"), "cannot be written"),
    ]:
        status, out = run(*arguments)
        assert status == 2
        assert words in out
    (shards / "index.json").write_text("{")
    assert run(shards)[0] == 2


def test_noise_instead_of_data_is_counted_and_never_a_traceback(run, shards: Path) -> None:  # type: ignore[no-untyped-def]
    """Members and JSON of every wrong kind; whole shards of noise."""
    rng = random.Random(0)
    wrong = [3, "x", None, [], [3], {}, {"a": 1}, [[]], -1.5, True]

    def noise(name: str, data: bytes) -> bytes:
        if not name.endswith("json"):
            return data
        fields = ("messages", "captions", "caption", "conversations", "frames", "fps", "clip", "crc32")
        return json.dumps({field: rng.choice(wrong) for field in fields if rng.random() < 0.6}).encode()

    (shards / "index.json").unlink()
    original = (shards / "shard-000001.tar").read_bytes()
    for _ in range(6):
        rewrite(shards / "shard-000000.tar", noise)
        harmed = bytearray(original)
        for index in rng.sample(range(len(harmed)), 200):
            harmed[index] = rng.randrange(256)
        (shards / "shard-000001.tar").write_bytes(harmed)
        assert run(shards, "--check")[0] == 1
        assert run(shards, "--sheet", shards / "sheet.png")[0] in (1, 2)


def test_a_broken_sample_is_named_with_its_folders() -> None:
    contents = scan([{"__key__": "sub/a", "__shard__": "x.tar", "json": b"no"}], check=False)
    assert contents.broken == {"its .json member is not JSON": ["sub/a"]}


def test_captions_without_words_or_images_are_broken(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As training finds them, without decoding anything."""
    for record in ({"captions": []}, {"captions": [" "]}):
        with pytest.raises(BrokenSample):
            Conversations().check({"__key__": "k", "json": json.dumps(record).encode(), "jpg": jpeg(40)})
    with pytest.raises(BrokenSample):
        Conversations().check({"__key__": "k", "json": json.dumps({"captions": ["a dog"]}).encode()})

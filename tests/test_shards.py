"""Shards: what is read, in which order, and what happens to broken ones."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.formats.conversations import Conversations
from datamodules.image_text import ImageTextData
from datamodules.shards.read import BrokenSample, ShardStream, Slot, read_shard
from datamodules.shards.sources import find_shards
from lavi.batch import Batch
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion

decode = Conversations().decode

GOOD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]}


def png(side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def bomb() -> bytes:
    """A real PNG of 50,000 x 50,000 pixels, all black: 300 kB that decode to gigabytes."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    pixels = zlib.compressobj(6)
    rows = b"".join(pixels.compress(bytes(6251 * 1000)) for _ in range(50)) + pixels.flush()
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, content: Any = GOOD, image: bytes | None = None) -> list[tuple[str, bytes]]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return [(f"{key}.json", data), (f"{key}.png", png() if image is None else image)]


@pytest.fixture
def stream(scenes: Path) -> ShardStream:
    return ShardStream(find_shards(str(scenes / "train")), seed=0, shuffle=30)


def keys(samples: Any) -> list[str]:
    return [raw["__key__"] for raw in samples]


def test_each_epoch_has_every_sample_once_in_its_own_order(stream: ShardStream) -> None:
    first, second = keys(stream.epoch(0, Slot())), keys(stream.epoch(1, Slot()))
    assert len(first) == len(set(first)) > 200
    assert sorted(first) == sorted(second)
    assert first != second != sorted(second)
    assert first == keys(stream.epoch(0, Slot()))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_readers_share_the_samples_without_overlap(stream: ShardStream, ranks: int, workers: int) -> None:
    slots = [Slot(rank, ranks, worker, workers) for rank in range(ranks) for worker in range(workers)]
    parts = [keys(stream.epoch(0, slot)) for slot in slots]
    assert sorted(key for part in parts for key in part) == sorted(keys(stream.epoch(0, Slot())))
    assert all(parts)


def test_fewer_shards_than_readers_are_refused_with_the_numbers(stream: ShardStream) -> None:
    with pytest.raises(UserError, match="8 shards cannot feed 9 readers"):
        stream.check(9)


BROKEN = {
    "not an image": (sample("x", image=b"text, not pixels"), "member 'png' is not an image"),
    "cut image": (sample("x", image=png(64)[:60]), "member 'png' is not an image"),
    "not JSON": (sample("x", b"{nope"), "is not JSON"),
    "no messages": (sample("x", {"text": "hi"}), "has no 'messages'"),
    "messages of another form": (sample("x", {"messages": ["hi"]}), "not a list of"),
    "no answer": (sample("x", {"messages": GOOD["messages"][:1]}), "has no answer"),
    "no JSON": ([("x.png", png())], "has no .json member"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sample_names_itself_and_its_cause(tmp_path: Path, case: str) -> None:
    members, cause = BROKEN[case]
    write_tar(tmp_path / "a.tar", members)
    (raw,) = read_shard(str(tmp_path / "a.tar"))
    with pytest.raises(BrokenSample, match=f"sample 'x': .*{cause}"):
        decode(raw)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x", image=bomb()))
    (raw,) = read_shard(str(tmp_path / "a.tar"))
    with pytest.raises(BrokenSample, match=r"sample 'x': .*(50000x50000|bomb)"):
        decode(raw)


def info(kind: bytes, link: str = "") -> tarfile.TarInfo:
    """A member that is no file."""
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, link
    return member


def causes(shard: Path, *, among: dict[str, Any] | None = None) -> dict[str, str]:
    """What is wrong with each sample of a shard; "" with those that decode, which are put ``among`` others."""
    cause_of = {}
    for raw in read_shard(str(shard)):
        try:
            decoded = decode(raw)
        except BrokenSample as error:
            cause_of[error.key] = error.cause
        else:
            cause_of[raw["__key__"]] = ""
            (among if among is not None else {})[raw["__key__"]] = decoded
    return cause_of


def test_members_that_are_no_files_are_followed_or_break_their_sample(tmp_path: Path) -> None:
    """Without marks in its messages, a sample that lost its image would be trained as text alone."""
    said = json.dumps(GOOD).encode()
    wrong = {
        "sym": (info(tarfile.SYMTYPE, "a.png"), "'png' is a symbolic link.*tar --dereference"),
        "gone": (info(tarfile.LNKTYPE, "z.png"), "'png' is a hard link to a file that.*--hard-dereference"),
        "folder": (info(tarfile.DIRTYPE), "'png' is a folder"),
        "pipe": (info(tarfile.FIFOTYPE), "'png' is a device or a pipe"),
        "sparse": (info(tarfile.GNUTYPE_SPARSE), "'png' is a sparse file: write the shard with tar without --sparse"),
    }
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, (member, _) in {
            "a": (png(3), ""),
            "b": (info(tarfile.LNKTYPE, "a.png"), ""),
            "c": (info(tarfile.LNKTYPE, "b.png"), ""),
            **wrong,
        }.items():
            data = member if isinstance(member, bytes) else None
            header = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo()
            header.name, header.size = f"{key}.png", len(data or b"")
            tar.addfile(header, io.BytesIO(data) if data else None)
            header = tarfile.TarInfo(f"{key}.json")
            header.size = len(said)
            tar.addfile(header, io.BytesIO(said))
        folder = info(tarfile.DIRTYPE)
        folder.name = "of.png"  # of no sample: a folder that happens to be named so
        tar.addfile(folder)
    good: dict[str, Any] = {}
    cause_of = causes(tmp_path / "a.tar", among=good)
    assert list(cause_of) == ["a", "b", "c", *wrong]
    assert [good[key].images[0].size for key in "abc"] == [(3, 3)] * 3
    for key, (_, cause) in wrong.items():
        assert re.search(cause, cause_of[key]), cause_of[key]


MARKED = {"conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]}


def test_images_that_are_asked_for_are_there(tmp_path: Path) -> None:
    said, plain = json.dumps(MARKED).encode(), json.dumps(GOOD).encode()
    members = [
        ("head.json", said),  # its image is in the shard before
        *sample("whole", MARKED),
        ("lost.json", said),
        ("two.json", said), ("two.0.png", png()), ("two.1.png", png()),
        ("unread.json", plain), ("unread.bmp", png()),
        ("beside.json", plain), ("beside.png", png()), ("beside.mask.tiff", png()),
        ("other.json", said), ("other.npy", png()),
        ("upper.JSON", said), ("upper.PNG", png()),
        ("tail.png", png()),  # its JSON is in the shard behind
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    cause_of = causes(tmp_path / "a.tar")
    assert [key for key, cause in cause_of.items() if not cause] == ["whole", "beside", "upper"]
    more = "its messages ask for more images and videos than it has"
    edge = " (it stands at the edge of its shard: the rest may be in another one)"
    assert (cause_of["head"], cause_of["lost"]) == (more + edge, more)
    assert cause_of["two"] == "its messages ask for fewer images and videos than it has"
    assert cause_of["unread"].startswith("its 'bmp' is not read: images and videos are jpg, jpeg, png")
    assert cause_of["other"] == f"{more} (its member 'npy' is not read)"
    assert cause_of["tail"] == "has no .json member with its messages, and no .txt member with a caption" + edge


def test_members_that_do_not_stand_together_say_how_to_sort_them(tmp_path: Path) -> None:
    first, second = sample("a", MARKED), sample("b", MARKED)
    write_tar(tmp_path / "a.tar", [first[0], second[0], first[1], second[1]])
    *_, last = causes(tmp_path / "a.tar").values()
    assert last == "its key comes a second time in this shard (the members of a sample stand together: tar --sort=name)"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "compressed by gzip: decompress it with `gunzip`"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer: fetch the file itself"),
        (b"\n<!DOCTYPE html><html>" + b" " * 600, "an HTML page"),
        (b"", "empty"),
    ],
    ids=str,
)
def test_what_is_no_shard_says_what_it_is(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    (cause,) = causes(tmp_path / "a.tar").values()
    assert cause.startswith(f"is no tar file: it is {what}")


def test_names_and_texts_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, data in [
            ("\xe9.json", b'{"captions": ["a"]}'),
            ("\xe9.png", png()),
            ("t.png", png()),
            ("t.txt", b"\xe9"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert causes(tmp_path / "a.tar") == {"\\udce9": "", "t": "its .txt member is not UTF-8"}


def odd(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(["role", "content", "from", "value", "type", "text", "family", "jpg", "0.png", "__key__"])
    return st.lists(values, max_size=4) | st.dictionaries(keys, values, max_size=4)


LEAVES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2,
        10**400,
        math.nan,
        math.inf,
        "",
        "x",
        "\ud83d",
        "<image>",
        "user",
        "assistant",
        "gpt",
        "text",
    ]
)
VALUES = st.recursive(LEAVES, odd, max_leaves=12)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "video", None])}, optional={"text": LEAVES})
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", 3]),
        "content": LEAVES | st.lists(PARTS, max_size=3),
        "from": st.sampled_from(["human", "gpt", None]),
        "value": VALUES,
        "family": VALUES,
    },
)
FORMS = {key: st.lists(TURNS, max_size=3) | VALUES for key in ("messages", "conversations")}
FORMS |= dict.fromkeys(("captions", "caption", "frames", "fps", "clip", "crc32"), VALUES)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    st.fixed_dictionaries({}, optional=FORMS), st.sampled_from([(), ("png",), ("0.png", "1.png"), ("0.png", "1.mp4")])
)
def test_odd_json_is_a_broken_sample_or_a_sound_one(said: Any, members: tuple[str, ...]) -> None:
    raw = {"__key__": "k", "json": json.dumps(said).encode(), **dict.fromkeys(members, png())}
    try:
        sample = decode(raw)
    except BrokenSample as error:
        str(error).encode()  # it can be written to a log
        return
    for message in sample.messages:
        texts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        assert all(isinstance(part.get("text", ""), str) for part in texts)
        assert isinstance(message.get("family") or "", str)
    json.dumps(sample.messages, ensure_ascii=False).encode()


def talk(*, content: Any = "red", role: Any = "assistant", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "what?"}, {"role": role, "content": content, **more}]}


CAPTION = {"captions": ["a"]}
ODD: dict[str, tuple[Any, str]] = {
    "half a character": (talk(content="\ud83d"), "has half a character in its text"),
    "half of one in a caption": ({"captions": ["\ud83d"]}, "has half a character in its text"),
    "half of one in a label": (talk(family="\ud83d"), "has half a character in its text"),
    "half of one in a role": (talk(role="\ud83d"), "has half a character in its text"),
    "a role that is none": (talk(role=5), "its 'messages' are not a list of"),
    "a label that is none": (talk(level=["easy"]), "has a turn whose 'level' is no text"),
    "a number for a text": (talk(content=[{"type": "text", "text": 5}]), "its 'messages' are not a list of"),
    "a part that is none": (talk(content=["red"]), "its 'messages' are not a list of"),
    "a part of another type": (talk(content=[{"type": "sound"}]), "its 'messages' are not a list of"),
    "no content": (talk(content=None), "its 'messages' are not a list of"),
    "blanks": (talk(content=[{"type": "text", "text": " "}]), "its conversation has no answer"),
    "blanks behind an answer": (
        {"messages": [*talk()["messages"], *talk(content=" \n")["messages"]]},
        "its conversation has no answer to one of its questions",
    ),
    "an empty turn before an answer": (
        {"messages": [{"role": "assistant", "content": ""}, *talk()["messages"]]},
        "its conversation has no answer to one of its questions",
    ),
    "a checksum of no member": (CAPTION | {"crc32": {"__key__": 1}}, "its member '__key__' is missing"),
    "a clip beyond numbers": (CAPTION | {"clip": [0, 10**400]}, "its 'clip' is no time"),
    "a rate beyond numbers": (CAPTION | {"frames": [1], "fps": 10**400}, "its 'fps' is no number"),
    "a rate that is none": (CAPTION | {"frames": [1], "fps": math.nan}, "its 'fps' is no number"),
    "truth for a number": (CAPTION | {"frames": [True]}, "its 'frames' are not a list"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_json_says_in_few_words_what_is_odd(case: str) -> None:
    said, cause = ODD[case]
    with pytest.raises(BrokenSample, match=f"sample 'k': {re.escape(cause)}"):
        decode({"__key__": "k", "json": json.dumps(said).encode(), "png": png()})


def test_a_conversation_may_end_with_a_question() -> None:
    """One that is open, behind at least one that was answered."""
    messages = [*talk()["messages"], {"role": "user", "content": "and this?"}]
    assert decode({"__key__": "k", "json": json.dumps({"messages": messages}).encode()}).messages == messages


def test_a_number_is_an_answer() -> None:
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": 0, "family": 3}]
    raw = {"__key__": "k", "json": json.dumps({"messages": None, "conversations": turns}).encode()}
    assert decode(raw).messages[1] == {"role": "assistant", "content": "0", "family": "3"}
    turns[1]["value"] = False
    assert (
        decode({"__key__": "k", "json": json.dumps({"conversations": turns}).encode()}).messages[1]["content"]
        == "false"
    )


def test_a_shard_cut_short_is_noticed(scenes: Path, tmp_path: Path) -> None:
    """At a member's boundary a tar reader sees nothing wrong: the index knows better."""
    folder = tmp_path / "cut"
    shutil.copytree(scenes / "train", folder)
    shard = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        boundary = tar.getmembers()[20].offset
    shard.write_bytes(shard.read_bytes()[:boundary] + bytes(1024))
    *_, last = read_shard(str(shard))
    with pytest.raises(BrokenSample, match="its index says 30"):
        decode(last)
    shard.write_bytes(shard.read_bytes()[: boundary - 700])
    *_, last = read_shard(str(shard))
    with pytest.raises(BrokenSample, match="cannot be read after"):
        decode(last)


@pytest.fixture
def data(build, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Builds a data module over shards that a test writes."""

    def make(*, workers: int = 0, **settings: Any) -> ImageTextData:
        model = build(LaViFusion(generator=small()))
        return ImageTextData(
            model.processor, **({"train": str(tmp_path), "workers": workers, "batch_size": 2} | settings)
        )

    return make


def test_broken_samples_are_counted_and_the_good_ones_kept(tmp_path: Path, data) -> None:
    members = [m for i in range(300) for m in sample(f"{i:03d}", image=b"broken" if i % 100 == 7 else None)]
    write_tar(tmp_path / "a.tar", members)
    reads = list(data().stream("train").read())
    assert sum(len(read.batch) for read in reads) == 297
    skipped = [skip for read in reads for skip in read.skipped]
    assert [skip.key for skip in skipped] == ["007", "107", "207"]
    assert all("is not an image" in skip.cause for skip in skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_samples_stop_the_run_with_the_cause(tmp_path: Path, data, workers: int) -> None:
    members = [m for i in range(50) for m in sample(f"{i:03d}", image=b"broken" if i % 10 == 3 else None)]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError) as caught:
        list(data(workers=workers).train_dataloader())
    message = str(caught.value)
    assert re.match(r"\d of \d+ samples are broken, more than data.max_skipped=0.01 allows", message)
    assert re.search(r"sample '0\d3': its member 'png' is not an image", message)
    assert "\n" not in message


def test_empty_and_missing_folders_say_what_to_do(tmp_path: Path, data) -> None:
    with pytest.raises(UserError, match=r"has no .tar file: pack your data with `python -m datamodules.pack`"):
        data().stream("train")
    with pytest.raises(UserError, match=r"no shards at .*gone.tar: make the built-in data"):
        find_shards(str(tmp_path / "gone.tar"))
    (tmp_path / "a.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UserError, match=r"none of the 1 samples|cannot be read"):
        list(data().stream("train"))
    with pytest.raises(UserError, match="the recipe names no validation data"):
        data().stream("validation")


def read_batches(module: ImageTextData, count: int) -> list[list[str]]:
    """Keys of the next batches, noted as read the way a trainer notes it."""

    class Training:
        training, global_rank, world_size, accumulate_grad_batches = True, 0, 1, 1

    module.trainer = Training()  # type: ignore[assignment]
    keys_of_batches = []
    loader = iter(module.train_dataloader())
    for _ in range(count):
        batch = module.on_after_batch_transfer(next(loader), 0)
        keys_of_batches.append(batch.keys)
    return keys_of_batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bucket", [1, 7])
def test_a_resumed_stream_goes_on_where_it_stopped(build, scenes: Path, workers: int, bucket: int) -> None:
    """Also behind the end of an epoch (60 batches), in the middle of a bucket, and with readers taking turns."""
    processor = build(LaViFusion(generator=small())).processor

    def fresh() -> ImageTextData:
        settings = {"batch_size": 4, "workers": workers, "shuffle": 25, "seed": 3, "bucket": bucket}
        return ImageTextData(processor, train=str(scenes / "train"), **settings)

    whole = read_batches(fresh(), 75)
    for stop, more in ((33, 42), (65, 10)) if workers else ((1, 74), (2, 20), (33, 42), (65, 10)):
        first, second = fresh(), fresh()
        assert read_batches(first, stop) == whole[:stop]
        second.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_int_keys))
        assert read_batches(second, more) == whole[stop : stop + more]


def test_buckets_pad_less_and_lose_nothing(build, scenes: Path) -> None:
    processor = build(ConcatFusion()).processor
    data = {
        bucket: ImageTextData(processor, train=str(scenes / "train"), batch_size=8, bucket=bucket) for bucket in (1, 10)
    }
    batches = {
        bucket: [read.batch for read in itertools.islice(d.train_dataloader(), 30)] for bucket, d in data.items()
    }
    assert sorted(key for b in batches[1] for key in b.keys) == sorted(key for b in batches[10] for key in b.keys)

    def lengths(batch: Batch) -> list[int]:
        visual = Counter(dict.fromkeys(range(len(batch)), 0))
        for slot in batch.image_slots:
            visual[slot.row] += processor.count_visual_tokens(slot.layout)
        return [stop - start + visual[row] for row, (start, stop) in enumerate(batch.spans)]

    padded = {k: sum(max(lengths(b)) * len(b) - sum(lengths(b)) for b in of_bucket) for k, of_bucket in batches.items()}
    assert padded[10] < padded[1] / 3
    longest = [max(lengths(batch)) for batch in batches[10]]
    assert longest != sorted(longest)  # not the short ones first


def _int_keys(state: dict[str, Any]) -> dict[Any, Any]:
    return {int(k) if k.isdigit() else k: v for k, v in state.items()}


def test_another_number_of_readers_is_refused(build, scenes: Path) -> None:
    processor = build(LaViFusion(generator=small())).processor
    state = ImageTextData(processor, train=str(scenes / "train"), workers=2).state_dict()
    with pytest.raises(UserError, match=r"data.workers=2, not 0.*Resume with data.workers=2"):
        ImageTextData(processor, train=str(scenes / "train")).load_state_dict(state)


def test_batches_hold_what_the_contract_says(build, scenes: Path) -> None:
    processor = build(LaViFusion(generator=small())).processor
    batch = next(iter(ImageTextData(processor, train=str(scenes / "train"), batch_size=16).stream("train")))
    rows, width = batch.input_ids.shape
    assert batch.labels.shape == batch.attention_mask.shape == (rows, width) == (16, width)
    assert len(batch.pixels) == sum(slot.views for slot in batch.image_slots)
    assert batch.attention_mask.sum(1).tolist() == [stop - start for start, stop in batch.spans]
    assert Counter(len(k) for k in batch.keys) == {12: 16}
    for answer in batch.answers:
        assert (
            batch.labels[answer.row, answer.start : answer.stop]
            == batch.input_ids[answer.row, answer.start : answer.stop]
        ).all()
    assert torch.is_floating_point(batch.pixels)

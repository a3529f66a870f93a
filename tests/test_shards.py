"""Shards: what is read, in which order, and what happens to broken ones."""

from __future__ import annotations

import io
import itertools
import json
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
from PIL import Image

from datamodules.conversation import decode
from datamodules.image_text import ImageTextData
from datamodules.shards import BrokenSample, ShardStream, Slot, read_shard
from datamodules.sources import find_shards
from lavi.batch import Batch
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion

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
    made = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


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
        model = build(LaViFusion(bottleneck=16))
        return ImageTextData(
            model.processor, **({"train": str(tmp_path), "workers": workers, "batch_size": 2} | settings)
        )

    return make


def test_broken_samples_are_counted_and_the_good_ones_kept(tmp_path: Path, data) -> None:
    members = [m for i in range(300) for m in sample(f"{i:03d}", image=b"broken" if i % 100 == 7 else None)]
    write_tar(tmp_path / "a.tar", members)
    batches = list(data().stream("train"))
    assert sum(len(batch) for batch in batches) == 297
    skipped = [entry for batch in batches for entry in batch.skipped]
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


def test_a_question_longer_than_the_context_names_the_sample(tmp_path: Path, data) -> None:
    long = {"messages": [{"role": "user", "content": "circle " * 400}, GOOD["messages"][1]]}
    write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"{i}", long)])
    with pytest.raises(UserError, match=r"sample '1': the conversation has \d+ text .* more than the context of 256"):
        list(data().stream("train"))


def read_batches(module: ImageTextData, count: int) -> list[list[str]]:
    """Keys of the next batches, noted as read the way a trainer notes it."""

    class Training:
        training, global_rank, world_size = True, 0, 1

    module.trainer = Training()  # type: ignore[assignment]
    found = []
    loader = iter(module.train_dataloader())
    for _ in range(count):
        batch = module.on_after_batch_transfer(next(loader), 0)
        found.append(batch.keys)
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 33, 65])
@pytest.mark.parametrize("bucket", [1, 7])
def test_a_resumed_stream_goes_on_where_it_stopped(build, scenes: Path, workers: int, stop: int, bucket: int) -> None:
    """Also behind the end of an epoch (60 batches), in the middle of a bucket, and with readers taking turns."""
    processor = build(LaViFusion(bottleneck=16)).processor

    def fresh() -> ImageTextData:
        settings = {"batch_size": 4, "workers": workers, "shuffle": 25, "seed": 3, "bucket": bucket}
        return ImageTextData(processor, train=str(scenes / "train"), **settings)

    whole = read_batches(fresh(), 75)
    first, second = fresh(), fresh()
    begun = read_batches(first, stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_int_keys))
    assert begun + read_batches(second, 75 - stop) == whole


def test_buckets_pad_less_and_lose_nothing(build, scenes: Path) -> None:
    processor = build(ConcatFusion()).processor
    data = {
        bucket: ImageTextData(processor, train=str(scenes / "train"), batch_size=8, bucket=bucket) for bucket in (1, 10)
    }
    batches = {bucket: list(itertools.islice(d.train_dataloader(), 30)) for bucket, d in data.items()}
    assert sorted(key for b in batches[1] for key in b.keys) == sorted(key for b in batches[10] for key in b.keys)

    def lengths(batch: Batch) -> list[int]:
        visual = Counter(dict.fromkeys(range(len(batch)), 0))
        for place in batch.places:
            visual[place.row] += processor.tokens_of(place.layout)
        return [stop - start + visual[row] for row, (start, stop) in enumerate(batch.spans)]

    padded = {k: sum(max(lengths(b)) * len(b) - sum(lengths(b)) for b in found) for k, found in batches.items()}
    assert padded[10] < padded[1] / 3
    longest = [max(lengths(batch)) for batch in batches[10]]
    assert longest != sorted(longest)  # not the short ones first


def _int_keys(found: dict[str, Any]) -> dict[Any, Any]:
    return {int(k) if k.isdigit() else k: v for k, v in found.items()}


def test_another_number_of_readers_is_refused(build, scenes: Path) -> None:
    processor = build(LaViFusion(bottleneck=16)).processor
    state = ImageTextData(processor, train=str(scenes / "train"), workers=2).state_dict()
    with pytest.raises(UserError, match=r"data.workers=2, not 0.*Resume with data.workers=2"):
        ImageTextData(processor, train=str(scenes / "train")).load_state_dict(state)


def test_batches_hold_what_the_contract_says(build, scenes: Path) -> None:
    processor = build(LaViFusion(bottleneck=16)).processor
    batch = next(iter(ImageTextData(processor, train=str(scenes / "train"), batch_size=16).stream("train")))
    rows, width = batch.input_ids.shape
    assert batch.labels.shape == batch.attention_mask.shape == (rows, width) == (16, width)
    assert len(batch.pixels) == sum(place.views for place in batch.places)
    assert batch.attention_mask.sum(1).tolist() == [stop - start for start, stop in batch.spans]
    assert Counter(len(k) for k in batch.keys) == {12: 16}
    for answer in batch.answers:
        assert (
            batch.labels[answer.row, answer.start : answer.stop]
            == batch.input_ids[answer.row, answer.start : answer.stop]
        ).all()
    assert torch.is_floating_point(batch.pixels)

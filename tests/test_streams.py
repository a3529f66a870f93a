"""Streams of batches: mixtures, going on, ranks in step, forms of a conversation, broken input."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import re
import signal
import sys
import tarfile
import zlib
from collections import Counter
from functools import partial
from operator import length_hint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import start_process
from test_shards import GOOD, bomb, png, read_batches, sample, write_tar

from datamodules.batches import EvalStream, InOrder
from datamodules.encoder import Encoder, Skipped, without_last_turn
from datamodules.formats.conversations import Conversations, messages_of
from datamodules.image_text import ImageTextData
from datamodules.mixture import MixedStream, Mixture
from datamodules.shards import read
from datamodules.shards.read import BrokenSample, ShardStream, Slot, StreamPosition, read_shard
from datamodules.shards.sources import find_shards
from lavi import fit
from lavi.batch import IGNORE, Batch, Sample, Video
from lavi.checkpoints.keep_run import KeepRun
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion

ROOT = Path(__file__).parent.parent
decode = Conversations().decode


@pytest.fixture
def processor(build) -> Processor:  # type: ignore[no-untyped-def]
    return build(LaViFusion(generator=small())).processor


def said(key: str, count: int, folder: Path, *, per_shard: int = 10, name: str = "data") -> str:
    """A folder of text-only conversations with an index, ``per_shard`` in a shard."""
    target = folder / name
    target.mkdir(parents=True)
    counts = {}
    for number, start in enumerate(range(0, count, per_shard)):
        inside = range(start, min(start + per_shard, count))
        members = [(f"{key}{i:05d}.json", json.dumps(GOOD).encode()) for i in inside]
        write_tar(target / f"shard-{number:06d}.tar", members)
        counts[f"shard-{number:06d}.tar"] = len(inside)
    (target / "index.json").write_text(json.dumps({"samples": count, "shards": counts}))
    return str(target)


# --- going on ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shuffle=st.integers(0, 30), seed=st.integers(0, 5), stop=st.integers(0, 150), resampled=st.booleans())
def test_every_place_of_a_stream_is_one_to_go_on_from(
    tmp_path_factory: pytest.TempPathFactory, shuffle: int, seed: int, stop: int, resampled: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "positions"
    source = said("k", 47, folder.parent, name=folder.name) if not folder.exists() else str(folder)
    stream = ShardStream(find_shards(source), seed, shuffle, resampled)
    slot = Slot(0, 1, 1, 2)

    def some(position: StreamPosition, count: int) -> list[tuple[StreamPosition, str]]:
        records = ((position, raw["__key__"]) for position, raw in stream.records(slot, position) if raw is not None)
        return [next(records) for _ in range(count)]

    whole = some(StreamPosition(), 160)
    position = whole[stop - 1][0] if stop else StreamPosition()
    assert some(position, 160 - stop) == whole[stop:]


def test_going_on_opens_one_shard_however_far_the_epoch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ShardStream(find_shards(said("k", 400, tmp_path)), seed=0, shuffle=10)
    records = stream.records(Slot(), StreamPosition())
    middle = [next(records)[0] for _ in range(355)][-1]
    opened: list[str] = []
    really = read.open_shard
    monkeypatch.setattr(read, "open_shard", lambda shard: opened.append(shard) or really(shard))  # type: ignore[func-returns-value]
    next(stream.records(Slot(), middle))
    assert len(opened) <= 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bucket", [1, 5])
def test_a_mixture_goes_on_where_it_stopped(processor: Processor, scenes: Path, workers: int, bucket: int) -> None:
    """At random batches, behind the ends of the small sources' epochs, and through a second resume."""
    sources = {"train": str(scenes / "train"), "few": str(scenes / "validation"), "test": str(scenes / "test")}

    def fresh() -> ImageTextData:
        mixture = Mixture(sources=sources, weights={"train": 2, "few": 1, "test": 1})
        return ImageTextData(processor, train=mixture, batch_size=3, workers=workers, shuffle=15, bucket=bucket)

    whole = read_batches(fresh(), 90)
    rng = random.Random(workers * 10 + bucket)
    stops = sorted(rng.sample(range(1, 89), 2))
    read: list[list[str]] = []
    state: dict[str, Any] | None = None
    for stop in [*stops, 90]:
        data = fresh()
        if state is not None:
            data.load_state_dict(state)
        read += read_batches(data, stop - len(read))
        state = pickle.loads(pickle.dumps(data.state_dict()))
    assert read == whole


def test_an_epoch_by_count_goes_on_in_the_next_one(processor: Processor, scenes: Path) -> None:
    """``trainer.limit_train_batches`` asks the same loader again: it must not begin anew."""
    for workers in (0, 2):
        data = ImageTextData(processor, train=str(scenes / "train"), batch_size=4, workers=workers, shuffle=20)
        once = read_batches(
            ImageTextData(processor, train=str(scenes / "train"), batch_size=4, workers=workers, shuffle=20), 24
        )

        class Training:
            training, global_rank, world_size, accumulate_grad_batches = True, 0, 1, 1

        data.trainer = Training()  # type: ignore[assignment]
        loader = data.train_dataloader()
        read = []
        for _ in range(3):
            batches = iter(loader)
            read += [data.on_after_batch_transfer(next(batches), 0).keys for _ in range(8)]
        assert read == once


def test_another_order_is_refused(processor: Processor, scenes: Path) -> None:
    def data(**changes: Any) -> ImageTextData:
        return ImageTextData(processor, train=str(scenes / "train"), **changes)

    state = data().state_dict()
    changes = {"workers": 2, "batch_size": 5, "shuffle": 7, "packing": 100, "seed": 1, "bucket": 3, "resampled": True}
    for name, value in changes.items():
        with pytest.raises(UserError, match=rf"read with data.{name}=.*Resume with data.{name}="):
            data(**{name: value}).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.train is not what the run was reading"):
        ImageTextData(processor, train=str(scenes / "validation")).load_state_dict(state)
    with pytest.raises(UserError, match="an older lavi wrote it"):
        data().load_state_dict({"read": {}, "turn": 0})


def test_a_broken_sample_near_an_epochs_end_does_not_stop_a_resumed_run(processor: Processor, tmp_path: Path) -> None:
    """Nor one of a small source in a mixture: a share is held over what was seen, as far as chance allows."""
    source = Path(said("k", 400, tmp_path))
    members = [(f"k{i:05d}.json", b"{" if i == 395 else json.dumps(GOOD).encode()) for i in range(390, 400)]
    write_tar(source / "shard-000039.tar", members)
    first, second = (ImageTextData(processor, train=str(source), batch_size=4, shuffle=0) for _ in range(2))
    read_batches(first, 97)
    second.load_state_dict(first.state_dict())
    assert len(read_batches(second, 10)) == 10


def test_a_shard_that_was_taken_away_is_missed(tmp_path: Path) -> None:
    source = Path(said("k", 30, tmp_path))
    (source / "shard-000001.tar").unlink()
    stream = ShardStream(find_shards(str(source)), shuffle=0)
    lost = [one for one in stream.epoch(0, Slot()) if "__broken__" in one]
    assert [one["__lost__"] for one in lost] == [10]
    assert stream.samples == 30


def test_shards_that_cannot_be_read_are_told_before_a_block_is_full(tmp_path: Path) -> None:
    source = Path(said("k", 50, tmp_path))
    for file in source.glob("*.tar"):
        file.unlink()
    records = ShardStream(find_shards(str(source)), shuffle=1000).records(Slot(), StreamPosition())
    position, one = next(records)
    assert one is not None
    assert (position.shard, one["__lost__"]) == (0, 10)


def train_and_note(step: int, notes: Path, arguments: list[str]) -> None:
    """Train, note what is met in each step, and die behind one."""
    end = KeepRun.on_train_batch_end

    def and_note(
        self: KeepRun, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        with notes.open("a") as file:
            file.write(f"{trainer.global_step} {' '.join(batch.keys)} {loss!r}\n")
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        end(self, trainer, module, outputs, batch, index)

    KeepRun.on_train_batch_end = and_note  # type: ignore[method-assign]
    sys.argv = ["lavi.fit", *arguments, "--save-every", "4"]
    fit.main()


LONG = [pytest.param(workers, 100, 8, "spawn", marks=pytest.mark.slow) for workers in (0, 2)]


@pytest.mark.parametrize(("workers", "steps", "kills", "method"), [(0, 24, 1, "spawn"), (2, 24, 2, "fork"), *LONG])
def test_a_killed_run_sees_the_same_samples_and_losses(
    tiny_recipe: Path, scenes: Path, tmp_path: Path, workers: int, steps: int, kills: int, method: str
) -> None:
    """SIGKILL between two checkpoints: the steps after the last of them are what one go has there, bit for bit.

    Args:
        method: how the last process starts; a new interpreter has other hashes than the one that made the first steps.
    """
    recipe = yaml.safe_load(tiny_recipe.read_text())
    sources = {"some": str(scenes / "train"), "few": str(scenes / "validation")}
    mixture = {"_target_": "datamodules.mixture.Mixture", "sources": sources, "temperature": 2.0}
    recipe["data"] |= {"train": mixture, "workers": workers, "bucket": 2}
    recipe["trainer"] |= {"max_steps": steps, "limit_val_batches": 0}
    tiny_recipe.write_text(yaml.safe_dump(recipe))

    def ends(step: int, notes: Path, *arguments: object, status: int = 0, start: str = "fork") -> None:
        train = partial(train_and_note, step, notes, [str(argument) for argument in arguments])
        started = start_process(train, notes.with_suffix(".said"), method=start)
        assert started.wait() == status, started.err

    ends(-1, tmp_path / "whole.txt", "--recipe", tiny_recipe, "--run", tmp_path / "whole")
    run, notes = tmp_path / "cut", tmp_path / "cut.txt"
    how: tuple[object, ...] = ("--recipe", tiny_recipe, "--run", run)
    for step in sorted(random.Random(workers).sample(range(5, steps), kills)):
        ends(step, notes, *how, status=-signal.SIGKILL)
        how = ("--resume", run)
    ends(-1, notes, *how, start=method)

    whole = (tmp_path / "whole.txt").read_text().splitlines()
    assert len(whole) == steps
    assert len({line.split(" ", 1)[1] for line in whole}) == steps
    # A step that was done twice, before the kill and after it, was the same step.
    assert set(notes.read_text().splitlines()) == set(whole)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_sources_come_in_their_shares(tmp_path: Path) -> None:
    streams = {
        name: ShardStream(find_shards(said(name, count, tmp_path, name=name)), seed=0, shuffle=5)
        for name, count in (("a", 90), ("b", 10))
    }
    by_size = Mixture(sources={"a": "", "b": ""})
    assert by_size.shares(streams) == pytest.approx([0.9, 0.1])
    assert Mixture(sources=by_size.sources, temperature=2.0).shares(streams) == pytest.approx([0.75, 0.25])
    shares = Mixture(sources=by_size.sources, weights={"a": 1, "b": 3}).shares(streams)
    assert shares == pytest.approx([0.25, 0.75])
    drawn = MixedStream(streams, shares).records(Slot())
    counts = Counter(one.source for one in (next(drawn) for _ in range(4000)) if one.raw is not None)
    assert counts["b"] / counts.total() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sources": {}}, "needs 'sources'"),
        ({"sources": {"captions": "x"}, "weights": {"caption": 1}}, "did you mean 'captions'"),
        ({"sources": {"a": "x"}, "weights": {"a": 0}}, "must be above 0"),
        ({"sources": {"a": "x"}, "temperature": -1.0}, "must be above 0"),
    ],
)
def test_mistakes_with_mixtures(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mixture(**settings)


def test_a_source_without_an_index_needs_weights(tmp_path: Path) -> None:
    folder = said("k", 20, tmp_path)
    (Path(folder) / "index.json").unlink()
    with pytest.raises(UserError, match="source 'a' has no index that counts its samples: set weights"):
        Mixture(sources={"a": folder}).shares({"a": ShardStream(find_shards(folder))})


def test_batches_say_which_source_each_sample_is_from(processor: Processor, tmp_path: Path) -> None:
    sources: dict[str, str | list[str]] = {name: said(name, 40, tmp_path, name=name) for name in ("left", "right")}
    data = ImageTextData(processor, train=Mixture(sources=sources), batch_size=8)
    batches = iter(data.train_dataloader())
    for _ in range(5):
        read = next(batches)
        assert [key.rstrip("0123456789") for key in read.batch.keys] == read.sources


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 47, 48, 49])
def test_held_out_samples_are_shared_without_loss_and_in_step(
    processor: Processor, tmp_path: Path, ranks: int, count: int
) -> None:
    """Also with a window whose every sample of one rank is broken, and fewer shards than ranks."""
    source = said("k", count, tmp_path, per_shard=30)
    shard = Path(source) / "shard-000000.tar"
    members = [(f"k{i:05d}.json", b"{nope" if 4 <= i < 8 else json.dumps(GOOD).encode()) for i in range(min(count, 30))]
    write_tar(shard, members)
    records = InOrder([ShardStream(find_shards(source))])
    held = [EvalStream(records, Encoder(processor, Conversations()), 4, 1.0, rank, ranks) for rank in range(ranks)]
    read = [list(one) for one in held]
    assert {len(batches) for batches in read} == {length_hint(one) for one in held}
    counted = [batch for batches in read for batch in batches if batch.answers]
    keys = [key for batch in counted for key in batch.keys]
    assert len(keys) == len(set(keys)) == count - len(range(4, min(8, count)))
    for batches in read:
        for batch in batches:
            assert batch.answers or bool((batch.labels == IGNORE).all())


# --- what a conversation may look like --------------------------------------------------------------------------------


def raw(said: Any, **members: bytes) -> dict[str, Any]:
    return {"__key__": "k", "json": json.dumps(said).encode()} | {k.replace("_", "."): v for k, v in members.items()}


def test_llavas_form_and_sharegpts_are_read() -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is <image> this?"}, {"from": "gpt", "value": "two"}]
    sample = decode({**raw({"conversations": turns}), "0.png": png(), "1.png": png()})
    assert sample.messages[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "what is "},
        {"type": "image"},
        {"type": "text", "text": " this?"},
    ]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    said = {"messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a"}]}
    assert decode(raw(said, png=png())).messages[0]["content"][0] == {"type": "image"}
    with pytest.raises(BrokenSample, match="from neither of human"):
        decode(raw({"conversations": [{"from": "parrot", "value": "hi"}]}))


def test_a_caption_answers_the_request_and_changes_with_the_epoch() -> None:
    captions = ["a", "b", "c"]
    seen = [
        decode(raw({"captions": captions}, png=png()) | {"__epoch__": epoch}).messages[1]["content"]
        for epoch in range(3)
    ]
    assert sorted(seen) == captions
    one = Conversations(caption_prompt="say").decode({"__key__": "k", "txt": b" a cat \n", "jpg": png()})
    assert one.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "say"}]
    assert one.messages[1]["content"] == "a cat"


def test_frames_that_were_extracted_are_a_video() -> None:
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    frames = {f"{i}.png": png() for i in range(12)}
    (video,) = decode(raw({"messages": messages, "fps": 2}) | frames).images
    assert isinstance(video, Video)
    assert len(video.frames) == 8
    assert video.seconds[0] < video.seconds[-1] < 6
    said = {"captions": ["a run", "a run"], "frames": [4, 8]}  # of two videos, and their members are images
    captioned = decode(raw(said) | frames)
    assert [part["type"] for part in captioned.messages[0]["content"]] == ["video", "video", "text"]
    assert [len(video.frames) for video in captioned.images] == [4, 8]  # type: ignore[union-attr]
    both = [{"role": "user", "content": [*content, {"type": "video"}]}, messages[1]]
    first, second = decode(raw({"messages": both, "frames": [4, 8]}) | frames).images
    assert isinstance(first, Video)
    assert (len(first.frames), len(second.frames)) == (4, 8)  # type: ignore[union-attr]


WRONG = {
    "a caption that is none": ({"captions": [3]}, "captions are not texts"),
    "empty captions": ({"captions": [" "]}, "its captions are empty"),
    "a list": ([], "has no 'messages'"),
    "parts without a type": ({"messages": [{"role": "user", "content": [{}]}]}, "not a list of"),
    "frames of another number": ({"captions": ["a"], "frames": [3]}, "speak of 3 images, and it has 1"),
    "frames that are none": ({"captions": ["a"], "frames": "3"}, "are not a list"),
    "no rate": ({"captions": ["a"], "frames": [1], "fps": 0}, "must be above 0"),
    "a clip of one": ({"captions": ["a"], "clip": [3]}, "must be \\[start, end\\]"),
    "a caption of nothing": ({"captions": ["a"], "crc32": {}}, "no image or video that it describes"),
    "a member gone": ({"captions": ["a"], "crc32": {"0.png": 1}}, "its member '0.png' is missing"),
    "deep": ('{"messages": ' + "[" * 20_000, "is not JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_conversation_says_why(case: str) -> None:
    said, cause = WRONG[case]
    member = said.encode() if isinstance(said, str) else json.dumps(said).encode()
    with pytest.raises(BrokenSample, match=f"sample 'k': .*{cause}") as error:
        decode({"__key__": "k", "json": member} | ({} if "of nothing" in case else {"jpg": png()}))
    assert error.value.lost == 1
    assert not error.value.cause.endswith(".")  # other words follow it


def test_conversations_are_checked_without_decoding_anything() -> None:
    messages = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a"}]
    assert Conversations().check(raw({"messages": messages}, jpg=b"not opened"))["messages"] == messages
    for members, more in (({}, "more"), ({"0_jpg": b"", "1_jpg": b""}, "fewer")):
        with pytest.raises(BrokenSample, match=f"ask for {more} images and videos than it has$"):
            Conversations().check(raw({"messages": messages}, **members))
    with pytest.raises(BrokenSample, match="has no answer"):
        Conversations().check(raw({"conversations": [{"from": "human", "value": "what?"}]}))


def test_what_the_reader_lost_is_counted_as_the_reader_says() -> None:
    for said, lost in (({}, 1), ({"__lost__": 0}, 0), ({"__lost__": 3}, 3)):
        with pytest.raises(BrokenSample, match="sample 'k': is cut short") as error:
            decode({"__key__": "k", "__broken__": "is cut short"} | said)
        assert error.value.lost == lost


def test_too_long_a_conversation_loses_whole_turns_and_their_images() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}] * 3
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    shorter = without_last_turn(Sample("k", messages, images))
    assert shorter is not None
    assert len(shorter.messages) == 4
    assert [image.getpixel((0, 0)) for image in shorter.images] == [(255, 0, 0), (0, 128, 0)]  # type: ignore[union-attr]
    shortest = without_last_turn(shorter)
    assert shortest is not None
    assert without_last_turn(shortest) is None


def test_cutting_keeps_what_fits(processor: Processor, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "circle " * 30}, {"role": "assistant", "content": "red"}] * 20
    write_tar(tmp_path / "a.tar", sample("long", {"messages": turns}) + sample("short"))
    kept = ImageTextData(processor, train=str(tmp_path), too_long="cut", max_skipped=1.0)
    (batch,) = kept.stream("train")
    assert batch.keys == ["long", "short"]
    row = [answer for answer in batch.answers if answer.row == 0]
    assert 1 <= len(row) < 20
    assert batch.spans[0][1] <= processor.context_length
    left = ImageTextData(processor, train=str(tmp_path), max_skipped=1.0)
    (batch,) = left.stream("train")
    assert batch.keys == ["short"]


# --- broken input -----------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def checked(image: bytes, *, key: str, kind: str = "png", stored: bytes | None = None) -> list[tuple[str, bytes]]:
    """A sample with the checksum of its image, and of that image what was ``stored``."""
    content = GOOD | {"crc32": {kind: zlib.crc32(image)}}
    return [(f"{key}.json", json.dumps(content).encode()), (f"{key}.{kind}", image if stored is None else stored)]


def test_ten_thousand_samples_of_which_one_in_a_hundred_is_broken(tmp_path: Path) -> None:
    """Exactly the 9,900 others come, and each broken one is counted by its cause with its key."""
    image, huge = png(), bomb()
    trap = tmp_path / "sprung"
    content = json.dumps(GOOD).encode()
    broken: dict[int, tuple[list[tuple[str, bytes]], str]] = {}

    def breaks(number: int, key: str) -> tuple[list[tuple[str, bytes]], str]:
        kinds = [
            (checked(image, key=key, stored=flipped(image)), "was altered"),
            (checked(b"text, no pixels", key=key), "is not an image"),
            (checked(b"no video at all", key=key, kind="mp4"), "video"),
            (checked(huge, key=key), "bomb|50000x50000"),
            ([(f"{key}.json", b"{nope"), (f"{key}.png", image)], "is not JSON"),
            ([(f"../../{key}.json", content), (f"../../{key}.png", image)], "leads out of the shard"),
            ([(f"{key}.png", image)], "has no .json member"),
            ([(f"{key}.pkl", pickle.dumps(Trap(trap))), (f"{key}.pyd", pickle.dumps(Trap(trap)))], "has no .json"),
        ]
        return kinds[number % len(kinds)]

    folder = tmp_path / "data"
    folder.mkdir()
    counts = {}
    for shard in range(10):
        members: list[tuple[str, bytes]] = []
        for inside in range(1000):
            number = shard * 1000 + inside
            key = f"प्रश्न-質問-ü-{number}" if number % 3 else f"{number}"
            if shard < 9 and number % 91 == 5:
                broken[number] = breaks(len(broken), key)
                members += broken[number][0]
            else:
                members += checked(image, key=key)
        name = f"shard-{shard:06d}.tar"
        write_tar(folder / name, members)
        counts[name] = 1000
    # Of the last shard as many are cut off as are missing to a hundred, in the middle of a member.
    lost = 100 - len(broken)
    assert lost > 0
    with tarfile.open(folder / name) as tar:
        first_lost = tar.getmembers()[2 * (1000 - lost)]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: first_lost.offset_data + 10])
    (folder / "index.json").write_text(json.dumps({"samples": 10_000, "shards": counts}))

    skipped = Skipped(0.01)
    good = []
    for shard_file in find_shards(str(folder)):
        for one in read_shard(shard_file):
            try:
                good.append(decode(one).key)
            except BrokenSample as error:
                skipped.add(error.key, error.cause, lost=error.lost)
            else:
                skipped.used += 1
    skipped.check()  # one in a hundred is allowed
    assert len(good) == len(set(good)) == 9900
    assert skipped.broken == 100
    causes = {skip.key: skip.cause for skip in skipped.fresh}
    for members, cause in broken.values():
        key = members[0][0].rsplit(".", 1)[0]
        assert re.search(cause, causes[key]), (key, causes[key], cause)
    assert skipped.fresh[-1].samples == lost
    assert not trap.exists()


def test_a_key_that_comes_twice_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("x") + sample("x") + sample("y") + sample("x"))
    raws = list(read_shard(str(tmp_path / "a.tar")))
    assert [(raw["__key__"], "__broken__" in raw) for raw in raws] == [
        ("x", False),
        ("x", True),
        ("y", False),
        ("x", True),
    ]


def damaged_in_the_middle(file: Path, at: slice, by: bytes) -> str:
    """Ten samples, and other bytes somewhere in the header of the sixth; the file."""
    write_tar(file, [member for i in range(10) for member in sample(f"k{i}")])
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[10].offset
    data = bytearray(file.read_bytes())
    data[offset + at.start : offset + at.stop] = by
    file.write_bytes(data)
    return str(file)


def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    """Python's tar reader, and all that is built on it, takes it for the end of the file."""
    file = damaged_in_the_middle(tmp_path / "a.tar", slice(3, 4), b"\xff")
    with tarfile.open(file) as tar:
        assert len(tar.getmembers()) == 10  # half of them, and no error
    *good, last = read_shard(file)
    assert len(good) == 4  # the fifth has stood there, but not been read to its end
    assert "no tar header where one must stand" in last["__broken__"]


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("fuzz") / "a.tar"
    long = "n" * 150  # a name that needs an extended header
    members = sample("a") + sample(long) + [("b.txt", b"a caption"), ("b.png", png())]
    write_tar(file, members)
    return file.read_bytes().rstrip(b"\0") + bytes(1024)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_crash_the_reader(small_tar: bytes, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(small_tar)
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(damaged) // 512)) * 512
    piece = bytes(damaged[start : start + 512 * data.draw(st.integers(0, 4))])
    cut = data.draw(st.integers(0, len(damaged)))
    file = tmp_path / "fuzz.tar"
    file.write_bytes(bytes(damaged[:cut]) + piece * data.draw(st.integers(0, 3)) + bytes(damaged[cut:]))
    causes = set()
    for one in read_shard(str(file)):
        try:
            decode(one)
        except BrokenSample as error:
            causes.add(str(error))
    assert not any("\n" in cause for cause in causes)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=3000))
def test_noise_is_no_shard(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "noise.tar"
    file.write_bytes(data)
    assert all("__broken__" in one for one in read_shard(str(file)))


def test_zeros_in_the_place_of_a_header_are_no_end(tmp_path: Path) -> None:
    """What a torn write leaves, and what every tar reader takes for the end mark."""
    *_, last = read_shard(damaged_in_the_middle(tmp_path / "a.tar", slice(0, 512), bytes(512)))
    assert "zeros where a header must stand" in last["__broken__"]


def test_lost_and_found_add_up(tmp_path: Path) -> None:
    """Wherever a shard is cut."""
    source = Path(said("k", 20, tmp_path, per_shard=20))
    file = source / "shard-000000.tar"
    whole = file.read_bytes()
    for cut in range(0, len(whole), 700):
        file.write_bytes(whole[:cut])
        read = list(read_shard(str(file)))
        good = sum("__broken__" not in one for one in read)
        assert good + sum(one.get("__lost__", 0) for one in read) in (20, 21 if good == 20 else 20)


def test_headers_that_lead_back_do_not_hang(tmp_path: Path) -> None:
    """A negative size sends a tar reader back to where it was, for ever."""
    before, info = tarfile.TarInfo("a.json"), tarfile.TarInfo("b.json")  # led to the file's first byte, readers stop
    info.pax_headers = {"size": "-1536"}  # from behind its own headers to the first of them
    file = tmp_path / "a.tar"
    file.write_bytes(before.tobuf(tarfile.PAX_FORMAT) + info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    (broken,) = read_shard(str(file))
    assert "leads back" in broken["__broken__"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME])
def test_memory_is_not_asked_for_what_a_header_claims(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.json")
    info.size, info.type = 2**60, kind
    file = tmp_path / "a.tar"
    file.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"short")
    (last,) = read_shard(str(file))
    assert "__broken__" in last


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("system", "system"),
    ],
)
def test_sharegpt_spells_who_speaks_in_several_ways(name: str, role: str) -> None:
    (message,) = messages_of([{"from": name, "value": "words"}])
    assert message == {"role": role, "content": "words"}


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "workers"), [pytest.param("spawn", 2, marks=pytest.mark.slow), ("forkserver", 1)])
def test_readers_give_the_same_batches_however_they_start(build, scenes: Path, method: str, workers: int) -> None:  # type: ignore[no-untyped-def]
    """One epoch of a mixture: as forked."""
    processor = build(ConcatFusion(), family="llama").processor
    sources: dict[str, str | list[str]] = {"train": str(scenes / "validation"), "test": str(scenes / "test")}
    read = []
    for way in ("fork", method):
        settings: dict[str, Any] = {"batch_size": 8, "workers": workers, "shuffle": 20, "bucket": 2}
        loader = ImageTextData(processor, train=Mixture(sources=sources), **settings).train_dataloader()
        loader.multiprocessing_context = way
        read.append(list(itertools.islice(loader, 12)))  # 96 samples
    forked, started = ([(one.batch.keys, one.sources, one.position) for one in of_way] for of_way in read)
    assert started == forked
    assert len({key for of_batch, _, _ in forked for key in of_batch}) > 80
    assert torch.equal(read[1][0].batch.input_ids, read[0][0].batch.input_ids)
    assert torch.equal(read[1][0].batch.pixels, read[0][0].batch.pixels)


def test_an_epoch_is_told_in_steps_of_the_optimizer(processor, scenes: Path, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    data = ImageTextData(processor, train=str(scenes / "train"), batch_size=10)
    data.trainer = SimpleNamespace(accumulate_grad_batches=4, global_rank=0, world_size=1)  # type: ignore[assignment]
    with caplog.at_level("INFO", "lavi"):
        data.train_dataloader()
    assert "240 samples in 8 shards" in caplog.text
    assert "an epoch is 6 steps" in caplog.text

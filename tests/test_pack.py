"""The packer: every kind of source, what is refused and skipped, and runs that are killed at any moment."""

from __future__ import annotations

import errno
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules import pack
from datamodules.formats.conversations import Conversations
from datamodules.formats.json_lists import read_json
from datamodules.formats.tables import chosen_columns, item_of_row, read_table
from datamodules.shards import write
from datamodules.shards.processes import TOGETHER, in_order
from datamodules.shards.read import read_shard
from datamodules.shards.sources import find_shards
from datamodules.shards.write import ShardJob, Written, lock_folder, shard_jobs, write_shards
from lavi.errors import UserError

decode = Conversations().decode

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def run(run):  # type: ignore[no-untyped-def]
    """Runs ``python -m datamodules.pack ARGUMENTS`` in a folder of the test's own: (status, out, err)."""
    return partial(run, "datamodules.pack")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """``0.png`` to ``4.png``, n + 1 pixels wide, and a frame folder with ``f2`` and ``f10``."""
    folder = tmp_path / "images"
    (folder / "clip").mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(number + 1))
    for number in (10, 2):
        (folder / "clip" / f"f{number}.png").write_bytes(png(number))
    (folder / "v.mp4").write_bytes(b"a video, unread")
    return folder


def png(width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 3)).save(stream, "PNG")
    return stream.getvalue()


def width(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).width


def turns(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def raw_of(folder: str | Path = "out") -> list[dict[str, Any]]:
    return [raw for shard in find_shards(str(Path(folder).absolute())) for raw in read_shard(shard)]


def said(raw: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(raw["json"])
    return record


def members(raw: dict[str, Any]) -> set[str]:
    return {name for name in raw if not name.startswith("_")}


# --- bytes and processes ----------------------------------------------------------------------------------------------


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=130)
    | st.text("ab./", min_size=95, max_size=105),
    st.integers(0, 8**12),
)
def test_headers_are_those_that_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert write.header(name, size) == info.tobuf(tarfile.PAX_FORMAT)


def halved(number: int) -> int:
    if number < 0:
        raise UserError(f"{number} is below 0.")
    if number == DEADLY:
        os._exit(1)
    return number // 2


DEADLY = 1 << 40


@pytest.mark.parametrize("workers", [1, 3])
def test_work_among_processes_keeps_its_order_and_takes_little_at_a_time(workers: int) -> None:
    taken = iter(range(10**6))
    results = in_order(halved, taken, workers=workers)
    assert list(itertools.islice(results, 5000)) == [number // 2 for number in range(5000)]
    assert next(taken) <= 5000 + 2 * (workers + 1) * TOGETHER
    results.close()


def test_what_stops_work_among_processes_is_a_sentence() -> None:
    for last, sentence in ((-1, "-1 is below 0"), (DEADLY, "one of 2 processes was killed")):
        with pytest.raises(UserError, match=sentence):
            list(in_order(halved, [*range(2000), last], workers=2))


# --- runs that are killed ---------------------------------------------------------------------------------------------

JOBS = shard_jobs(24, 4)
MADE_BY = {"test": 1}


def slow(job: ShardJob) -> Iterator[dict[str, Any]]:
    for number in range(job.start, job.stop):
        time.sleep(0.02)
        yield {"__key__": f"{number:03d}", "json": {"captions": [f"number {number}"]}, "png": png(number + 1)}


def dies_once(job: ShardJob) -> Iterator[dict[str, Any]]:
    """The process that writes the third shard dies, as if it had been killed for its memory."""
    if job.index == 2:
        time.sleep(0.3)
        os._exit(1)
    yield from slow(job)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert str(write_shards(folder, JOBS, slow, made_by=MADE_BY, workers=1)) == "24 samples in 6 shards"
    return content(folder)


def killed(target: Callable[[], object], when: Callable[[], bool]) -> None:
    """Run ``target`` in a process, and kill that when it is time, if it has not killed itself."""
    process = FORK.Process(target=target)
    process.start()
    while process.is_alive() and not when():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def busy(number: int, *, folder: Path) -> None:
    (folder / str(number)).touch()
    time.sleep(0.01)


def test_no_process_outlives_the_one_that_it_works_for(tmp_path: Path) -> None:
    alive, held_open = os.pipe()  # at its end when the last process that has the other end is gone
    killed(
        lambda: list(in_order(partial(busy, folder=tmp_path), range(4 * TOGETHER), workers=2)),
        lambda: len(list(tmp_path.iterdir())) > 9,
    )
    os.close(held_open)
    gone = multiprocessing.connection.wait([alive], timeout=10)
    os.close(alive)
    assert gone


def records(folder: Path) -> int:
    return len(list(folder.with_name(f"{folder.name}.part").glob("shard-*.json")))


MOMENTS = {
    "the lock": lambda out: out.with_name("out.lock").exists(),
    "the plan": lambda out: (out.with_name("out.part") / write.PLAN).exists(),
    "in the first shard": lambda out: (out.with_name("out.part") / "shard-000000.tar.part").exists(),
    "one record": lambda out: records(out) >= 1,
    "four records": lambda out: records(out) >= 4,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_and_leaves_the_same_bytes(tmp_path: Path, whole: dict[str, bytes], moment: str) -> None:
    out = tmp_path / "out"
    killed(lambda: write_shards(out, JOBS, slow, made_by=MADE_BY), lambda: MOMENTS[moment](out))
    assert not out.exists()
    written = write_shards(out, JOBS, slow, made_by=MADE_BY)
    assert written.resumed >= {"one record": 1, "four records": 4}.get(moment, 0)
    assert content(out) == whole
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["unlink", "rename"])
def test_a_run_killed_when_all_is_written_needs_no_shard_again(
    tmp_path: Path, whole: dict[str, bytes], call: str
) -> None:
    out = tmp_path / "out"

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def target() -> None:
        setattr(Path, call, die)
        write_shards(out, JOBS, slow, made_by=MADE_BY)

    killed(target, lambda: False)
    assert write_shards(out, JOBS, dies_once, made_by=MADE_BY) == Written(24, 6, resumed=6)
    assert content(out) == whole


def test_a_dead_process_is_a_sentence_and_the_finished_shards_are_kept(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"was killed \(is the memory enough for 2 workers\?\)"):
        write_shards(out, JOBS, dies_once, made_by=MADE_BY)
    assert 1 <= records(out) < 6
    assert "in all" not in capsys.readouterr().out
    assert write_shards(out, JOBS, slow, made_by=MADE_BY).resumed >= 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("writing shards: sample 24 of 24")
    assert said.endswith("in all")
    assert content(out) == whole


def test_a_half_written_shard_is_not_taken_for_a_finished_one(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    killed(lambda: write_shards(out, JOBS, slow, made_by=MADE_BY), lambda: records(out) >= 2)
    shard = next(out.with_name("out.part").glob("shard-*.json")).with_suffix(".tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    write_shards(out, JOBS, slow, made_by=MADE_BY)
    assert content(out) == whole


def test_another_plan_is_refused_and_what_is_there_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(lambda: write_shards(out, JOBS, slow, made_by=MADE_BY), lambda: records(out) >= 1)
    with pytest.raises(UserError, match=r"out.part holds unfinished shards of other data .* remove .*out.part"):
        write_shards(out, JOBS, slow, made_by={"test": 2})
    assert records(out) >= 1
    write_shards(out, JOBS, slow, made_by=MADE_BY)
    before = content(out)
    assert write_shards(out, JOBS, slow, made_by=MADE_BY) == Written(24, 6, resumed=6, complete=True)
    with pytest.raises(UserError, match="out exists and is left as it is"):
        write_shards(out, shard_jobs(24, 5), slow, made_by=MADE_BY)
    assert content(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match=r"holds thesis.tex: remove it first"):
        write_shards(tmp_path / "out", JOBS, slow, made_by=MADE_BY)
    assert (part / "thesis.tex").exists()


def test_two_writers_of_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    ready, done = FORK.Event(), FORK.Event()

    def hold() -> None:
        with lock_folder(out):
            ready.set()
            done.wait(30)

    other = FORK.Process(target=hold)
    other.start()
    assert ready.wait(30)
    monkeypatch.setattr(write, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=r"another process is writing .*out at this moment"):
        write_shards(out, JOBS, slow, made_by=MADE_BY)
    assert not list(tmp_path.glob("out.part"))
    done.set()
    other.join()
    assert write_shards(out, JOBS[:1], slow, made_by=MADE_BY).samples == 4


def test_shards_are_cut_by_number_and_by_size() -> None:
    assert [(job.start, job.stop) for job in shard_jobs(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    sizes = [8000, 9000, 50000, 1000, 1000, 1000]
    cut = [(job.start, job.stop) for job in shard_jobs(6, sizes=sizes, max_bytes=20480)]
    assert cut == [(0, 2), (2, 3), (3, 6)]
    # 19968 bytes of samples and the end mark would make a tar of three records, 30720 bytes.
    assert len(shard_jobs(2, sizes=[10240, 9728], max_bytes=20480)) == 2
    assert [job.stop for job in shard_jobs(6, 2, sizes=sizes, max_bytes=20480)] == [2, 3, 5, 6]


def test_a_shard_is_no_larger_than_asked(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    entries = [
        {"id": "ä" * (i % 3), "image": f"{i % 5}.png", "conversations": turns("<image>\n" + "why? " * i)}
        for i in range(60)
    ]
    Path("d.json").write_text(json.dumps(entries))
    assert run("--json", "d.json", "--images", images, "--out", "out", "--shard-size", "30KiB")[0] == 0
    sizes = [Path(shard).stat().st_size for shard in find_shards("out")]
    assert max(sizes) <= 30 * 1024
    assert len(sizes) > 2
    assert len(raw_of()) == 60


def test_a_killed_pack_goes_on_with_the_same_command(run, images: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    entries = [{"image": f"{i % 5}.png", "conversations": turns("<image>\nwhy?", str(i))} for i in range(20)]
    Path("d.jsonl").write_text("\n".join(map(json.dumps, entries)))
    command = ("--json", "d.jsonl", "--images", images, "--per-shard", 4, "--out")
    make = pack.make_samples

    def slowly(job: ShardJob, **settings: Any) -> Iterator[dict[str, Any]]:
        for sample in make(job, **settings):
            time.sleep(0.02)
            yield sample

    def target() -> None:
        pack.make_samples = slowly
        run(*command, "out")

    killed(target, lambda: records(tmp_path / "out") >= 1)
    status, out, _ = run(*command, "out")
    assert status == 0
    assert "finished by an earlier run" in out
    assert run(*command, "other")[0] == 0
    assert content(Path("out")) == content(Path("other"))
    assert "there already, left as it is" in run(*command, "out")[1]
    assert {file.name for file in tmp_path.iterdir()} == {"images", "d.jsonl", "out", "other"}


# --- sources ----------------------------------------------------------------------------------------------------------


def test_checksums_sizes_and_statistics_are_those_of_the_bytes(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    import hashlib
    import zlib

    entries = [{"image": f"{i}.png", "conversations": turns("<image>\nwhy?", "x" * 100)} for i in range(5)]
    Path("d.json").write_text(json.dumps(entries))
    run("--json", "d.json", "--images", images, "--out", "out", "--per-shard", 2)
    for raw in raw_of():
        assert said(raw)["crc32"] == {"png": zlib.crc32(raw["png"])}
    index = json.loads(Path("out/index.json").read_text())
    assert (index["version"], index["samples"]) == (2, 5)
    for name, entry in index["shards"].items():
        data = Path("out", name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    statistics = index["statistics"]
    assert (statistics["images"], statistics["conversations"], statistics["turns"]) == (5, 5, 10)
    assert statistics["widths"] == {"min": 1, "median": 3, "max": 5}
    assert statistics["text"] == {"<128": 5}
    assert statistics["sizes"] == {"png": sum(len(png(i + 1)) for i in range(5))}


def test_conversations_with_images_videos_and_frames(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    entries = [
        {"id": "两张/图.", "image": ["1.png"], "video": "v.mp4", "clip": [1, 2.5],
         "conversations": turns("<video>\nor <image>?")},
        {"id": "same", "video": "v.mp4", "conversations": turns("<image>\nwhat happens?")},
        {"id": "same", "video": "clip/", "fps": 2, "conversations": turns("<video>what happens?")},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "image"}]},
                      {"role": "assistant", "content": "fine", "family": "f"}], "images": ["2.png"]},
        {"image": "", "conversations": [{"from": "bard", "value": "hi"}, {"from": "user", "value": "hello"}]},
    ]  # fmt: skip
    Path("d.json").write_text("﻿" + json.dumps(entries))
    status, _, err = run("--json", "d.json", "--images", images, "--videos", images, "--out", "out")
    assert status == 0, err
    both, marked, frames, parts, plain = raw_of()
    assert members(both) == {"json", "0.mp4", "1.png"}
    assert both["0.mp4"] == b"a video, unread"
    assert said(both)["clip"] == [1, 2.5]
    assert both["__key__"] == "00000000-两张_图_"
    assert members(marked) == {"json", "mp4"}
    assert said(marked)["messages"][0]["content"][0] == {"type": "video"}
    assert [width(frames["0.png"]), width(frames["1.png"])] == [2, 10]  # f2 before f10
    assert (said(frames)["frames"], said(frames)["fps"]) == ([2], 2)
    assert marked["__key__"] != frames["__key__"]
    sample = decode(parts)
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[2]["family"] == "f"
    assert [image.size for image in sample.images] == [(3, 3)]
    assert [message["role"] for message in decode(plain).messages] == ["assistant", "user"]


def test_coco_captions_come_together(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    listed = [{"id": 7, "file_name": "0.png"}, {"id": 3, "file_name": "1.png"}, {"id": 9, "file_name": "2.png"}]
    notes = [{"id": i, "image_id": n, "caption": f"c{i}"} for i, n in enumerate([3, 7, 3, 5])]
    Path("c.json").write_text(json.dumps({"images": listed, "annotations": notes}))
    command = ("--coco", "c.json", "--images", images, "--out", "out")
    refused(run(*command), "2 of 4 entries", "describes an image that is not listed", "entry '9' has no captions")
    assert run(*command, "--max-skipped", 0.5)[0] == 0
    one, two = raw_of()
    assert (said(one)["captions"], width(one["png"])) == (["c1"], 1)
    assert (said(two)["captions"], width(two["png"])) == (["c0", "c2"], 2)
    skipped = json.loads(Path("out/index.json").read_text())["skipped"]
    assert {(entry["samples"], tuple(entry["ids"])) for entry in skipped} == {(1, ("3",)), (1, ("9",))}
    assert any("not listed" in entry["cause"] for entry in skipped)
    Path("c.json").write_text(json.dumps({"images": listed, "annotations": [{"image_id": 3, "bbox": []}]}))
    refused(run("--coco", "c.json", "--images", images, "--out", "new"), "annotations without 'caption'")


def test_tables_by_their_columns_names_or_as_said(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    Path("d.csv").write_text('id,Image,question,answer\na,0.png,"what, then?","a ""dot"""\nb,,hello,hi\n')
    assert run("--csv", "d.csv", "--images", images, "--out", "out")[0] == 0
    one, two = (decode(raw) for raw in raw_of())
    assert one.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what, then?"}]
    assert one.messages[1]["content"] == 'a "dot"'
    assert len(two.images) == 0
    Path("d.tsv").write_text("path\tfile\twords\n1.png\tv.mp4\t" + "long " * 40000 + "\n")
    columns = ("--columns", "file=path,caption=words")
    assert run("--csv", "d.tsv", *columns, "--images", images, "--out", "tsv")[0] == 0
    (raw,) = raw_of("tsv")
    assert width(raw["png"]) == 2
    assert len(said(raw)["captions"][0]) == 200000
    refused(run("--csv", "d.tsv", "--columns", "answr=words", "--out", "new"), "did you mean 'answer'?")
    refused(run("--csv", "d.tsv", "--columns", "caption=word", "--out", "new"), "did you mean 'words'?")
    refused(run("--csv", "d.tsv", "--out", "new"), "question and answer, or caption, are needed")
    Path("d.csv").write_text("image,caption\n0.png,a\n0.png\n")
    refused(run("--csv", "d.csv", "--images", images, "--out", "new"), "1 of 2", "row 2 has 1 cells, the header 2")


def test_datasets_saved_to_disk_and_parquet(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    talk = [[{"role": "user", "content": f"<image>{i}?"}, {"role": "assistant", "content": "yes"}] for i in range(3)]
    files = [str(images / f"{i}.png") for i in range(3)]
    columns = {"picture": files, "messages": talk, "unused": [1, 2, 3]}
    data = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    data.save_to_disk("disk")
    assert run("--dataset", "disk", "--out", "out", "--per-shard", 2)[0] == 0
    samples = [decode(raw) for raw in raw_of()]
    assert [sample.images[0].width for sample in samples] == [1, 2, 3]
    assert [sample.messages[0]["content"][1]["text"] for sample in samples] == ["0?", "1?", "2?"]
    assert [raw["png"] for raw in raw_of()] == [Path(file).read_bytes() for file in files]  # not encoded anew
    pairs = {"image": [{"bytes": png(9), "path": None}, {"bytes": None, "path": "1.png"}], "prompt": ["a?", "b?"]}
    Path("parquet").mkdir()
    datasets.Dataset.from_dict(pairs | {"answer": ["A", "B"]}).to_parquet("parquet/x.parquet")
    status, _, err = run("--dataset", "parquet", "--images", images, "--out", "pairs")
    assert status == 0, err
    assert [sample.images[0].width for sample in map(decode, raw_of("pairs"))] == [9, 2]
    datasets.DatasetDict({"train": data}).save_to_disk("splits")
    refused(run("--dataset", "splits", "--out", "new"), "has the splits train", "splits/train")
    Path("empty").mkdir()
    refused(run("--dataset", "empty", "--out", "new"), "neither written by save_to_disk nor a folder of parquet")
    Path("parquet/x.parquet").write_bytes(b"PAR1 no more")
    refused(run("--dataset", "parquet", "--out", "new"), "neither written by save_to_disk")


ONE_SPLIT: dict[str, str] = {  # parquet files, and the split that they are
    "a.parquet b.parquet": "",
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet": "train",
    "test/0000.parquet": "test",
    "en/part.parquet fr/part.parquet": "",
}
SPLITS: dict[str, str] = {
    "data/train-00000-of-00001.parquet data/test-00000-of-00001.parquet": "train, test",
    "data/train_sft-00000-of-00001.parquet data/test_sft-00000-of-00001.parquet": "test_sft, train_sft",
    "train/data-00000-of-00001.parquet test/data-00000-of-00001.parquet": "test/data, train/data",
    "train/0000.parquet test/0000.parquet": "train, test",
    "default/train/0000.parquet default/dev/0000.parquet": "train, validation",
    "train.parquet val.parquet": "train, validation",
    "Train.parquet TEST.PARQUET": "train, test",
    "train2017.parquet eval2017.parquet": "train, test",
    "data/train.parquet data/extra.parquet": "train and files that name none",
}


def parquet_folder(folder: str, names: str) -> None:
    """Parquet files that each ask for their own name."""
    datasets = pytest.importorskip("datasets")
    for name in names.split():
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"question": ["which?"], "answer": [name]}).to_parquet(file)


def answers(folder: str = "out") -> list[str]:
    return [said(raw)["messages"][1]["content"] for raw in raw_of(folder)]


@pytest.mark.parametrize("names", SPLITS)
def test_splits_are_never_packed_as_one_set(run, names: str) -> None:  # type: ignore[no-untyped-def]
    parquet_folder("hub", names)
    first = SPLITS[names].split(",")[0].split()[0]
    refused(run("--dataset", "hub", "--out", "out"), f"hub has the splits {SPLITS[names]}: give", f"--split={first}")
    assert not Path("out").exists()
    assert run("--dataset", "hub", "--split", first, "--out", "out")[0] == 0
    (only,) = answers()
    assert first.split("/")[0] in only.lower()
    refused(run("--dataset", "hub", "--split", "tran", "--out", "new"), "has no such split")


@pytest.mark.parametrize("names", ONE_SPLIT)
def test_a_folder_of_one_split_is_one_set(run, names: str) -> None:  # type: ignore[no-untyped-def]
    parquet_folder("hub", names)
    Path("hub/test-notes").mkdir()  # of no parquet file
    Path("hub/test-notes/x.txt").touch()
    assert run("--dataset", "hub", "--out", "out")[0] == 0
    assert answers() == names.split()
    if ONE_SPLIT[names]:
        assert run("--dataset", "hub", "--split", ONE_SPLIT[names], "--out", "same")[0] == 0
    else:
        refused(run("--dataset", "hub", "--split", "train", "--out", "same"), "name no splits, leave it out")


def test_splits_that_a_card_declares(run) -> None:  # type: ignore[no-untyped-def]
    parquet_folder("hub", "a.parquet b.parquet")
    files = "data_files: [{split: train, path: a.parquet}, {split: held_out, path: b.parquet}]"
    Path("hub/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}\n---\n")
    refused(run("--dataset", "hub", "--out", "out"), "hub has the splits train, held_out")
    assert run("--dataset", "hub", "--split", "held_out", "--out", "out")[0] == 0
    assert answers() == ["b.parquet"]
    both = "- {config_name: en, data_files: a.parquet}\n- {config_name: fr, data_files: b.parquet}"
    Path("hub/README.md").write_text(f"---\nconfigs:\n{both}\n---\n")
    refused(run("--dataset", "hub", "--out", "new"), "hub has the splits en/train, fr/train")


def test_splits_of_save_to_disk(run) -> None:  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    sets = {name: datasets.Dataset.from_dict({"question": ["?"], "answer": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(sets).save_to_disk("disk")
    refused(run("--dataset", "disk", "--out", "out"), "has the splits train, test", "disk/train")
    assert run("--dataset", "disk", "--split", "test", "--out", "out")[0] == 0
    assert answers() == ["test"]
    refused(run("--dataset", "disk/test", "--split", "train", "--out", "new"), "one set without splits")
    refused(run("--csv", "d.csv", "--split", "train", "--out", "new"), "--split=train is of a --dataset")


NAN = float("nan")
CELLS: dict[str, tuple[list[Any], list[Any]]] = {  # answers, and as what they are trained, or what is said of them
    "numbers": ([0, 7], ["0", "7"]),
    "fractions": ([0.0, NAN], ["0.0", "has no answer"]),
    "truth values": ([False, True], ["False", "True"]),
    "blanks": (["", " "], ["has no answer"] * 2),
    "nothing": ([None, "0"], ["has no answer", "0"]),
    "lists": ([["a", "b"], []], ["has an answer that is a list, and no text"] * 2),
    "mappings": ([{"a": 1}, {"a": 2}], ["has an answer that is a mapping, and no text"] * 2),
    "bytes": ([b"a", b"b"], ["has an answer that is a number of bytes, and no text"] * 2),
}


@pytest.mark.parametrize("case", CELLS)
def test_an_answer_is_its_text_or_a_bad_entry(run, case: str) -> None:  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    given, wanted = CELLS[case]
    columns = {"id": [0, 1], "question": [0, 1], "answer": given}
    Path("pq").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet("pq/a.parquet")
    texts = [text for text in wanted if not text.startswith("has ")]
    status, out, err = run("--dataset", "pq", "--out", "out", "--max-skipped", 0.5)
    if not texts:
        assert status == 2
        assert all(f"entry '{number}' {text}" in err for number, text in enumerate(wanted)), err
        return
    assert answers() == texts
    assert all(f": {text} ({number})" in out for number, text in enumerate(wanted) if text.startswith("has ")), out
    assert said(raw_of()[0])["messages"][0]["content"] in ("0", "1")  # the question, a number too


def test_a_row_may_be_called_0() -> None:
    row = item_of_row({"id": 0, "question": "?", "answer": "x"}, name="7")
    assert isinstance(row, dict)
    assert row["id"] == "0"


def test_cells_of_a_table_are_texts_as_they_stand(run) -> None:  # type: ignore[no-untyped-def]
    Path("d.csv").write_text("id,question,answer\n0,a,0\n,b,False\n5,c, \n6,,x\n")
    status, out, _ = run("--csv", "d.csv", "--out", "out", "--max-skipped", 0.5)
    assert status == 0
    assert answers() == ["0", "False"]
    assert [raw["__key__"][9:] for raw in raw_of()] == ["0", "2"]  # a row without an id is named by its number
    assert "has no answer (5)" in out
    assert "has no question (6)" in out
    Path("d.csv").write_text("question,answer,answer\na,b,c\n")
    refused(run("--csv", "d.csv", "--out", "new"), "d.csv has two columns 'answer'")


def test_tables_hold_conversations_of_any_length(tmp_path: Path) -> None:
    table = tmp_path / "d.csv"
    table.write_text(f"question,answer\nwhat?,{'long ' * 40_000}\n")
    ((item),) = read_table(table, {}).items
    assert isinstance(item, dict)
    assert len(item["conversations"][1]["value"]) == 200_000


def test_an_image_column_is_found_by_its_kind_unless_one_is_named(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    datasets = pytest.importorskip("datasets")
    kinds = [[str(images / f"{shift + i}.png") for i in range(2)] for shift in (0, 2)]
    data = datasets.Dataset.from_dict({"mask": kinds[0], "photo": kinds[1], "caption": ["a", "b"]})
    for column in ("mask", "photo"):
        data = data.cast_column(column, datasets.Image())
    data.save_to_disk("disk")
    for options, widths in (((), [1, 2]), (("--columns", "image=photo"), [3, 4])):
        assert run("--dataset", "disk", "--out", f"out{len(options)}", *options)[0] == 0
        assert [decode(raw).images[0].width for raw in raw_of(f"out{len(options)}")] == widths  # type: ignore[union-attr]
    data.rename_column("photo", "Images").save_to_disk("named")
    assert run("--dataset", "named", "--out", "named-out")[0] == 0
    assert [decode(raw).images[0].width for raw in raw_of("named-out")] == [3, 4]  # type: ignore[union-attr]


def test_values_and_captions_of_json_are_texts(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    values: list[Any] = [0, False, 1.5]
    entries: list[Any] = [{"conversations": turns("?", value)} for value in values]
    entries += [{"image": None, "images": ["0.png"], "captions": [0, None, "b"]}]
    Path("d.json").write_text(json.dumps(entries))
    status, _, err = run("--json", "d.json", "--images", images, "--out", "out")
    assert status == 0, err
    *conversations, captioned = map(said, raw_of())
    assert [one["messages"][1]["content"] for one in conversations] == ["0", "false", "1.5"]
    assert captioned["captions"] == ["0", "b"]


def test_a_missing_extra_is_a_sentence(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(run("--dataset", tmp_path, "--out", "new"), "pip install 'lavi[datasets]'")


# --- what cannot be packed --------------------------------------------------------------------------------------------

ODD: dict[str, tuple[Any, str]] = {
    "outside": ({"image": "../secret.png"}, "'../secret.png' leads out of the folder"),
    "absolute": ({"image": "/etc/passwd.png"}, "leads out of the folder"),
    "inside and out": ({"image": "clip/../../secret.png"}, "leads out of the folder"),
    "gone": ({"image": "gone.png"}, "there is no image"),
    "no name": ({"image": "a\0b.png"}, "there is no image"),
    "too long a name": ({"image": "a" * 5000 + ".png"}, "there is no image"),
    "another type": ({"image": "v.mp4"}, "image 'v.mp4' is none of jpg"),
    "a folder": ({"image": "clip"}, "is empty, or no file"),
    "no string": ({"image": [3]}, "no file names"),
    "two for one": ({"image": ["0.png", "1.png"]}, "names 2 images, and has 1 <image> marks"),
    "none for one": ({}, "names 0 images, and has 1 <image> marks"),
    "no answer": ({"image": "0.png", "conversations": turns("<image>")[:1]}, "has no answer"),
    "empty answer": ({"image": "0.png", "conversations": turns("<image>", "")}, "has no answer"),
    "one empty answer of two": (
        {"image": "0.png", "conversations": [*turns("<image>"), *turns("?", " ")]},
        "entry 'n' has no answer to one of its questions (a turn from 'gpt' is empty",
    ),
    "an empty answer before one": (
        {"image": "0.png", "conversations": [*turns("<image>", ""), *turns("?")]},
        "has no answer to one of its questions",
    ),
    "an empty answer in parts": (
        {"conversations": [*turns("?"), {"from": "gpt", "content": [{"type": "text", "text": "\n"}]}]},
        "has no answer to one of its questions",
    ),
    "a role": ({"conversations": [{"from": "robot", "value": "x"}]}, "from neither of human"),
    "a turn": ({"conversations": [3]}, "without 'value'"),
    "a part": ({"messages": [{"role": "user", "content": [3]}], "conversations": None}, "has no 'conversations'"),
    "a clip": ({"image": "0.png", "clip": [2, 1]}, "is not [start, end]"),
    "no object": ("text", "has no 'conversations'"),
    "half a character": ({"image": "0.png", "conversations": turns("<image>", "\ud83d")}, "has half a character"),
    "a name of half a one": ({"id": "\ud83d", "image": "gone\ud83d.png"}, "there is no image"),
    "a list for a text": ({"image": "0.png", "conversations": turns("<image>", ["a"])}, "without 'value' (a text)"),  # type: ignore[arg-type]
    "blanks for an answer": ({"image": "0.png", "conversations": turns("<image>", " \n")}, "has no answer"),
    "a label": (
        {"image": "0.png", "conversations": [*turns("<image>"), {"from": "gpt", "value": "", "level": {}}]},
        "whose 'level' is no text",
    ),
    "captions that are lists": ({"image": "0.png", "captions": [["a"]]}, "has a caption that is no text"),
    "two names": ({"image": "0.png", "images": ["1.png"]}, "names other images under 'image' than under 'images'"),
    "an address": ({"image": "https://example.org/0.png"}, "is a URL: download it"),
    "a pointer": ({"image": "pointer.png"}, "pointer.png is a Git LFS pointer"),
    "a page": ({"image": "page.png"}, "page.png is an HTML page"),
    "too long a name of a video": ({"video": "a" * 5000 + ".mp4"}, "there is no video"),
    "a video": ({"image": "video.png"}, "video.png is an mp4 or mov video"),
    "an image": ({"video": "image.mp4"}, "image.mp4 is a PNG image"),
    "a clip without end": ({"video": "v.mp4", "clip": [0, 1e400]}, "is not [start, end]"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_entry_is_named_and_nothing_is_written(run, images: Path, tmp_path: Path, case: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "secret.png").write_bytes(png(1))
    (images / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (images / "page.png").write_text("<!DOCTYPE html><html>" + "x" * 5000)
    (images / "video.png").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    (images / "image.mp4").write_bytes(png(2))
    change, cause = ODD[case]
    good = {"id": "n", "conversations": turns("<image>\nwhat?")}
    Path("d.json").write_text(json.dumps([good | change if isinstance(change, dict) else change]))
    before = set(tmp_path.iterdir())
    command = ("--json", "d.json", "--images", images, "--videos", images, "--out", "out")
    refused(run(*command), "1 of 1 entries of d.json", "entry", cause)
    assert set(tmp_path.iterdir()) == before


def test_skipped_entries_are_counted_by_cause_and_the_rest_is_packed(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    entries: list[Any] = [{"id": i, "image": f"{i}.png", "conversations": turns("<image>\n?")} for i in range(9)]
    lines = [json.dumps(entry) for entry in entries] + ['{"cut": ']
    Path("d.jsonl").write_text("\n".join(lines))
    command = ("--json", "d.jsonl", "--images", images, "--out", "out")
    refused(run(*command), "5 of 10", "entry '5'", "entry '6'", "entry '7'", "and 2 more")
    refused(run(*command, "--max-skipped", 0.4), "5 of 10")
    status, out, _ = run(*command, "--max-skipped", 0.5)
    assert status == 0
    assert "skipped 4 of 10: names images that are not there (5, 6, 7 ...)" in out
    assert len(raw_of()) == 5
    skipped = json.loads(Path("out/index.json").read_text())["skipped"]
    assert [(entry["samples"], entry["ids"]) for entry in skipped] == [(1, ["of line 10"]), (4, ["5", "6", "7", "8"])]


def test_absolute_names_that_lead_into_the_folder(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    Path("link").symlink_to(images)
    entries = [
        {"image": str(images / "0.png"), "conversations": turns("<image>?")},
        {"image": str(Path("link/1.png").absolute()), "conversations": turns("<image>?")},
        {"video": str(images / "clip"), "conversations": turns("<video>?")},
    ]
    Path("d.json").write_text(json.dumps(entries[:1] + entries[2:]))
    status, _, err = run("--json", "d.json", "--images", images, "--videos", images, "--out", "out")
    assert status == 0, err
    one, clip = raw_of()
    assert (width(one["png"]), width(clip["0.png"])) == (1, 2)
    Path("d.json").write_text(json.dumps(entries[:2]))  # by the folder's name and by what it links to
    status, _, err = run("--json", "d.json", "--images", "link", "--out", "linked")
    assert status == 0, err
    assert [width(raw["png"]) for raw in raw_of("linked")] == [1, 2]
    entries[0]["image"] = str(images / "../secret.png")
    Path("d.json").write_text(json.dumps(entries[:1]))
    refused(run("--json", "d.json", "--images", images, "--out", "new"), "leads out of the folder")


@pytest.mark.parametrize("kind", ["json", "coco", "csv"])
def test_a_source_that_is_something_else_says_what(run, kind: str) -> None:  # type: ignore[no-untyped-def]
    for data, what in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(20), "is compressed by gzip"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"", "is empty"),
    ]:
        Path("data").write_bytes(data)
        refused(run(f"--{kind}", "data", "--out", "out"), f"data {what}")


def test_one_object_over_many_lines_is_no_list_of_conversations(run) -> None:  # type: ignore[no-untyped-def]
    Path("d.json").write_text(json.dumps({"train": []}, indent=1))
    refused(run("--json", "d.json", "--out", "out"), "d.json is one JSON object")


def test_a_parquet_file_that_was_not_fetched(run) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("datasets")
    Path("pq").mkdir()
    Path("pq/a.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(run("--dataset", "pq", "--out", "out"), "pq/a.parquet is a Git LFS pointer")


def full(job: ShardJob) -> Iterator[dict[str, Any]]:
    yield from numbered(job)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_a_sentence_and_the_next_run_goes_on(run, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        UserError, match=r"out\.part cannot be written \(No space left on device\): the finished shards"
    ):
        write_shards(tmp_path / "out", shard_jobs(4, 2), full, made_by={}, workers=1)
    assert write_shards(tmp_path / "out", shard_jobs(4, 2), numbered, made_by={}, workers=1).samples == 4
    Path("d.json").write_text(json.dumps([{"conversations": turns("?")}]))
    monkeypatch.setattr(pack, "_check", lambda *given, **more: next(full(ShardJob(0, 0, 0))))
    refused(run("--json", "d.json", "--out", "new"), "new.entries", "No space left on device")
    assert not list(tmp_path.glob("new*"))


def numbered(job: ShardJob) -> Iterator[dict[str, Any]]:
    for number in range(job.start, job.stop):
        yield {"__key__": str(number), "json": {"messages": turns("?")}}


def test_the_home_is_found_without_a_shell(run, images: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("d.json").write_text(json.dumps([{"image": "0.png", "conversations": turns("<image>?")}]))
    assert run("--json=~/d.json", "--images=~/images", "--out=~/out")[0] == 0
    assert len(raw_of(tmp_path / "out")) == 1


def test_a_file_that_goes_after_the_check_is_a_sentence(run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    Path("d.json").write_text(json.dumps([{"image": "0.png", "conversations": turns("<image>?")}]))
    check = pack.check

    def and_lose(*given: Any, workers: int) -> pack.Checked:
        checked = check(*given, workers=workers)
        (images / "0.png").unlink()
        return checked

    monkeypatch.setattr(pack, "check", and_lose)
    refused(
        run("--json", "d.json", "--images", images, "--out", "out"), "0.png was there when the entries were checked"
    )
    assert not Path("out").exists()


def test_options_that_make_no_sense_are_refused(run, images: Path) -> None:  # type: ignore[no-untyped-def]
    Path("d.json").write_text(json.dumps([{"image": "0.png", "conversations": turns("<image>?")}]))
    command = ("--json", "d.json", "--out", "out")
    refused(run(*command), "say with --images")
    refused(run(*command, "--images", "gone"), "there is no folder gone")
    refused(run(*command, "--shard-size", "big"), "--shard-size=big is no size")
    refused(run(*command, "--per-shard", 0), "a whole number from 1, not '0'")
    refused(run(*command, "--per-shard", "two"), "a whole number from 1, not 'two'")
    refused(run(*command, "--workers", -1), "a whole number from 1, not '-1'")
    refused(run(*command, "--shard-size", 500), "--shard-size=500 is smaller than any shard")
    refused(run(*command, "--max-skipped", 3), "from 0 to 1")
    refused(run(*command, "--max-skipped", "nan"), "from 0 to 1")
    refused(run("--json", images, "--out", "out"), "cannot be read (Is a directory)")
    refused(run("--json", "d.json", "--images", "d.json", "--out", "out"), "there is no folder d.json")
    refused(run("--json", "d.json", "--images", images, "--out", "d.json"), "d.json exists and is left as it is")
    refused(run("--json", "d.json", "--images", images, "--out", "a" * 300), "nothing can be written at")
    refused(run(*command, "--columns", "image"), "is not of the form")
    assert run("--out", "out")[0] == 2
    assert run(*command, "--csv", "d.csv")[0] == 2
    Path("file").write_text("")
    refused(run("--json", "d.json", "--images", images, "--out", "file/out"), "nothing can be written at file/out")
    Path("d.json").write_text("[" * 100000)
    refused(run(*command), "d.json is not JSON")


@pytest.mark.parametrize(
    ("column", "meaning"),
    [
        ("id", "id"),
        ("Image", "image"),
        ("images", "image"),
        ("video", "video"),
        ("videos", "video"),
        ("file", "file"),
        ("file_name", "file"),
        ("prompt", "question"),
        ("caption", "caption"),
        ("captions", "caption"),
        ("text", "caption"),
        ("messages", "messages"),
        ("conversations", "messages"),
    ],
)
def test_tables_are_read_by_the_names_of_their_columns(column: str, meaning: str) -> None:
    rest = ["caption"] if meaning in ("question", "id", "image", "video", "file") else ["question", "answer"]
    rest = ["answer"] if meaning == "question" else rest
    assert chosen_columns([column, *rest], {}, "t")[meaning] == column


def test_tables_and_lists_that_are_none_are_named(tmp_path: Path) -> None:
    empty, one = tmp_path / "empty.csv", tmp_path / "one.json"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.csv"):
        read_table(empty, {})
    one.write_text(json.dumps({"a": 1}, indent=1))
    with pytest.raises(UserError, match="is one JSON object: a list of conversations is needed"):
        list(read_json(one).items)

"""Our shards and those of webdataset, our readers in its pipelines, and its pipelines as data of a recipe."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
import yaml
from conftest import ask, refused, small
from PIL import Image
from test_shards import GOOD, png

from datamodules.batches import ReadBatch
from datamodules.formats.conversations import Conversations
from datamodules.image_text import ImageTextData
from datamodules.shards.read import BrokenSample, ShardStream, Slot, check_intact, read_shard
from datamodules.shards.sources import find_shards
from datamodules.shards.write import shard_jobs, write_shards
from datamodules.webdataset_pipeline import PipelineData, ShardSource
from lavi.batch import Sample
from lavi.data.processor import Processor
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.answers import ExactMatch


@pytest.fixture
def processor(build) -> Processor:  # type: ignore[no-untyped-def]
    return build(LaViFusion(generator=small())).processor


def undecoded(folder: Path, split: str = "train", *, most: int | None = None) -> wds.DataPipeline:
    """A pipeline that hands on the bytes of shards."""
    pipeline = wds.WebDataset(find_shards(str(folder / split)), shardshuffle=False)
    return pipeline if most is None else pipeline.slice(most)


def decoded(folder: str) -> wds.DataPipeline:
    """A pipeline that decodes by itself."""
    to_sample = Conversations().decode
    return wds.WebDataset(find_shards(folder), shardshuffle=False).map(lambda item: to_sample(item))


def damaged(folder: Path) -> wds.DataPipeline:
    def damage(item: dict[str, Any]) -> dict[str, Any]:
        return item | {"json": b"{nope"} if item["__key__"].endswith("7") else item

    return undecoded(folder, "validation").map(damage)


# --- shards -----------------------------------------------------------------------------------------------------------


def numbered(job: Any) -> Any:
    for number in range(job.start, job.stop):
        yield {"__key__": f"ä{number}", "json": GOOD, "0.png": png(number + 1), "1.png": png(9)}


def test_shards_written_here_are_read_by_webdataset(tmp_path: Path) -> None:
    write_shards(tmp_path / "out", shard_jobs(5, 2), numbered, made_by={}, workers=1)
    items = list(wds.WebDataset(find_shards(str(tmp_path / "out")), shardshuffle=False).decode("pil"))
    assert [item["__key__"] for item in items] == [f"ä{number}" for number in range(5)]
    assert [item["0.png"].width for item in items] == [1, 2, 3, 4, 5]
    assert all(item["json"]["messages"] == GOOD["messages"] for item in items)


def test_shards_of_webdatasets_writer_are_read_here(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            image = Image.new("RGB", (number + 1, 3))
            writer.write({"__key__": f"k{number}", "json": GOOD, "png": image, "cls": number, "txt": "unread"})
    raws = list(read_shard(str(tmp_path / "a.tar")))
    samples = [Conversations().decode(raw) for raw in raws]
    assert [sample.key for sample in samples] == ["k0", "k1", "k2", "k3"]
    assert [sample.images[0].width for sample in samples] == [1, 2, 3, 4]  # type: ignore[union-attr]
    assert [raw["cls"] for raw in read_shard(str(tmp_path / "a.tar"), types=("cls",))] == [b"0", b"1", b"2", b"3"]


# --- our readers in pipelines -----------------------------------------------------------------------------------------


def test_our_reader_is_the_source_of_a_pipeline(scenes: Path, tmp_path: Path) -> None:
    stream = ShardStream(find_shards(str(scenes / "train")), seed=1, shuffle=30)
    batched = wds.batched(7, collation_fn=list, partial=True)
    pipeline = wds.DataPipeline(ShardSource(stream, epoch=2), wds.map(Conversations().decode), batched)
    keys = [sample.key for samples in pipeline for sample in samples]
    assert keys == [raw["__key__"] for raw in ShardSource(stream, epoch=2)]
    assert len(set(keys)) == 240
    assert next(iter(ShardSource(stream)))["__key__"] == next(stream.epoch(0, Slot()))["__key__"]
    shared = [raw["__key__"] for rank in range(3) for raw in ShardSource(stream, rank=rank, ranks=3)]
    assert sorted(shared) == sorted(keys)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(BrokenSample, match=r"is no tar file|cannot be read"):
        list(wds.DataPipeline(ShardSource(ShardStream([str(tmp_path / "a.tar")])), wds.map(check_intact)))


def test_our_readers_stand_behind_a_web_loader(processor: Processor, scenes: Path) -> None:
    """Raw samples, each once among two workers; and training batches."""
    stream = ShardStream(find_shards(str(scenes / "train")), seed=1, shuffle=30)
    loader = wds.WebLoader(ShardSource(stream), batch_size=None, num_workers=2).map(lambda raw: raw["__key__"])
    assert sorted(loader) == sorted(raw["__key__"] for raw in ShardSource(stream))
    data = ImageTextData(processor, train=str(scenes / "train"), batch_size=4)
    batches = wds.WebLoader(data.train_dataloader().dataset, batch_size=None).slice(3)
    expected = iter(data.train_dataloader())
    for read in batches:
        assert isinstance(read, ReadBatch)
        assert read.batch.keys == next(expected).batch.keys


# --- pipelines as data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_a_pipeline_become_batches(processor: Processor, scenes: Path, workers: int) -> None:
    data = PipelineData(processor, train=undecoded(scenes), batch_size=8, workers=workers)
    batches = iter(data.train_dataloader())
    reads = [next(batches) for _ in range(30)]
    keys = [key for read in reads for key in read.batch.keys]
    assert {source for read in reads for source in read.sources} == set(data.source_names)
    assert sorted(keys) == sorted(item["__key__"] for item in undecoded(scenes))
    again = [key for _ in range(30) for key in next(batches).batch.keys]
    assert sorted(again) == sorted(keys)


def test_a_pipelines_broken_samples_are_counted(processor: Processor, scenes: Path) -> None:
    data = PipelineData(processor, train=undecoded(scenes), test=damaged(scenes), max_skipped=0.5)
    samples = data.sample_stream("test")
    good = [sample.key for sample in samples]
    assert not any(key.endswith("7") for key in good)
    assert list(samples.left_out) == ["its .json member is not JSON"]
    assert samples.left_out.total() == 48 - len(good) > 2
    assert samples.expected is None
    strict = PipelineData(processor, train=damaged(scenes))
    with pytest.raises(UserError, match=r"samples are broken, more than data.max_skipped=0.01 allows"):
        list(strict.train_dataloader())
    empty = PipelineData(processor, train=[], test=[])
    with pytest.raises(UserError, match="none of the 0 samples that the pipeline gives can be used: there is none"):
        list(empty.stream("test"))
    with pytest.raises(UserError, match="a pass over the training pipeline gave no sample"):
        list(empty.train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_by_count_goes_on_in_the_pipeline(processor: Processor, workers: int) -> None:
    """Only what worker processes had read ahead is lost."""
    train = [ask("what?", answer="red", key=str(number)) for number in range(100)]
    loader = PipelineData(processor, train=train, batch_size=2, workers=workers).train_dataloader()
    epochs = [[int(key) for read in islice(loader, 3) for key in read.batch.keys] for _ in range(3)]
    ahead = 2 * (2 * workers)  # DataLoader's prefetch factor, in batches of two
    for before, behind in pairwise(epochs):
        assert before[-1] < behind[0] <= before[-1] + 1 + ahead


def test_a_pipeline_that_ends_for_good_is_refused(processor: Processor) -> None:
    once = iter([ask("what?", answer="red", key=str(number)) for number in range(4)])
    read = []
    with pytest.raises(UserError, match="can be iterated over once alone"):
        read.extend(PipelineData(processor, train=once, batch_size=2).train_dataloader())


def test_a_reader_without_a_shard_is_refused(scenes: Path) -> None:
    stream = ShardStream(find_shards(str(scenes / "train"))[:1])
    with pytest.raises(UserError, match="1 shards cannot feed 2 readers"):
        iter(ShardSource(stream, ranks=2))


def test_samples_of_a_pipeline_are_used_by_the_usual_rules(processor: Processor, scenes: Path) -> None:
    turns = ask("circle " * 60, answer="red").messages * 9
    train = [Sample("long", turns, []), ask("what?", answer="red", key="short")]
    for too_long, keys in (("skip", ["short"]), ("cut", ["long", "short"])):
        data = PipelineData(processor, train=train, validation=undecoded(scenes), batch_size=2, too_long=too_long)  # type: ignore[arg-type]
        assert [key for batch in data.stream("train") for key in batch.keys] == keys
    assert [batch.keys for batch in PipelineData(processor, train=train).stream("train")] == [["short"]]
    limited = PipelineData(processor, train=train, validation=undecoded(scenes), batch_size=2, validation_samples=3)
    assert [len(read.batch) for read in limited.val_dataloader()] == [2, 1]
    metric = ExactMatch()
    assert PipelineData(processor, train=train, metric=metric).metric is metric


def test_what_a_pipeline_does_not_give_is_said(processor: Processor) -> None:
    data = PipelineData(processor, train=[ask("what?", answer="red"), (1, 2)])
    with pytest.raises(UserError, match=r"a pipeline gives dicts .* not tuple: map its items"):
        list(data.train_dataloader())
    with pytest.raises(UserError, match=r"the recipe names no test data: set data.test to a pipeline"):
        data.stream("test")
    assert data.val_dataloader() == []


def test_a_recipe_trains_on_a_pipeline(run, tiny_recipe: Path, scenes: Path) -> None:  # type: ignore[no-untyped-def]
    """Its images decoded by the pipeline itself."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    target = "test_webdataset.decoded"
    splits = {split: {"_target_": target, "folder": str(scenes / split)} for split in ("train", "validation", "test")}
    recipe["data"] = {"_target_": "datamodules.webdataset_pipeline.PipelineData", **splits, "batch_size": 4}
    recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    status, _, err = run("lavi.fit", "--recipe", tiny_recipe, "--run", "out")
    assert status == 0, err
    status, out, err = run("lavi.evaluate", "--checkpoint", "out", "--trust", "--limit", 2)
    assert status == 0, err
    assert "in 2 samples" in out
    recipe["data"]["train"] = str(scenes / "train")
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    refused(run("lavi.fit", "--recipe", tiny_recipe, "--run", "new"), "'data.train' must be Iterable[Any]")

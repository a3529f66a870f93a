"""The contract of data modules: one of one's own needs its samples alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from conftest import ask, refused, small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lavi.batch import Sample
from lavi.data.data_module import DataModule, EvaluationBatches, SampleEncoder, SampleStream, TrainingBatches
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion

COUNTS = {"train": 10, "validation": 5, "test": 3}


class Numbers(DataModule):
    """A data module of one's own: its samples, and nothing else."""

    def samples(self, split: str) -> Iterator[Sample]:
        for number in range(COUNTS[split]):
            yield ask(number, "what?", answer="red" if number % 2 else "blue", key=f"{split}-{number}")


class Broken(Numbers):
    """The third sample is longer than the context; where ``all_broken``, all are."""

    all_broken = False

    def samples(self, split: str) -> Iterator[Sample]:
        for number, sample in enumerate(super().samples(split)):
            is_long = self.all_broken or number == 2
            yield ask("circle " * 400, answer="red", key=sample.key) if is_long else sample


class AllBroken(Broken):
    all_broken = True


class NoSamples(Numbers):
    def samples(self, split: str) -> Iterator[Sample]:
        return iter(())


class NoContract(pl.LightningDataModule):
    """Lightning's, but none of the contract."""

    def __init__(self, processor: Any) -> None:
        super().__init__()


@pytest.fixture
def own_recipe(tiny_recipe: Path) -> Path:
    settings = yaml.safe_load(tiny_recipe.read_text())
    settings["data"] = {"_target_": "test_data_module.Numbers", "batch_size": 2}
    settings["callbacks"] = {
        "samples": {"_target_": "callbacks.samples.Samples", "count": 3},
        "sources": {"_target_": "callbacks.sources.Sources"},
    }
    settings["trainer"] |= {"max_steps": 3, "val_check_interval": 3}
    tiny_recipe.write_text(yaml.safe_dump(settings))
    return tiny_recipe


def test_one_s_own_is_trained_validated_shown_resumed_and_scored(run, own_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    status, _, err = run("lavi.fit", "--recipe", own_recipe, "--run", "own", "--save-every", 3)
    assert status == 0, err
    status, _, err = run("lavi.fit", "--resume", "own", "--trust", "trainer.max_steps=5")
    assert status == 0, err
    events = EventAccumulator("own", size_guidance={"images": 0}).Reload()
    assert [event.value for event in events.Scalars("samples/train")] == [2, 4, 6, 8, 10]
    assert len(events.Scalars("val/loss")) == 1
    assert "samples" in {tag.split("/")[0] for tag in events.Tags()["images"]}
    status, out, err = run("lavi.evaluate", "--checkpoint", "own", "--trust", "--limit", 2)
    assert status == 0, err
    assert "of 2 answers" in out
    assert "in 2 samples" in out


def test_what_is_no_data_module_is_refused_before_anything_is_built(run, own_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    text = own_recipe.read_text()
    own_recipe.write_text(
        text.replace("test_data_module.Numbers", "test_data_module.NoContract").replace("batch_size: 2", "")
    )
    result = run("lavi.fit", "--recipe", own_recipe, "--run", "own")
    refused(result, "'data' (test_data_module.NoContract) is no lavi.data.data_module.DataModule", "samples(split)")
    assert "model:" not in result[1]


@pytest.fixture
def processor(build):  # type: ignore[no-untyped-def]
    return build(LaViFusion(generator=small())).processor


def test_training_batches_go_through_the_samples_again_and_again(processor: Any) -> None:
    batches = iter(Numbers(processor, batch_size=4).train_dataloader())
    keys = [key for _ in range(5) for key in next(batches).keys]
    assert keys == [f"train-{number % 10}" for number in range(20)]


def test_an_epoch_goes_on_where_the_one_before_it_stopped(processor: Any) -> None:
    """Of a trainer that counts so many batches an epoch; else it would see the first samples alone."""
    loader = Numbers(processor, batch_size=2).train_dataloader()
    epochs = [[batch.keys for batch in islice(iter(loader), 2)] for _ in range(3)]
    keys = [key for epoch in epochs for batch in epoch for key in batch]
    assert keys == [f"train-{number % 10}" for number in range(12)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_samples_and_get_as_many_batches(processor: Any, ranks: int) -> None:
    data = Broken(processor, batch_size=1)
    trained, held_out = [], []
    for rank in range(ranks):
        data.trainer = type("Trainer", (), {"training": True, "global_rank": rank, "world_size": ranks})()
        batches = iter(data.train_dataloader())
        trained += [next(batches).keys[0] for _ in range(len(range(rank, 10, ranks)) - (2 % ranks == rank))]
        held_out.append(list(data.stream("validation")))
    assert sorted(trained) == sorted(f"train-{number}" for number in range(10) if number != 2)
    assert len({len(batches) for batches in held_out}) == 1
    counted = [batch.keys[answer.row] for batches in held_out for batch in batches for answer in batch.answers]
    assert sorted(counted) == [f"validation-{number}" for number in (0, 1, 3, 4)]


def test_what_cannot_be_encoded_is_counted(processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = Broken(processor, batch_size=2)
    stream = data.stream("test")
    assert [batch.keys for batch in stream] == [["test-0", "test-1"]]
    assert list(stream.left_out.values()) == [1]
    assert caplog.messages[0].startswith("left out: sample 'test-2' (longer than the context of 256 tokens")
    assert Numbers.unsized
    data.trainer = type("Trainer", (), {"training": True, "global_rank": 0, "world_size": 1})()  # type: ignore[assignment]
    batches = iter(data.train_dataloader())
    for _ in range(9):  # two passes
        data.on_after_batch_transfer(next(batches), 0)
    assert data.counts == {"train": 18, "skipped": 2}
    again = Broken(processor)
    again.load_state_dict(data.state_dict())
    assert again.counts == data.counts


def test_where_nothing_can_be_used_it_is_said_and_why(processor: Any) -> None:
    with pytest.raises(UserError, match=r"none of the training samples can be used: 10 x longer than the context"):
        next(iter(AllBroken(processor).train_dataloader()))


@pytest.mark.parametrize(
    ("kind", "why"), [("AllBroken", "10 x longer than the context"), ("NoSamples", "there is none")]
)
def test_a_run_without_usable_samples_says_so(run: Any, own_recipe: Path, kind: str, why: str) -> None:
    settings = yaml.safe_load(own_recipe.read_text())
    settings["data"]["_target_"] = f"test_data_module.{kind}"
    own_recipe.write_text(yaml.safe_dump(settings))
    refused(run("lavi.fit", "--recipe", own_recipe, "--run", "own"), "none of the training samples can be used", why)


def test_samples_are_limited_and_read_anew(processor: Any) -> None:
    stream = Numbers(processor).sample_stream("test", limit=2)
    for _ in range(2):
        assert [sample.key for sample in stream] == ["test-0", "test-1"]
    assert (stream.expected, stream.left_out.total()) == (2, 0)
    assert Numbers(processor).sample_stream("test").expected is None
    counted = [ask(number, "what?", answer="red") for number in range(3)]
    assert [SampleStream(lambda: counted, limit).expected for limit in (None, 2, 5)] == [3, 2, 3]


def test_batches_without_a_trainer_are_those_of_a_single_rank(processor: Any) -> None:
    samples, encode = Numbers(processor).sample_stream("test"), SampleEncoder(processor)
    assert [batch.keys for batch in EvaluationBatches(samples, encode, 2)] == [["test-0", "test-1"], ["test-2"]]
    assert next(iter(TrainingBatches(samples, encode, 3))).keys == ["test-0", "test-1", "test-2"]


def test_no_validation_split_is_no_validation(processor: Any) -> None:
    data = Numbers(processor)
    assert len(list(data.val_dataloader())) == 1
    data.splits = ("train",)
    assert data.val_dataloader() == []


def test_what_is_not_said_is_as_written_in_the_contract(processor: Any) -> None:
    """Each of the splits gives its samples, and the training samples are counted under the name of their source."""
    data = Numbers(processor)
    assert {split: len(list(data.sample_stream(split))) for split in data.splits} == COUNTS
    data.trainer = type("Trainer", (), {"training": True, "global_rank": 0, "world_size": 1})()  # type: ignore[assignment]
    data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert data.source_names == ["train"]
    assert data.counts == {"train": 32, "skipped": 0}

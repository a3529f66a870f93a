"""Formats and readers of one's own."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused, small
from test_pack import png, raw_of, said, turns
from test_shards import write_tar

from datamodules.formats.base import SampleFormat
from datamodules.formats.files import Source
from datamodules.image_text import ImageTextData
from datamodules.scenes import make_samples
from datamodules.shards.processes import in_order
from datamodules.shards.read import Raw
from datamodules.shards.write import shard_jobs, write_shards
from lavi.batch import Sample
from lavi.data.images import open_image
from lavi.fusion.lavi import LaViFusion


class ClassLabels(SampleFormat):
    """A format of one's own: an image, and the number of its class."""

    types = ("cls",)

    def __init__(self, *, names: list[str]) -> None:
        self.names = names

    def decode(self, raw: Raw) -> Sample:
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
        answer = {"role": "assistant", "content": self.names[int(raw["cls"])]}
        return Sample(raw["__key__"], [question, answer], [open_image(raw["png"])])


def read_lines(file: Path) -> Source:
    """A reader of one's own: ``IMAGE QUESTION`` a line."""

    def items() -> Iterator[dict[str, Any]]:
        for line in file.read_text().splitlines():
            image, _, question = line.partition(" ")
            yield {"image": image, "conversations": turns(f"<image>{question}")}

    return Source(file.name, items())


def labelled(folder: Path, labels: list[bytes]) -> str:
    folder.mkdir()
    images = [(f"k{number}.png", png(number + 1)) for number in range(len(labels))]
    classes = [(f"k{number}.cls", label) for number, label in enumerate(labels)]
    write_tar(folder / "a.tar", [member for sample in zip(images, classes, strict=True) for member in sample])
    return str(folder)


def test_a_format_of_one_s_own_is_read_and_its_errors_are_counted(build, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    processor = build(LaViFusion(generator=small())).processor
    folder = labelled(tmp_path / "data", [b"0", b"1", b"7", b"x"])
    data = ImageTextData(processor, train=folder, format=ClassLabels(names=["cat", "dog"]), max_skipped=0.9)
    samples = data.sample_stream("train")
    assert [sample.messages[1]["content"] for sample in samples] == ["cat", "dog"]
    causes = list(samples.left_out)
    assert causes[0] == "it cannot be read (IndexError: list index out of range)"
    assert causes[1].startswith("it cannot be read (ValueError: invalid literal for int()")


def test_a_recipe_names_a_format_of_one_s_own(run, tiny_recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = yaml.safe_load(tiny_recipe.read_text())
    own = {"_target_": "test_formats.ClassLabels", "names": ["red", "blue"]}
    recipe["data"] |= {"train": labelled(tmp_path / "data", [b"0", b"1"] * 4), "validation": None, "format": own}
    recipe["trainer"] |= {"max_steps": 3}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    status, out, err = run("lavi.fit", "--recipe", tiny_recipe, "--run", "out")
    assert status == 0, err
    assert "what is it?" in out
    recipe["data"]["format"] = {"_target_": "datamodules.mixture.Mixture", "sources": {"a": "x"}}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    refused(run("lavi.fit", "--recipe", tiny_recipe, "--run", "new"), "'data.format' must be SampleFormat")


def test_a_reader_of_one_s_own_is_packed(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number + 1))
    Path("d.txt").write_text("0.png why?\n2.png how?\ngone.png what?\n")
    command = ("datamodules.pack", "--images", "images", "--out", "out", "--reader")
    refused(run(*command, "test_formats.read_lines", "d.txt"), "1 of 3 entries of d.txt", "there is no image")
    status, _, err = run(*command, "test_formats.read_lines", "d.txt", "--max-skipped", 0.5)
    assert status == 0, err
    assert [said(raw)["messages"][0]["content"][1]["text"] for raw in raw_of()] == ["why?", "how?"]
    assert "reader test_formats.read_lines" in json.loads(Path("out/index.json").read_text())["made_by"]
    refused(run(*command, "test_formats.gone", "d.txt"), "--reader: there is no test_formats.gone")
    refused(run(*command, "gone", "d.txt"), "--reader: there is no gone")
    refused(run(*command, "pathlib.Path", "d.txt"), "--reader: pathlib.Path gives a PosixPath, no datamodules.formats")
    refused(run(*command, "test_formats.read_lines", "gone.txt"), "--reader: there is no gone.txt")
    refused(run(*command, "datamodules.formats.readers.READERS", "d.txt"), "READERS is no function")


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(usual, force=True)


def test_shards_are_packed_alike_however_processes_start(start_method: str, tmp_path: Path) -> None:
    jobs = shard_jobs(6, 3)
    make = partial(make_samples, split="test", seed=0, turns=1)
    written = write_shards(tmp_path / "out", jobs, make, made_by={"test": 1}, workers=2)
    assert (written.samples, written.shards) == (6, 2)
    expected = [sample["__key__"] for job in jobs for sample in make(job)]
    assert [raw["__key__"] for raw in raw_of(tmp_path / "out")] == expected
    assert list(in_order(abs, range(-5, 5), workers=2)) == [abs(number) for number in range(-5, 5)]

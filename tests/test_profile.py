"""``lavi.profile``: what a sweep and a table of targets are of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused

from lavi.checkpoints.model_folder import build as build_model
from lavi.efficiency.record import read_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import Sweep, name_of, sweep_records, with_baseline
from lavi.recipe import Recipe

SWEEP = ("--sweep", "visual_tokens=16", "--text", 12)


def child(parent: Path, file_name: str, **changes: Any) -> Path:
    """A recipe that extends another, and has its name unless ``changes`` give it one."""
    file = parent.parent / file_name
    file.parent.mkdir(exist_ok=True)
    extends = str(Path(*[".."] * (len(Path(file_name).parts) - 1), parent.name))
    file.write_text(yaml.safe_dump({"extends": extends} | changes))
    return file


def test_recipes_of_one_name_are_called_as_their_files(run: Any, tiny_recipe: Path) -> None:
    wide = child(tiny_recipe, "wide.yaml", model={"language": {"config": {"intermediate_size": 640}}})
    status, out, err = run("lavi.profile", "--recipe", wide, "--recipe", tiny_recipe, *SWEEP, "--out", "out")
    assert status == 0, err
    assert [record.knobs["name"] for record in read_records(Path("out/records.jsonl"))] == [
        "wide",
        "tiny",
        "wide (concat)",
    ]
    assert {"efficiency-wide", "efficiency-tiny", "efficiency-wide-(concat)"} <= {f.name for f in Path("out").iterdir()}
    alone = ["lavi.profile", "--recipe", tiny_recipe, "--recipe", wide, *SWEEP, "--at", "visual_tokens=16"]
    status, out, err = run(*alone, "--training", 2)
    assert status == 0, err
    assert "tiny: GiB of a training step" in out
    assert "wide: GiB of a training step" in out
    refused(run("lavi.profile", "--recipe", wide, "--recipe", wide, *SWEEP), "wide is named twice")


def test_files_of_one_name_are_told_apart_by_their_folders(tiny_recipe: Path) -> None:
    """A recipe that has a name of its own keeps it, unless the file of another is called so."""
    files = [child(tiny_recipe, name) for name in ("a/r.yaml", "b/r.yaml")]
    other = child(tiny_recipe, "c.yaml", name="other")
    named = with_baseline([Recipe.load(file) for file in (*files, other)])
    assert [name_of(recipe) for recipe in named] == ["a-r", "b-r", "other", "a-r (concat)"]
    other = child(tiny_recipe, "d.yaml", name="tiny.2")
    again = child(tiny_recipe, "tiny.2.yaml")
    named = with_baseline([Recipe.load(file) for file in (tiny_recipe, again, other)])
    assert [name_of(recipe) for recipe in named][:3] == ["tiny", "tiny.2", "d"]


def test_a_sweep_reads_numbers_as_recipes_do(tiny_recipe: Path) -> None:
    sweep = Sweep.parse("model.fusion.generator.initial_std=0,1e-3,1E-2")
    assert sweep.values == (0, 0.001, 0.01)
    assert all(type(value) in (int, float) for value in sweep.values)
    assert Sweep.parse("model.name=010,12:30,no,2024-01-01").values == ("010", "12:30", False, "2024-01-01")
    records = list(sweep_records([Recipe.load(tiny_recipe)], sweep, Scenario(text=12, visual_tokens=16)))
    assert [record.knobs["value"] for record in records] == [0, 0.001, 0.01]


REDUCERS = {
    "lavi.reduction.pooling.AveragePooling": {"factor": 2},
    "lavi.reduction.pixel_shuffle.PixelShuffle": {"factor": 2},
    "lavi.reduction.resampler.PerceiverResampler": {"tokens": 4, "heads": 2},
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("fusion", ["lavi", "concat"])
def test_the_parameters_that_are_added_are_those_of_the_model_that_is_built(
    run: Any, tiny_recipe: Path, reducer: str, fusion: str
) -> None:
    model: dict[str, Any] = {"reducer": {"_target_": reducer, **REDUCERS[reducer]}}
    if fusion == "concat":
        model["fusion"] = {"_target_": "lavi.fusion.concat.ConcatFusion"}
    file = child(tiny_recipe, "reduced.yaml", model=model)
    with torch.device("meta"):
        built = build_model(Recipe.load(file))
    status, out, err = run("lavi.profile", "--recipe", file, "--show", "targets")
    assert status == 0, err
    said = {what: int(number.replace(",", "")) for what, number in re.findall(r"parameters (\w+)[^:]*: ([\d,]+)", out)}
    assert said["added"] == sum(p.numel() for p in built.fusion.parameters())
    assert said.get("of", 0) == sum(p.numel() for p in built.reducer.parameters())

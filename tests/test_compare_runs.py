"""Runs scored side by side: decoders that cannot be counted, decoders and test splits that differ, runs of one name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import refused
from families import FAMILIES, HYBRIDS

from lavi.batch import Layout
from lavi.checkpoints.load import load
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import save_pretrained
from lavi.efficiency.comparison import NOT_COUNTED, side_by_side, uncounted_note
from lavi.efficiency.measure import Measurement, build_on
from lavi.efficiency.record import Record, read_records
from lavi.efficiency.scenario import Scenario
from lavi.evaluation.compare_runs import ScoredRun, as_deployed, asked_otherwise, flops_record, twin_record
from lavi.evaluation.scoring import Scores
from lavi.recipe import Recipe

PROMPT = Scenario(text=12, image=(40, 30))
PROMPTS = Counter({(12, Layout(views=1, size=(30, 40))): 2, (9, None): 1})


def child(parent: Path, name: str, **changes: Any) -> Path:
    """A recipe that differs from its parent in ``changes``."""
    file = parent.with_name(f"{name}.yaml")
    file.write_text(
        yaml.safe_dump({"extends": parent.name, "trainer": {"max_steps": 2, "val_check_interval": 2}} | changes)
    )
    return file


def rows_of(records: list[Record], baselines: Any) -> dict[str, list[str]]:
    """The table's cells by the name of their row; of several the last."""
    return {name: cells for name, *cells in side_by_side(records, baselines)[1]}


def with_decoder(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    return recipe.replaced("model.language.config", config)


@pytest.fixture
def hybrid(run: Any, tiny_recipe: Path) -> Path:
    """A run of a decoder with recurrent layers, that counts FLOPs when it starts: as the quickstart does."""
    efficiency = {"_target_": "callbacks.efficiency.Efficiency", "visual_tokens": [0, 16], "text_tokens": 12, "runs": 2}
    model = {"language": {"config": HYBRIDS["lfm2"] | {"intermediate_size": 64}}}
    recipe = child(tiny_recipe, "hybrid", model=model, callbacks={"efficiency": efficiency})
    status, _, err = run("lavi.fit", "--recipe", recipe, "--run", "hybrid")
    assert status == 0, err
    return Path("hybrid")


def test_a_decoder_that_cannot_be_counted_trains_and_is_scored(
    run: Any, hybrid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its FLOPs have no formula: one line says so, and its answers, their controls and its times are kept."""
    said = [record.getMessage() for record in caplog.get_records("setup")]
    own = [line for line in said if line.startswith("not measured: tiny: FLOPs of recurrent layers")]
    assert len(own) == 2  # when training starts, and when it ends: not for each number of visual tokens
    assert not (hybrid / "efficiency.jsonl").exists()
    status, out, err = run("lavi.evaluate", "--checkpoint", hybrid, "--limit", 6, "--out", "records.jsonl")
    assert status == 0, err
    (line,) = [line for line in out.splitlines() if "have no formula here" in line]
    assert line.startswith("lavi has no FLOPs: FLOPs of recurrent layers")
    assert "held-out accuracy" in out
    assert "GFLOPs" not in out
    assert "saved" not in out
    for file in (Path("records.jsonl"), hybrid / "evaluation.jsonl"):
        (record,) = read_records(file)
        assert {"all", "level/easy"} <= set(record.accuracy)
        assert set(record.controls) == {"shuffled images", "no image"}
        assert record.flops == record.flops_of_samples == record.decode_flops == {}
        assert "no formula here" in record.knobs[NOT_COUNTED]
        assert record.text_tokens > 0


def test_beside_others_what_was_not_counted_is_a_dash(tiny_recipe: Path) -> None:
    plain = Recipe.load(tiny_recipe)
    recurrent = with_decoder(plain, HYBRIDS["lfm2"])
    models = [build_on(recipe, "meta") for recipe in (plain, recurrent)]
    records = [flops_record(r, m, PROMPT, PROMPTS) for r, m in zip((plain, recurrent), models, strict=True)]
    twins = [twin_record(recipe, PROMPT, PROMPTS) for recipe in (plain, recurrent)]
    rows = rows_of(records, twins)
    counted = {name: cells for name, cells in rows.items() if "GFLOPs" in name or "saved" in name or "ceiling" in name}
    assert len(counted) == 9
    assert all(cells[0] != "-" and cells[1] == "-" for cells in counted.values())
    assert rows["visual tokens in the language model"] == ["0", "0"]
    assert [uncounted_note("a", *pair)[:15] for pair in zip(records, twins, strict=True)] == ["", "a has no FLOPs:"]


def test_a_decoder_that_cannot_be_built_without_weights_has_flops_and_no_savings(tiny_recipe: Path) -> None:
    """BioGPT: its trained model is counted, its twin is on no device. With adapters it is counted with them."""
    recipe = with_decoder(Recipe.load(tiny_recipe), FAMILIES["biogpt"])
    model = build_model(recipe)
    record, twin = flops_record(recipe, model, PROMPT, PROMPTS), twin_record(recipe, PROMPT, PROMPTS)
    assert record.gflops_language > 0
    rows = rows_of([record], [twin])
    assert float(rows["GFLOPs, without vision encoder"][0]) > 0
    assert not any("saved" in name for name in rows)
    assert "it can be trained, and not counted" in uncounted_note("run", record, twin)
    adapted = recipe.replaced("model.language.lora", {"rank": 2})
    model = build_model(adapted)
    assert as_deployed(adapted, model, torch.device("cpu"))[0] is model


def test_savings_are_against_each_run_s_own_twin(tiny_recipe: Path) -> None:
    """Of two decoders, two: the wider one's savings against the twin of the other would be none."""
    plain = Recipe.load(tiny_recipe)
    wide = plain.replaced("model.language.config.intermediate_size", 640)
    alone, both = [], []
    for recipe in (plain, wide):
        record = flops_record(recipe, build_on(recipe, "meta"), PROMPT, PROMPTS)
        both.append((record, twin_record(recipe, PROMPT, PROMPTS)))
        alone.append(rows_of([record], both[-1][1]))
    together = rows_of(*map(list, zip(*both, strict=True)))
    names = [name for name in together if "saved" in name or "ceiling" in name]
    assert len(names) == 5
    for name in names:
        assert together[name] == [rows[name][0] for rows in alone], name
    against_the_first = rows_of([record for record, _ in both], both[0][1])
    assert all(against_the_first[name][0] == together[name][0] for name in names)
    assert all(against_the_first[name][1] != together[name][1] for name in names)


def test_runs_of_one_name_on_other_test_splits(run: Any, tiny_recipe: Path, scenes: Path) -> None:
    """The table tells them apart, with savings of each, and what they were asked stands below it; of the same questions
    nothing does."""
    for folder, test, width in (("a", "test", 64), ("b", "validation", 640), ("c", "test", 64)):
        model = {"language": {"config": {"intermediate_size": width}}}
        recipe = child(tiny_recipe, folder, model=model, data={"test": str(scenes / test)})
        status, _, err = run("lavi.fit", "--recipe", recipe, "--run", f"{folder}/tiny")
        assert status == 0, err
    status, out, err = run("lavi.evaluate", "--checkpoint", "a/tiny", "b/tiny", "--limit", 5, "--out", "records.jsonl")
    assert status == 0, err
    assert [record.knobs["run"] for record in read_records(Path("records.jsonl"))] == ["a-tiny", "b-tiny"]
    (line,) = [line for line in out.splitlines() if line.startswith("The runs were not asked the same; ")]
    assert f"test split: {scenes / 'test'} (a-tiny), {scenes / 'validation'} (b-tiny)" in line
    assert "each run on prompts of its own" in out
    saved = [re.findall(r"-?\d+\.\d", row) for row in out.splitlines() if "saved, with" in row]
    assert [len(cells) for cells in saved] == [2, 2]
    assert all(float(cell) > 0 for cells in saved for cell in cells)
    status, out, err = run("lavi.evaluate", "--checkpoint", "a/tiny", "c/tiny", "--limit", 5)
    assert status == 0, err
    assert "not asked the same" not in out
    assert "5 test samples; one prompt of" in out
    refused(run("lavi.evaluate", "--checkpoint", "a/tiny", "a/tiny"), "a/tiny is named twice")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"answers": 7}, "answers: 6 (a), 7 (b)"),
        ({"samples": 2}, "samples: 3 (a), 2 (b)"),
        ({"typical": Scenario(13, frames=8)}, "a typical prompt: 12 text tokens and an image of 40x30 (a), 13 text"),
        ({"prompts": Counter({(13, None): 1})}, "prompts of other sizes"),
    ],
)
def test_what_runs_were_not_asked_alike_is_said(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    usual: dict[str, Any] = {"samples": 3, "answers": 6, "typical": PROMPT, "prompts": PROMPTS}
    runs = []
    for own in (usual, usual | changed):
        record = Record("lavi", 12, 16, 0, 1)
        scores = scores_of(own)
        measurement = Measurement(record, PROMPT, lambda: pytest.fail("built"))
        runs.append(ScoredRun(folder=tmp_path, test="x", scores=scores, twin=record, measurement=measurement))
    line = asked_otherwise(["a", "b"], runs)
    assert said in line
    assert bool(line) is bool(changed)


def scores_of(known: dict[str, Any]) -> Scores:
    """Scores of which only what was asked is known."""
    nothing: dict[str, Any] = {"metric": "m", "label": "m", "accuracy": {}, "controls": {}, "left_out": Counter()}
    return Scores(**nothing, **known, route_counts=Counter(), shuffled_answers=0)


@pytest.mark.parametrize("command", ["lavi.evaluate", "lavi.export --out again", "lavi.route_tiles --out router"])
def test_an_export_is_named_for_what_it_is(run: Any, tiny_recipe: Path, command: str) -> None:
    """It has a recipe and no trained weights beside it, as a run has that was stopped early."""
    save_pretrained(build_model(Recipe.load(tiny_recipe)), "exported")
    words = "exported is a model that lavi.export has written", "give the run folder that it was exported from"
    module, *options = command.split()
    refused(run(module, "--checkpoint", "exported", *options), *words)
    assert load("exported") is not None

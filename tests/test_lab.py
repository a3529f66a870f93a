"""The lab's records, table and picture; its methods can all be built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lab
import lab_methods
import pytest
import torch
from conftest import answering, small
from lab import RECIPES, key_of, plan, slug
from lab_methods import FUSIONS, METHODS, PARTS, SEEDS, Method, ablation, part_of, variants_of
from lab_results import (
    DATA,
    LabData,
    controls_table,
    draw,
    encoder_cost_table,
    lab_table,
    over_seeds,
    write_tensorboard,
)
from relevance import asked, covered, shares_on
from safetensors.torch import load_file

from datamodules.scenes import LEVELS, Thing, write_dataset
from lavi.checkpoints.run_folder import lock_run_folder
from lavi.efficiency.measure import Measurement
from lavi.efficiency.record import Record, read_records
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.inspection.answer import inspect_answer
from lavi.recipe import Recipe

LATE = ("model.fusion.where=last",)
FAMILIES = ("count", "relation", "comparison", "reading", "two_images")


def record(method: str, seed: int, hard: float, *, gflops: float, share: float = 1.0) -> Record:
    accuracy = {"level/easy": 90.0 + seed, "level/hard": hard} | {f"family/{name}": hard for name in FAMILIES}
    flops = {"text_attention": gflops * 1e9, "vision_encoder": 7e9, "floor": 1e8}
    made = Record("x", 9, 64, 0, 1, accuracy=accuracy, flops_of_samples=flops)
    made.controls = {
        name: {"level/hard": hard - 10 * number}
        for number, name in enumerate(("shuffled images", "no image", "noise of 0.1", "noise of 0.3"), start=1)
    }
    made.knobs |= {"method": method, "seed": seed, "share": share, "steps": int(100 * share), "data": "scenes"}
    return made


RECORDS = [record("concatenation", s, 80.0 + s, gflops=1.0) for s in range(3)]
RECORDS += [record("LaVi", s, 79.0, gflops=0.2) for s in range(3)] + [record("LaVi", 0, 60.0, gflops=0.2, share=0.5)]


def test_means_are_over_seeds_with_their_interval() -> None:
    """Of 80, 81 and 82: the deviation is 1, and t of two degrees of freedom 4.30."""
    assert over_seeds([80.0, 81.0, 82.0]) == "81.0 ± 2.5"
    assert over_seeds([80.0]) == "80.0"
    columns, rows = lab_table(RECORDS)
    assert [row[:3] for row in rows[:3]] == [["concatenation", "100", "3"], ["LaVi", "100", "3"], ["LaVi", "50", "1"]]
    assert rows[0][3:5] == ["91.0 ± 2.5", "81.0 ± 2.5"]
    assert rows[1][4] == "79.0 ± 0.0"
    assert rows[1][columns.index("saved %")] == "80.0"
    floor = dict(zip(columns, rows[3], strict=True))  # of what fusion costs nothing
    assert (floor["GFLOPs, no encoder"], floor["saved %"], floor["hard %"]) == ("0.1000", "90.0", "-")


def test_controls_stand_beside_the_answers_of_what_had_all_its_steps() -> None:
    columns, rows = controls_table(RECORDS)
    assert columns[2:] == ["shuffled images", "no image", "noise of 0.1", "noise of 0.3"]
    assert rows == [
        ["concatenation", "81.0 ± 2.5", "71.0 ± 2.5", "61.0 ± 2.5", "51.0 ± 2.5", "41.0 ± 2.5"],
        ["LaVi", "79.0 ± 0.0", "69.0 ± 0.0", "59.0 ± 0.0", "49.0 ± 0.0", "39.0 ± 0.0"],
    ]


def test_every_method_comes_once_before_any_comes_again() -> None:
    """With fewer steps than all once only."""
    runs = plan(list(METHODS), None, None)
    assert len(set(runs)) == len(runs)
    for name, method in METHODS.items():
        seeds = {share: [seed for of, seed, one in runs if (of, one) == (name, share)] for share in method.shares}
        assert all(of == list(method.seeds[: None if share >= 1.0 else 1]) for share, of in seeds.items())
    order = [seed for _, seed, _ in runs]
    assert order == sorted(order)
    assert max(order) == max(SEEDS)
    assert plan(["LaVi"], [4], [0.25]) == [("LaVi", 4, 0.25)]


def test_each_run_is_in_one_part_of_the_lab() -> None:
    """The first has each fusion with all its steps, and its baseline on the same data; large pictures are apart."""
    parts = {(name, share): part_of(name, share) for name, _, share in plan(list(METHODS), None, None)}
    assert set(parts.values()) == set(PARTS)
    assert [name for (name, _), part in parts.items() if part == "fusions"] == list(FUSIONS)
    assert parts["LaVi", 1.0] == "fusions"
    assert parts["LaVi", 0.4] == "variants"
    assert {DATA[METHODS[name].data].baseline for name in FUSIONS} <= set(FUSIONS)
    assert all((part == "large") == ("large" in METHODS[name].recipe) for (name, _), part in parts.items())


def test_records_are_told_apart_and_drawn(tmp_path: Path) -> None:
    assert len({key_of(one) for one in RECORDS}) == len(RECORDS)
    assert len(draw(RECORDS).axes) == 2  # easy and hard
    for one in RECORDS:
        one.milliseconds = {"prefill": [3.0, 2.9, 3.2]}
    draw(RECORDS).savefig(tmp_path / "lab.png")
    assert (tmp_path / "lab.png").stat().st_size > 10_000
    assert len(draw(RECORDS).axes) == 4  # and what was timed
    write_tensorboard(RECORDS, tmp_path)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_names_are_folders_of_their_own() -> None:
    assert len({slug(name) for name in METHODS}) == len(METHODS)
    assert all(slug(name).replace("-", "").isalnum() for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_recipe(name: str) -> None:
    method = METHODS[name]
    recipe = Recipe.load(RECIPES / f"{method.recipe}.yaml", method.changes)
    tokenizer = Path(recipe.settings["model"]["language"]["tokenizer"])
    folder = DATA[method.data].features
    if method.of:
        assert folder == tokenizer.parent  # pixels
        assert DATA[method.data].varies in variants_of(method.of)
        assert METHODS[method.of].recipe == method.recipe
    else:
        assert folder.name.startswith(tokenizer.parent.name)
        assert folder.name.endswith("-features")
    for _, changes in method.variants:
        Recipe.load(RECIPES / f"{method.recipe}.yaml", changes).check()


def test_features_are_read_by_methods_of_one_encoder() -> None:
    """The tower, the tiling and the data of a folder of features are those of all methods that are trained on it.

    Routers have questions of their own, which the Makefile draws and encodes with the tower of what they route.
    """
    encoders: dict[Path, list[Any]] = {}
    for method in METHODS.values():
        if not method.of:
            settings = Recipe.load(RECIPES / f"{method.recipe}.yaml", method.changes).settings
            seen = [settings["model"].get(key) for key in ("vision", "tiling")] + [settings["data"]["train"]]
            if method.routes is not None:
                assert method.train is not None
                recipe, questions = METHODS[method.routes].recipe, method.train.parent
                drawn = f"lab-features,{recipe},{questions},train data.train={seen.pop().removesuffix('/train')}/train)"
                assert drawn in Path("Makefile").read_text()
                seen.append(Recipe.load(RECIPES / f"{recipe}.yaml").settings["data"]["train"])
            encoders.setdefault(DATA[method.data].features, []).append(seen)
    assert all(one == of[0] for of in encoders.values() for one in of)
    different = [of[0] for of in encoders.values()]
    assert len({str(one) for one in different}) == len(different)


def test_what_was_trained_with_a_reduced_encoder_stands_beside_what_was_not() -> None:
    whole = record("LaVi", 0, 90.0, gflops=0.2)
    reduced, trained = record("half merged", 0, 70.0, gflops=0.2), record("half merged, trained", 0, 85.0, gflops=0.2)
    reduced.knobs["data"], trained.knobs["data"] = "encoder", "merged"
    other = record("LaVi of large pictures", 0, 60.0, gflops=0.2)
    other.knobs["data"] = "large"
    columns, rows = encoder_cost_table([whole, reduced, trained, other], "encoder")
    hard = columns.index("hard %")
    assert [(row[0], row[hard]) for row in rows] == [
        ("whole", "90.0"),
        ("half merged", "70.0"),
        ("half merged, trained", "85.0"),
    ]


TINY = {
    "concatenation": Method("tiny", ("model.fusion={_target_: lavi.fusion.concat.ConcatFusion}",), seeds=(0,)),
    "LaVi": Method("tiny", shares=(0.5, 1.0), seeds=(0,), variants=(("LaVi, as it is", ()), ("LaVi, late", LATE))),
    "LaVi, shift alone": ablation("tiny", "model.fusion.parameters=shift"),
}
VISOR = (
    "model.fusion={_target_: lavi.visor.fusion.VisorFusion, cross_attention: [0], self_attention: [1], "
    "configurations: [[], [1]]}"
)


@pytest.fixture
def tiny_lab(run: Any, tiny_recipe: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lab, of three small methods; timing says 3 ms of each model that can be built."""
    for module in (lab, lab_methods):
        monkeypatch.setattr(module, "METHODS", TINY)
    monkeypatch.setattr(lab, "RECIPES", tmp_path)
    monkeypatch.setitem(DATA, "scenes", LabData(scenes, LEVELS, "concatenation"))

    def measure(measurements: Sequence[Measurement], **_: Any) -> None:
        assert measurements[0].record.knobs["method"] == "concatenation"
        for one in measurements:
            assert one.model().fusion is not None
            one.record.milliseconds["prefill"] = [3.0, 2.9, 3.1]

    monkeypatch.setattr(lab, "measure", measure)
    return partial(run, "lab", "--out", "lab.jsonl", "--device", "cpu")


def test_the_lab_trains_scores_times_and_draws_and_does_nothing_twice(
    tiny_lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in parts, one of fewer steps alone first; a method whose recipe has changed is trained anew."""
    status, out, problems = tiny_lab("--methods", "LaVi, shift alone")
    assert status == 0, problems
    assert "scenes, controls" in out
    assert tiny_lab()[0] == 0
    assert {r.knobs["share"] for r in read_records(Path("lab.jsonl"))[1:]} == {1.0}
    assert tiny_lab("--part", "variants")[0] == 0
    records = read_records(Path("lab.jsonl"))
    assert [(r.knobs["method"], r.knobs["steps"]) for r in records] == [
        ("LaVi, shift alone", 2),
        ("concatenation", 6),
        ("LaVi, as it is", 6),
        ("LaVi, late", 6),
        ("LaVi, as it is", 3),
        ("LaVi, late", 3),
    ]
    assert {name for r in records for name in r.controls} == {
        "shuffled images",
        "no image",
        "noise of 0.1",
        "noise of 0.3",
    }
    trained: list[Path] = []
    monkeypatch.setattr(lab, "train", lambda settings, folder, **_: trained.append(folder) or 1)
    status, _, problems = tiny_lab("--time", "--picture", "lab.png")
    assert status == 0, problems
    assert (tmp_path / "lab.png").is_file()
    assert sum("prefill" in r.milliseconds for r in read_records(Path("lab.jsonl"))) == 4  # of each the longest
    assert tiny_lab()[0] == tiny_lab("--part", "variants")[0] == 0
    assert trained == []
    file = tmp_path / "tiny.yaml"
    file.write_text(file.read_text().replace("batch_size: 4", "batch_size: 2"))
    assert tiny_lab("--methods", "concatenation")[0] != 0  # as after Ctrl-C
    assert len(trained) == 1


def test_a_router_learns_from_the_labels_of_the_run_it_routes(
    tiny_lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is trained first where it is not there, and labels once; another run has another router."""
    questions = tmp_path / "single"
    write_dataset(questions, seed=1, counts={"train": 16}, turns=1, workers=1)
    routed = lab_methods.layer_router_of("VISOR", "tiny", train=questions / "train", seeds=(0,))
    router = ("model.fusion.router=token", "module.learning_rate={fusion.router: 1e-3}")
    monkeypatch.setitem(TINY, "VISOR", Method("tiny", (VISOR,), seeds=(0,)))
    monkeypatch.setitem(TINY, "VISOR, routed", replace(routed, changes=(VISOR, *router, *routed.changes)))
    ours, train = lab.digest_of("VISOR, routed", 0, 1.0), lab.train
    monkeypatch.setattr(lab, "train", lambda recipe, *given, **how: _broken(recipe) or train(recipe, *given, **how))
    status, _, problems = tiny_lab("--methods", "VISOR, routed")
    assert (status, "no space is left" in problems) == (2, True)  # and not left out, as what others have in work
    monkeypatch.setattr(lab, "train", train)
    label = lab.offline.label
    monkeypatch.setattr(lab.offline, "label", lambda *given, **how: labelled.append(how) or label(*given, **how))
    labelled: list[Any] = []
    status, _, problems = tiny_lab("--methods", "VISOR, routed")
    assert status == 0, problems
    (record,) = read_records(Path("lab.jsonl"))
    assert record.knobs["method"] == "VISOR, routed"
    (labels,) = Path("runs/lab").rglob("labels*.jsonl")
    assert len(labels.read_text().splitlines()) == 1 + 16
    (folder,) = Path("runs/lab/visor-routed").rglob(f"seed-0-{ours}")
    assert Recipe.load(folder / "recipe.yaml").settings["module"]["start_from"] == str(labels.parent)
    before, after = (load_file(of / "trained.safetensors") for of in (labels.parent, folder))
    assert {name for name in after if name not in before or not torch.equal(before[name], after[name])} == {
        name for name in after if "fusion.router" in name
    }
    assert tiny_lab("--methods", "VISOR, routed")[0] == 0
    assert len(labelled) == 1
    monkeypatch.setitem(TINY, "VISOR", Method("tiny", (VISOR, "data.batch_size=3"), seeds=(0,)))
    assert lab.digest_of("VISOR, routed", 0, 1.0) != ours


def _broken(recipe: Recipe) -> None:
    """No router can be trained, whatever it routes can."""
    if recipe.settings["model"]["fusion"].get("router"):
        raise UserError("no space is left on this disk.")


def test_no_run_is_begun_when_its_time_is_over(tiny_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "train", lambda *_, **__: pytest.fail("a run was begun"))
    status, out, problems = tiny_lab("--minutes", "0")
    assert status == 0, problems
    assert "left out, 0 minutes are over: concatenation, seed 0" in out
    assert not Path("lab.jsonl").exists()


def test_processes_share_the_work(tiny_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one has in work is left to it; where one fails, the command says so."""
    steps = 6
    folder = lab.RUNS / "concatenation" / f"{steps}-steps" / f"seed-0-{lab.digest_of('concatenation', 0, 1.0)}"
    folder.mkdir(parents=True)
    with lock_run_folder(folder):
        status, out, _ = tiny_lab("--methods", "concatenation")
    assert status == 0
    assert "left out: another process is training" in " ".join(out.split())
    assert not list(folder.glob("*.safetensors"))
    started: list[list[str]] = []
    ends = 0

    def start(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command[2:])
        return SimpleNamespace(wait=lambda: ends)

    monkeypatch.setattr(lab, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
    assert tiny_lab("--methods", "concatenation", "--processes", "3")[0] == 0
    assert len(started) == 2
    assert all(command[-2:] == ["--processes", "1"] for command in started)
    ends = 1
    status, _, problems = tiny_lab("--methods", "concatenation", "--processes", "2")
    assert status == 2
    assert "a process of the lab ended with an error: read runs/lab/process-2.log" in problems


def test_savings_are_against_concatenation_wherever_it_stands() -> None:
    pooled = record("concatenation, pooled 2 x 2", 0, 70.0, gflops=0.5, share=0.5)
    columns, rows = lab_table([pooled, *reversed(RECORDS)])
    saved = {row[0]: row[columns.index("saved %")] for row in rows}
    assert (saved["LaVi"], saved["concatenation"], saved["concatenation, pooled 2 x 2"]) == ("80.0", "0.0", "50.0")
    columns, rows = lab_table([pooled])
    assert rows[0][columns.index("saved %")] == "-"
    (names,) = draw([pooled, *RECORDS]).legends
    assert [text.get_text() for text in names.get_texts()] == ["concatenation", "LaVi"]
    assert draw([pooled]).axes


# --- where runs look --------------------------------------------------------------------------------------------------


def test_the_share_of_a_thing_is_that_of_its_square() -> None:
    """A large thing of 26 x 26 pixels in a picture of 64 x 64, on any grid."""
    thing = Thing("red", "circle", "large", "", x=21, y=40)
    for grid in ((8, 8), (4, 4), (64, 64)):
        on = covered(thing, grid)
        assert float(on.mean()) == pytest.approx((26 / 64) ** 2)
    rows, columns = covered(thing, (64, 64)).nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (27, 52, 8, 33)


def test_questions_are_about_one_of_several_things() -> None:
    for scene, thing, text, answer in asked(40):
        assert len(scene.things) > 1
        assert answer in (thing.colour, thing.shape)
        assert (thing.shape in text) != (thing.colour in text)


def test_a_model_that_looks_at_one_place_is_found_out(build: Any) -> None:
    """All it reads and depends on is the first patch: the share of that patch which the thing covers."""
    model = answering(build, LaViFusion(every=2, generator=small()))
    (scene, thing, text, answer), *_ = asked(1)
    image = scene.image()
    inspected = inspect_answer(model, text, [image], answer=answer)
    inspected.relevance = torch.zeros_like(inspected.relevance)
    inspected.relevance[0] = 1
    on = covered(thing, inspected.views[0].grid)
    assert shares_on(inspected, thing)["relevance"] == pytest.approx(float(on[0, 0]))
    assert shares_on(inspected, thing)["picture"] == pytest.approx(float(on.mean()))
    assert set(shares_on(inspected, thing)) == {"picture", "relevance", "attention"}


def test_merging_in_the_tower_stands_beside_what_there_is() -> None:
    """Whatever of LaVi and concatenation has a record already."""
    merged = record("8 merged", 0, 70.0, gflops=0.2)
    merged.knobs["data"] = "encoder"
    merged.flops_of_samples["vision_encoder"] = 3.5e9
    columns, rows = encoder_cost_table([merged, *RECORDS], "encoder")
    assert [row[0] for row in rows] == ["whole", "8 merged"]
    cells = dict(zip(columns, rows[1], strict=True))
    assert (cells["encoder GFLOPs"], cells["of the whole %"], cells["hard %"]) == ("3.5000", "50", "70.0")
    assert cells["saved, with encoder %"] == f"{100 * (1 - 3.7 / 8.0):.1f}"
    columns, rows = encoder_cost_table([merged], "encoder")
    assert rows[0][-2:] == ["-", "-"]

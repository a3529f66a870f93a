"""The lab's records, table and picture; its methods can all be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answering, small
from lab import METHODS, RECIPES, draw, key_of, lab_table, over_seeds, slug
from relevance import asked, covered, shares_on

from datamodules.scenes import Thing
from lavi.efficiency.record import Record
from lavi.fusion.lavi import LaViFusion
from lavi.inspection.answer import inspect_answer
from lavi.recipe import Recipe

FAMILIES = ("count", "relation", "comparison", "reading", "two_images")


def record(method: str, seed: int, hard: float, *, gflops: float, share: float = 1.0) -> Record:
    accuracy = {"level/easy": 90.0 + seed, "level/hard": hard} | {f"family/{name}": hard for name in FAMILIES}
    flops = {"text_attention": gflops * 1e9, "vision_encoder": 7e9, "floor": 1e8}
    made = Record("x", 9, 64, 0, 1, accuracy=accuracy, flops_of_samples=flops)
    made.knobs |= {"method": method, "seed": seed, "share": share, "steps": int(100 * share)}
    return made


RECORDS = [record("concatenation", s, 80.0 + s, gflops=1.0) for s in range(3)]
RECORDS += [record("LaVi", s, 79.0, gflops=0.2) for s in range(3)] + [record("LaVi", 0, 60.0, gflops=0.2, share=0.5)]


def test_means_are_over_seeds_with_their_interval() -> None:
    """Of 80, 81 and 82: the deviation is 1, and t of two degrees of freedom 4.30."""
    assert over_seeds([80.0, 81.0, 82.0]) == "81.0 ± 2.5"
    assert over_seeds([80.0]) == "80.0"
    columns, rows = lab_table(RECORDS)
    assert len(rows) == 3
    assert rows[0][:4] == ["concatenation", "100", "91.0 ± 2.5", "81.0 ± 2.5"]
    assert rows[1][3] == "79.0 ± 0.0"
    assert rows[1][columns.index("saved %")] == "80.0"
    assert rows[2][:2] == ["LaVi", "50"]


def test_records_are_told_apart_and_drawn(tmp_path: Path) -> None:
    assert len({key_of(one) for one in RECORDS}) == len(RECORDS)
    draw(RECORDS, tmp_path / "lab.png")
    assert (tmp_path / "lab.png").stat().st_size > 10_000


def test_names_are_folders_of_their_own() -> None:
    assert len({slug(name) for name in METHODS}) == len(METHODS)
    assert all(slug(name).replace("-", "").isalnum() for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_recipe(name: str) -> None:
    method = METHODS[name]
    Recipe.load(RECIPES / f"{method.recipe}.yaml", method.changes)


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

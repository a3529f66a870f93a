"""What docs/extending.md shows: each part of one's own trains from a recipe, and is as short as it is said to be."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused
from omegaconf import OmegaConf

from lavi.checkpoints.trained_weights import TRAINED
from lavi.config import targets
from lavi.errors import UserError
from lavi.recipe import Recipe

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
HEAD, *REST = PAGE.split("\n## ")
PARTS = {section.partition("\n")[0]: section for section in REST}
LONGEST = {
    "A delta generator": 20,
    "A projector": 18,
    "A vision backbone": 26,
    "A reducer": 18,
    "A fusion": 55,
    "A metric": 15,
    "A data module": 25,
    "A format": 15,
}
"""Lines of code, blank ones left out."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forgets what was found beside recipes, as a new process has; so it is again behind the test."""
    path = list(sys.path)

    def call() -> None:
        sys.path[:] = path
        targets._beside.clear()
        sys.modules.pop("my_parts", None)

    call()
    yield call
    call()


@pytest.fixture
def own(run, tiny_recipe: Path, forget: Callable[[], None]) -> Path:  # type: ignore[no-untyped-def]
    """A folder that is not the current one, with the page's one module in it."""
    folder = tiny_recipe.parent / "own"
    folder.mkdir()
    (folder / "my_parts.py").write_text("\n\n".join(blocks(PAGE, "python")))
    return folder


def recipe_in(folder: Path, tiny_recipe: Path, **changes: Any) -> Path:
    """A recipe of three steps."""
    trainer = {"max_steps": 3, "val_check_interval": 3, "limit_val_batches": 1}
    settings = {"extends": str(tiny_recipe), "trainer": trainer}
    (folder / "child.yaml").write_text(yaml.safe_dump(settings | changes))
    return folder / "child.yaml"


def test_each_kind_of_part_is_shown_and_short() -> None:
    assert set(PARTS) == set(LONGEST)
    for name, section in PARTS.items():
        (code,) = blocks(section, "python")
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= LONGEST[name], name


TOGETHER = [
    ["A delta generator", "A vision backbone", "A metric", "A format"],
    ["A projector", "A reducer", "A data module"],
    ["A fusion"],
]
"""Parts that one recipe can have."""


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_parts_of_ones_own_train_and_answer(run, tiny_recipe: Path, own: Path, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert sorted(name for each in TOGETHER for name in each) == sorted(PARTS)
    texts = [text for name in names for text in blocks(PARTS[name], "yaml")]
    assert len(texts) == len(names)
    changes = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, texts)))
    assert isinstance(changes, dict)
    changes["callbacks"] = {"samples": {"_target_": "callbacks.samples.Samples", "count": 2}}
    status, out, err = run("lavi.fit", "--recipe", recipe_in(own, tiny_recipe, **changes), "--run", "run")
    assert status == 0, err
    assert "after 3 steps" in " ".join(out.split())
    assert Path("run", TRAINED).exists()
    status, out, err = run("lavi.evaluate", "--checkpoint", "run", "--limit", 3, "--trust")
    assert status == 0, err


METRIC = {"data": {"metric": {"_target_": "my_parts.WordOverlap"}}}


def test_a_run_with_a_part_of_ones_own_is_opened_again_elsewhere(
    run,  # type: ignore[no-untyped-def]
    tiny_recipe: Path,
    own: Path,
    forget: Callable[[], None],
) -> None:
    """It does not know where the module lay: the error says where to put it. It is looked for by those alone who trust
    the recipe."""
    assert run("lavi.fit", "--recipe", recipe_in(own, tiny_recipe, **METRIC), "--run", "run")[0] == 0
    evaluate = ("lavi.evaluate", "--checkpoint", "run", "--limit", 3)
    forget()
    refused(run(*evaluate, "--trust"), "there is no module 'my_parts'", "lies beside the recipe (run/my_parts.py)")
    shutil.copy(own / "my_parts.py", "run")
    refused(run(*evaluate), "wants to build 'my_parts.WordOverlap', which is outside")
    assert "my_parts" not in sys.modules
    status, _, err = run(*evaluate, "--trust")
    assert status == 0, err


def test_what_lies_beside_a_recipe_stands_behind_all_else(tiny_recipe: Path, own: Path) -> None:
    """A file there that is called as a package takes nothing's place, and nothing but what is named is looked for."""
    (own / "json.py").write_text("raise AssertionError('imported')")
    path = list(sys.path)
    settings = {"_target_": "json.JSONDecoder"}
    Recipe.load(recipe_in(own, tiny_recipe, callbacks={"a": settings}))
    assert sys.path == path
    Recipe.load(recipe_in(own, tiny_recipe, **METRIC))
    assert sys.path == [*path, str(own)]
    part = sys.modules["my_parts"].QuestionOnly
    with get_context("spawn").Pool(1) as pool:  # as processes that read data
        assert isinstance(pool.apply(part), part)


def test_it_lies_beside_the_file_that_names_it(tiny_recipe: Path, own: Path, forget: Callable[[], None]) -> None:
    """Which may be a parent; of a change on the command line it is the recipe."""
    other = tiny_recipe.parent / "other"
    other.mkdir()
    Recipe.load(recipe_in(other, recipe_in(own, tiny_recipe, **METRIC)))
    forget()
    change = ["data.metric={_target_: my_parts.WordOverlap}"]
    Recipe.load(recipe_in(own, tiny_recipe), change)
    forget()
    with pytest.raises(UserError, match="command line: there is no module 'my_parts'"):
        Recipe.load(recipe_in(other, tiny_recipe), change)


def test_two_modules_of_one_name_are_not_taken_for_each_other(tiny_recipe: Path, own: Path) -> None:
    """Copies of one are."""
    other = tiny_recipe.parent / "other"
    shutil.copytree(own, other)
    files = [recipe_in(folder, tiny_recipe, **METRIC) for folder in (own, other)]
    for file in files:
        Recipe.load(file)
    (other / "my_parts.py").write_text((other / "my_parts.py").read_text() + "\nOTHER = 1\n")
    with pytest.raises(UserError, match=r"child.yaml:\d+: 'my_parts' lies beside this recipe, and another 'my_parts'"):
        Recipe.load(files[1])
    Recipe.load(files[0])


def test_beside_a_recipe_that_nobody_vouched_for_nothing_is_looked_for(
    tiny_recipe: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what is called as a package that it may name, and is not installed."""
    monkeypatch.setattr(targets, "TRUSTED", (*targets.TRUSTED, "my_parts."))
    with pytest.raises(UserError, match=r"there is no module 'my_parts': is 'my_parts' installed\?$"):
        Recipe.load(recipe_in(own, tiny_recipe, **METRIC), trusted=False)
    assert str(own) not in sys.path

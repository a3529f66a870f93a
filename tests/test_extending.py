"""What docs/extending.md shows: each part of one's own trains from a recipe, and is as short as it is said to be."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lavi.checkpoints.trained_weights import TRAINED

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
def my_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's one module."""
    (tmp_path / "my_parts.py").write_text("\n\n".join(blocks(PAGE, "python")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)


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
def test_parts_of_ones_own_train_and_answer(run, tiny_recipe: Path, my_parts: None, names: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert sorted(name for each in TOGETHER for name in each) == sorted(PARTS)
    texts = [text for name in names for text in blocks(PARTS[name], "yaml")]
    assert len(texts) == len(names)
    changes = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, texts)))
    assert isinstance(changes, dict)
    trainer = {"max_steps": 3, "val_check_interval": 3, "limit_val_batches": 1}
    callbacks = {"samples": {"_target_": "callbacks.samples.Samples", "count": 2}}
    child = tiny_recipe.with_name("child.yaml")
    settings = {"extends": tiny_recipe.name, "trainer": trainer, "callbacks": callbacks}
    child.write_text(yaml.safe_dump(settings | changes))
    status, out, err = run("lavi.fit", "--recipe", child, "--run", "run")
    assert status == 0, err
    assert "after 3 steps" in " ".join(out.split())
    assert Path("run", TRAINED).exists()
    status, out, err = run("lavi.evaluate", "--checkpoint", "run", "--limit", 3, "--trust")
    assert status == 0, err

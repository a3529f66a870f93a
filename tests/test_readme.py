"""What the README says can be done: its commands parse, its tables come from records."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import tables
from conftest import QWEN2, image
from families import OF_THE_NEWEST
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lavi.vision.hf import TOWERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith(("python -m", "make"))
]


def test_make_targets_exist() -> None:
    named = {shlex.split(c)[1] for c in COMMANDS if c.startswith("make")} | set(re.findall(r"`make ([a-z-]+)", README))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"quickstart", "test"} <= named
    assert named <= {line.split()[0] for line in listed.splitlines()}


@pytest.mark.parametrize("module", sorted({shlex.split(c)[2] for c in COMMANDS if c.startswith("python")}))
def test_commands_take_the_options_that_are_shown(module: str) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    options = {o for c in COMMANDS if f" {module} " in c for o in re.findall(r"--[a-z-]+", c)}
    assert all(option in helped.stdout for option in options)


def test_recipes_that_are_shown_exist() -> None:
    shown = {path for c in COMMANDS for path in re.findall(r"recipes/\S+\.yaml", c)}
    assert shown
    assert all((ROOT / path).is_file() for path in shown)


def test_tables_come_from_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as left:
        tables.main()
    assert left.value.code == 0


@pytest.mark.parametrize(("mark", "expected"), [("families", OF_THE_NEWEST), ("towers", TOWERS)])
def test_the_models_that_are_listed_are_those_that_are_tested(mark: str, expected: Iterable[str]) -> None:
    listed = (ROOT / "docs" / "models.md").read_text().split(f"<!-- {mark} -->")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(expected)


def test_the_readme_counts_the_families() -> None:
    assert f"decoders of {len(OF_THE_NEWEST)} families" in README


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150
    assert (ROOT / "docs" / "architecture.md").read_text().count("\n") <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links if "://" not in link)


def test_what_is_shown_in_python_runs(run, tiny_recipe: Path, scenes: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """With a tiny run in the place of the quickstart's."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "runs/quickstart", "trainer.max_steps=1")[0] == 0
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    tokenizer = AutoTokenizer.from_pretrained(scenes / "tokenizer")
    config = LlamaConfig(**QWEN2 | {"model_type": "llama", "vocab_size": len(tokenizer)})
    exec(block, {"image": image(1), "hf": LlamaForCausalLM(config), "tokenizer": tokenizer})
    assert len(capsys.readouterr().out.splitlines()) >= 2  # an answer of each model
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "efficiency.md").read_text(), re.DOTALL)
    exec(block, {})
    (printed,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+\.\d MFLOPs, and \d+\.\d with the vision encoder", printed)

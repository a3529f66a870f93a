"""What `make quickstart` does, with a Python that notes its commands instead of running them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

STUB = """#!/bin/sh
[ "$1" = -c ] && echo 1 && exit
echo "$@" >> commands.txt
case "$*" in *"$FAILS"*) echo "no room"; exit 1;; esac
"""
Quickstart = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def quickstart(tmp_path: Path) -> Quickstart:
    """Runs it in a folder of its own: (status, what it prints, commands of Python)."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(Path(__file__).parent.parent / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    (tmp_path / ".venv/installed").touch()

    def call(*, fails: str = "nothing") -> tuple[int, str, list[str]]:
        noted = tmp_path / "commands.txt"
        noted.write_text("")
        done = subprocess.run(
            ["make", "quickstart"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "FAILS": fails},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout, noted.read_text().splitlines()

    return call


def test_both_are_trained_and_set_side_by_side(quickstart: Quickstart) -> None:
    status, out, commands = quickstart()
    assert status == 0, out
    assert commands[0].startswith("-m datamodules.scenes --out data/scenes")
    assert commands[1].startswith("-m lavi.cache_features --recipe recipes/quickstart.yaml --out data/scenes-features")
    assert sorted(command.split()[3] for command in commands[2:4]) == [
        "recipes/quickstart.yaml",
        "recipes/scenes/concat.yaml",
    ]
    for command in commands[2:4]:
        assert "data.train=data/scenes-features/train data.validation=data/scenes-features/validation" in command
    assert commands[4:] == ["-m lavi.evaluate --checkpoint runs/quickstart runs/concat"]


def test_what_was_stopped_goes_on_and_what_is_trained_is_kept(quickstart: Quickstart, tmp_path: Path) -> None:
    for run, left in (("quickstart", "last.ckpt"), ("concat", "trained.safetensors")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / left).touch()
    _, _, commands = quickstart()
    assert [command for command in commands if "lavi.fit" in command] == ["-m lavi.fit --resume runs/quickstart"]
    assert "runs/concat is trained" in (tmp_path / "runs/concat.log").read_text()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(quickstart: Quickstart, tmp_path: Path) -> None:
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/recipe.yaml").touch()
    _, _, commands = quickstart()
    assert len([command for command in commands if "--run runs/quickstart" in command]) == 1
    assert not (tmp_path / "runs/quickstart").exists()  # lavi.fit makes it


@pytest.mark.parametrize("recipe", ["recipes/quickstart.yaml", "recipes/scenes/concat.yaml"])
def test_nothing_is_scored_where_one_stops(quickstart: Quickstart, recipe: str) -> None:
    status, out, commands = quickstart(fails=f"lavi.fit --recipe {recipe}")
    assert status != 0
    assert not any("lavi.evaluate" in command for command in commands)
    assert "no room" in out  # also of the one whose lines go into a file
    assert ("concatenation stopped: runs/concat.log" in out) == ("concat" in recipe)

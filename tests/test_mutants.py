"""The measure of the tests: what can be changed, what is noticed, and that a run goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mutant_sources import mutants_of

SOURCE = '''"""A docstring."""
import math


@cached(size=1)
def larger(a: int = 3, b: "int | None" = None) -> int:
    assert b != 0
    if b is None:
        raise ValueError("no 7")
    return a if a >= b else b


def joined(parts, device):
    return zip(parts, zeros(2, device="cpu"), strict=True)


def moved(parts, device):
    return ordered(parts.to(device), reverse=False, key=joined)
'''


def test_what_is_for_the_reader_is_not_changed() -> None:
    mutants = mutants_of("larger", SOURCE, sample=1000, seed=0)
    assert {mutant.line for mutant in mutants} == {6, 8, 9, 10, 14, 18}
    changes = {(mutant.before, mutant.after) for mutant in mutants}
    assert ("return a if a >= b else b", "return a if a > b else b") in changes
    assert ("if b is None:", "if b is not None:") in changes
    assert ('raise ValueError("no 7")', "raise ValueError(None)") in changes
    assert not any("XX" in after or ("cpu" not in after and "zeros(" in after) for _, after in changes)
    assert all("strict=True" in after for _, after in changes if "zip(" in after)
    for mutant in mutants:
        lines = SOURCE.splitlines()
        changed = mutant.source.splitlines()
        assert lines[mutant.line - 1].strip() == mutant.before
        assert changed[mutant.line - 1].strip() == mutant.after
        assert [*lines[: mutant.line - 1], *lines[mutant.line :]] == [
            *changed[: mutant.line - 1],
            *changed[mutant.line :],
        ]


def test_what_no_test_can_notice_is_not_planted() -> None:
    """None is as false as False, and one device is the only one; all else of these calls is changed."""
    mutants = mutants_of("larger", SOURCE, sample=1000, seed=0)
    call = "return ordered({}, reverse={}, key={})"
    assert {mutant.after for mutant in mutants if mutant.line == 18} == {
        call.format("None", "False", "joined"),
        call.format("parts.to(device)", "True", "joined"),
        call.format("parts.to(device)", "False", "None"),
        "return ordered(reverse=False, key=joined)",
        "return ordered(parts.to(device), key=joined)",
        "return ordered(parts.to(device), reverse=False, )",
    }


def test_a_draw_depends_on_the_seed_alone() -> None:
    draws = [mutants_of("larger", SOURCE, sample=5, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 5
    assert set(draws[0]) < set(mutants_of("larger", SOURCE, sample=9, seed=0))


SMALL = """
def larger(a, b):
    return a if a >= b else b


def doubled(x):
    return 2 * x
"""
TESTS = """
import small

def test_larger():
    assert (small.larger(1, 2), small.larger(2, 1)) == (2, 2)

def test_doubled():
    assert small.doubled({value}) == 2 * {value}
"""
CONFIG = """
[modules]
small = "test_small.py"

[[equivalent]]
module = "small"
before = "return a if a >= b else b"
after = "return a if a > b else b"
why = "equal ones are equal"
"""


def test_faults_that_no_test_notices_are_listed_and_tried_again_when_tests_change(tmp_path: Path) -> None:
    def run() -> dict[str, object]:
        command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "mutants.py")]
        command += ["--config", "mutants.toml", "--work", "work", "--out", "out/record.jsonl"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return json.loads((tmp_path / "out" / "record.jsonl").read_text())

    work = tmp_path / "work" / "small.jsonl"
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "test_small.py").write_text(TESTS.format(value=0))
    (tmp_path / "mutants.toml").write_text(CONFIG)
    record = run()
    assert (record["mutants"], record["killed"], record["survived"], record["equivalent"]) == (5, 3, 1, 1)
    assert record["percent"] == 75.0
    survivors = {survivor["after"]: survivor["equivalent"] for survivor in record["survivors"]}  # type: ignore[attr-defined]
    assert survivors == {"return 3 * x": None, "return a if a > b else b": "equal ones are equal"}
    page = (tmp_path / "out" / "record_survivors.md").read_text()
    assert "line 7, not noticed\n\n```diff\n-return 2 * x\n+return 3 * x\n```" in page
    assert "equivalent: equal ones are equal" in page
    assert (tmp_path / "small.py").read_text() == SMALL

    tried = work.read_text()
    work.write_text(tried[: tried.rstrip("\n").rfind("\n") + 10])  # stopped in the middle of a line
    assert run()["killed"] == 3
    again = work.read_text()
    assert len(again.splitlines()) == 5
    assert again.startswith(tried[: tried.rstrip("\n").rfind("\n") + 1])  # the whole ones were kept

    (tmp_path / "test_small.py").write_text(TESTS.format(value=5))
    record = run()
    assert (record["killed"], record["survived"], record["equivalent"], record["percent"]) == (4, 0, 1, 100.0)
    assert work.read_text().startswith(again)


def test_tests_that_fail_by_themselves_measure_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "test_small.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    (tmp_path / "mutants.toml").write_text(CONFIG)
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "mutants.py"), "--config", "mutants.toml"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the tests of small fail without a mutant" in done.stderr
    assert "assert 1 == 2" in done.stderr
    assert not (tmp_path / "benchmarks").exists()

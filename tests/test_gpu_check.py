"""The plan of ``make gpu-check``: shares of the time, what is dropped, and what is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gpu_check import LIMIT, PLAN, ROOT, SUMMARY, Part, run_plan, summary_lines

from lavi.report import console, table

ECHO = ("-c", "print('a figure')")


def test_the_plan_fits_into_nine_minutes_and_its_commands_exist() -> None:
    assert sum(part.seconds for part in PLAN) <= LIMIT <= 540
    for part in PLAN:
        assert part.command[0] == "-m" or (ROOT / part.command[0]).is_file()


def test_a_part_has_its_share_and_what_the_ones_before_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Part("slow", 1.0, ("-c", "import time; print('begun', flush=True); time.sleep(60)"))
    fails = Part("fails", 5.0, ("-c", "import sys; print('why'); sys.exit(1)"))
    plan = (Part("quick", 5.0, ECHO), slow, fails)
    monkeypatch.setattr("gpu_check.LEAST", 0.5)
    lines = run_plan(plan, tmp_path, device="cpu", limit=12.0)
    assert [line.split(" after")[0] for line in lines if not line.startswith(" ")] == [
        "quick: done", "slow: stopped, its time was over", "fails: failed",
    ]  # fmt: skip
    assert "    a figure" in lines
    assert "    why" in lines
    assert (tmp_path / "slow.log").read_text() == "begun\n"


def test_the_summary_has_figures_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables end with a border, and notes stand below them."""
    console().print(table("A table", ["", "ms", "claim"], [["a", "1.25", "PASS (3x)"], ["b", "2.50", "-"]]))
    console().print("A note of 5 words below.")
    log = capsys.readouterr().out
    assert [["1.25" in line, "PASS" in line] for line in summary_lines(log, 1)] == [[True, True]]
    assert [("1.25" in line, "2.50" in line) for line in summary_lines(log.replace("PASS", "yes"), 2)] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert summary_lines(log + "\nOSError: why\n", 1, failed=True) == ["OSError: why"]
    console().print(table("Estimated", ["", "claim"], [[str(n), "PASS (3x, estimated)"] for n in range(9)]))
    log += capsys.readouterr().out
    assert ["1.25" in line for line in summary_lines(log, 2)] == [True, False]  # measured ones, whatever comes behind
    console().print(table("Steps", ["", "ms"], [["bare", "1"], ["LaVi", "2"], ["one", "3"], ["other", "4"]]))
    assert "LaVi" in summary_lines(capsys.readouterr().out, 1)[0]
    assert 1 + sum(1 + part.lines for part in PLAN) <= SUMMARY


def test_what_there_is_no_time_for_is_dropped(tmp_path: Path) -> None:
    lines = run_plan((Part("late", 10.0, ECHO),), tmp_path, device="cpu", limit=1.0)
    assert lines == ["late: dropped, no time was left"]
    assert not list(tmp_path.iterdir())


def test_records_go_where_they_are_asked_for(tmp_path: Path) -> None:
    part = Part("writes", 20.0, ("-c", "import sys; print(sys.argv[1:])", "--out", "OUT"), small=("--small",))
    lines = run_plan((part,), tmp_path, device="cpu", limit=30.0)
    assert f"    {['--out', str(tmp_path / 'writes.jsonl'), '--small']}" in lines
    lines = run_plan((part,), tmp_path, device="cuda", limit=30.0)
    assert f"    {['--out', str(tmp_path / 'writes.jsonl')]}" in lines
    assert len(lines) <= SUMMARY
    assert sys.executable

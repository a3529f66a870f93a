"""What a run says of itself: how far it is, in any encoding, without noise."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from conftest import ask, collate
from rich.console import Console

from datamodules.inspect import _bars
from lavi import report
from lavi.cli import output
from lavi.fusion.concat import ConcatFusion
from lavi.report import EVERY, FIRST, PATIENCE, Lines, duration, progress, table, track
from lavi.training.startup import as_trained


class Clock:
    """Time that passes only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def written(lines: Lines) -> list[str]:
    """The lines so far."""
    stream = lines.console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


def lines_on(clock: Clock, **settings: object) -> Lines:
    console = Console(file=io.StringIO(), width=40)  # a line is never wrapped
    return Lines("training", console=console, clock=clock, **settings)  # type: ignore[arg-type]


def work(lines: Lines, clock: Clock, *, until: int, seconds: float) -> None:
    """Go on with items that take so long each; the thread looks twice a second."""
    while lines.done < until:
        for _ in range(int(2 * seconds)):
            clock.now += 0.5
            lines.look()
        clock.now += seconds % 0.5
        lines.update(lines.done + 1)


def test_a_line_says_how_far_how_fast_and_how_long() -> None:
    clock = Clock()
    lines = lines_on(clock, total=300, unit="step", note=lambda: "loss 1.234")
    work(lines, clock, until=120, seconds=0.5)
    assert written(lines)[0] == "training: step 6 of 300, 2.0 steps/s, loss 1.234, 2 min 27 s left"
    assert written(lines)[-1] == "training: step 106 of 300, 2.0 steps/s, loss 1.234, 1 min 37 s left"


@pytest.mark.parametrize("seconds", [0.01, 1.0, 7.0, 45.0, 400.0])
def test_a_line_comes_soon_and_at_least_every_thirty_seconds(seconds: float) -> None:
    clock = Clock()
    spoken = [clock.now]
    lines = lines_on(clock)
    say = lines.console.print
    lines.console.print = lambda *a, **k: (spoken.append(clock.now), say(*a, **k))  # type: ignore[method-assign]
    work(lines, clock, until=max(1, int(900 / seconds)), seconds=seconds)
    spoken.append(clock.now)
    gaps = [after - before for before, after in itertools.pairwise(spoken)]
    assert max(gaps) <= 30
    assert min(gaps[1:-1]) >= EVERY  # and not more often than anyone reads
    if seconds <= FIRST:
        assert gaps[0] <= FIRST + seconds


def test_of_an_unknown_total_no_end_is_told() -> None:
    clock = Clock()
    lines = lines_on(clock, unit="sample")
    work(lines, clock, until=1300, seconds=0.25)
    assert written(lines)[-1] == "training: sample 1,292, 4.0 samples/s"


def test_rates_are_of_late_and_the_items_of_an_earlier_run_are_none_of_them() -> None:
    clock = Clock()
    lines = lines_on(clock, total=2000, done=1000)
    work(lines, clock, until=1100, seconds=1.0)
    assert "1.0/s" in written(lines)[-1]
    work(lines, clock, until=1600, seconds=0.25)
    lines.say()
    assert written(lines)[-1] == "training: 1,600 of 2,000, 4.0/s, 1 min 40 s left"


def test_a_slow_first_step_is_in_no_rate() -> None:
    clock = Clock()
    lines = lines_on(clock, total=100, unit="step")
    clock.now += 60
    lines.warmed_up(1)
    assert written(lines) == ["training: step 1 of 100"]
    work(lines, clock, until=20, seconds=1.0)
    assert written(lines)[-1] == "training: step 11 of 100, 1.0 steps/s, 1 min 29 s left"


def test_a_pause_is_in_the_time_left_and_not_in_the_rate() -> None:
    clock = Clock()
    lines = lines_on(clock, total=400, unit="step")
    work(lines, clock, until=100, seconds=1.0)
    before = len(written(lines))
    lines.pace.pause()
    for _ in range(200):
        clock.now += 0.5
        lines.look()
    lines.pace.resume(lines.done)
    assert len(written(lines)) == before  # whoever is at work speaks
    work(lines, clock, until=105, seconds=1.0)
    lines.say()
    assert "step 105 of 400, 1.0 steps/s" in written(lines)[-1]
    work(lines, clock, until=200, seconds=1.0)
    lines.say()
    # One validation of 100 s for each 200 steps of 1 s: 200 more steps take 300 s.
    assert written(lines)[-1] == "training: step 200 of 400, 1.0 steps/s, 5 min 0 s left"


def test_what_ends_by_the_clock_says_so() -> None:
    clock = Clock()
    lines = lines_on(clock, total=10_000, deadline=lambda: 2000 - clock.now)
    work(lines, clock, until=12, seconds=1.0)
    assert written(lines)[-1].endswith("16 min 37 s left")
    lines.total = 20
    lines.say()
    assert written(lines)[-1].endswith("1.0/s, 8 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.3, "under 1 s"),
        (26.4, "26 s"),
        (59.7, "1 min 0 s"),
        (86, "1 min 26 s"),
        (7500, "2 h 5 min"),
        (3 * 86400 + 4 * 3600 + 59, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lines on")]


@pytest.fixture
def only_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(report, "FIRST", float("inf"))


@pytest.mark.usefixtures("only_last_lines")
def test_lines_end_with_the_work_however_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), "counting", unit="batch")) == [0, 1, 2]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert out[0].startswith("counting: batch 3 of 3, ")
    assert out[0].endswith("in all")

    def read() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    def divide() -> None:
        for number in track([2, 1, 0], "dividing"):
            assert [thread.daemon for thread in watching()] == [True]  # it keeps no process alive
            _ = 1 / number

    def pack() -> None:
        with progress("packing", total=9) as update:
            update(3)
            raise OSError

    with pytest.raises(KeyboardInterrupt):
        list(track(read(), "reading"))
    with pytest.raises(ZeroDivisionError):
        divide()
    with pytest.raises(OSError):
        pack()
    for _ in track([1, 2], "leaving"):
        break
    assert watching() == []
    assert capsys.readouterr().out == ""  # no line says that it was done


def test_a_listener_that_is_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("gone")

    clock = Clock()
    lines = Lines("training", console=Console(file=Gone()), clock=clock)
    clock.now += FIRST + PATIENCE
    lines._ended.wait = lambda seconds: False  # type: ignore[method-assign,assignment]
    lines._watch()  # ends by itself


def test_a_quiet_console_gets_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines("training", total=3, console=Console(quiet=True)) as lines:
        lines.say()
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    shown = Console(file=Terminal())
    assert report.has_bars(shown)
    monkeypatch.setattr(report, "console", lambda: shown)
    list(track(range(3), "counting [/red] :smile:"))  # a file's name is no markup
    drawn = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "counting [/red] :smile:" in drawn
    assert "3/3" in drawn
    assert "in all" not in drawn
    monkeypatch.setenv("TERM", "dumb")
    assert not report.has_bars(Console(file=Terminal()))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a log in colours is a log
    assert not report.has_bars(Console(file=io.StringIO()))


# --- any encoding -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Standard output in an encoding, as a command has it; gives what it came to."""

    def open_as(encoding: str) -> io.BytesIO:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        with warnings.catch_warnings():
            output.prepare_output()
        return raw

    return open_as


TEXT = "naïve … 你好 “x” \ud800"


@pytest.mark.usefixtures("only_last_lines")
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", rb'na\xefve ... \u4f60\u597d "x" \ud800'),
        ("latin-1", b'na\xefve ... \\u4f60\\u597d "x" \\ud800'),
        ("utf-8", TEXT[:-1].encode() + rb"\ud800"),
    ],
)
def test_any_text_can_be_written(stdout, encoding: str, text: bytes) -> None:  # type: ignore[no-untyped-def]
    raw = stdout(encoding)
    sys.stdout.write(f"{TEXT}\n")
    assert raw.getvalue() == text + b"\n"
    report.console().print(TEXT)
    report.console().print(table(TEXT, ["key", "number"], [[TEXT, "1"]]))
    list(track([1], TEXT))
    assert raw.getvalue().count(text) == 5


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_and_bars_are_ascii_where_nothing_else_can_be_shown(stdout, encoding: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    raw = stdout(encoding)
    report.console().print(table("title", ["key", "number"], [["a", "1"]]))
    report.console().print(_bars("pixels", {"< 16": 3, "< 32": 6}))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    list(track([1, 2], "counting"))
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode("ascii"))
    assert "\\x" not in drawn
    assert "\\u" not in drawn
    assert "| a" in drawn
    assert "#" * 40 in drawn
    assert "counting -" in drawn


def test_texts_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    report.console().print(table("broken", ["key", "times"], [["a[/b] :smile:", "2"]]))
    report.console().print("run folder: runs/[red]x")
    out = capsys.readouterr().out
    assert "a[/b] :smile:" in out
    assert "runs/[red]x" in out


def test_a_narrow_table_cuts_nothing_off() -> None:
    console = Console(file=io.StringIO(), width=24)
    console.print(table("t", ["key", "number"], [["a" * 30, "1,234,567,890"]]))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in drawn
    assert drawn.count("a") == 30


# --- other libraries --------------------------------------------------------------------------------------------------


def heard(category: type[Warning], module: str, message: str) -> bool:
    """Whether a warning comes through after a command began."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output.prepare_output()
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    return bool(caught)


def test_what_means_nothing_is_kept_out_and_all_else_comes_through() -> None:
    leaf = "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec)`"
    pytree = "lightning.pytorch.utilities._pytree"
    assert not heard(FutureWarning, pytree, leaf)
    assert heard(FutureWarning, "my.module", leaf)
    assert heard(FutureWarning, pytree, "something else is deprecated")
    resting = "Found 32 module(s) in eval mode at the start of training. This may lead to unexpected behavior"
    loop = "lightning.pytorch.loops.fit_loop"
    assert not heard(UserWarning, loop, resting)
    assert heard(UserWarning, loop, "The number of training batches (3) is smaller than the logging interval")
    assert heard(RuntimeWarning, loop, resting)
    result = "lightning.pytorch.trainer.connectors.logger_connector.result"
    for name, comes_through in (("val/accuracy", False), ("val/family/colour", False), ("val/mine", True)):
        advice = f"It is recommended to use `self.log('{name}', ..., sync_dist=True)` when logging on epoch level"
        assert heard(UserWarning, result, advice) == comes_through


def test_bars_of_other_libraries_show_where_they_last() -> None:
    """Such as "Loading weights" of a file of a megabyte, which would be gone before it is read."""
    code = (
        "import lavi.cli.output as o; o.prepare_output(); from tqdm.auto import tqdm; bar = tqdm(range(3)); list(bar)"
    )
    code += "; assert bar.delay == float(o.BAR_DELAY) > 1"
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_DELAY"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


# --- before the first step --------------------------------------------------------------------------------------------


def test_a_conversation_as_trained_shows_whole_characters(build) -> None:  # type: ignore[no-untyped-def]
    """Of which each is several tokens here."""
    model = build(ConcatFusion())
    batch = collate(model, [ask("ça va ", 1, " 你好?", answer="très bien")])
    console = Console(file=io.StringIO(), width=200)
    console.print(as_trained(model, [batch]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ça va [image]  你好?" in shown
    assert "très bien" in shown

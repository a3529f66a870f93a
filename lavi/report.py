"""Tables, and how far a piece of work is: for a terminal, a log or a pipe."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import length_hint
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
FIRST = 3.0
"""Seconds after which a log has its first line on a piece of work."""
EVERY = 10.0
"""Seconds between two lines, as long as the work goes on; where one item takes longer, ``PATIENCE`` more."""
PATIENCE = 10.0
REMEMBERED = 4
"""Lines that a rate is taken over."""


def console() -> Console:
    """Where output goes; wide enough for tables where that is no terminal. Texts are shown as they are: no markup."""
    shown = Console(markup=False, emoji=False)
    return shown if shown.is_terminal else Console(markup=False, emoji=False, width=180)


def has_bars(shown: Console) -> bool:
    """Whether a bar can move there; a log, a pipe and a dumb terminal get lines."""
    return shown.is_interactive and shown.file.isatty()


# --- how far a piece of work is ---------------------------------------------------------------------------------------


def track(items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """The items, while a bar or lines show how many are through, of how many where that is known."""
    with progress(description, total=total if total is not None else length_hint(items) or None, unit=unit) as update:
        for done, item in enumerate(items, start=1):
            yield item
            update(done)


@contextmanager
def progress(
    description: str, *, total: int | None = None, done: int = 0, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show how far some work is: a bar that is gone at the end in a terminal, lines elsewhere.

    Args:
        total: items; None if nobody knows.
        done: items that an earlier run has done.
        unit: what one item is called.

    Yields:
        A function to call with the number of items that are done.
    """
    shown = console()
    if not has_bars(shown):
        with Lines(description, total=total, done=done, unit=unit, console=shown) as lines:
            yield lines.update
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=shown) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda number: bar.update(task, completed=number)


class Pace:
    """How fast some work goes, and how long it will go on.

    A rate is over the last few marks. What a pause took is no part of it, but comes again in the time that is left.
    """

    def __init__(self, done: int, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.restart(done)

    def restart(self, done: int) -> None:
        """Count from here: what came before was slow for once."""
        self._began, self._rested = self.clock(), 0.0
        self._paused: float | None = None
        self._first = (self._began, done)
        self._marks = deque([self._first], maxlen=REMEMBERED)

    def mark(self, done: int) -> None:
        """So many items are done by now."""
        if done != self._marks[-1][1]:
            self._marks.append((self.clock(), done))

    def pause(self) -> None:
        """Other work comes in between."""
        self._paused = self.clock()

    def resume(self, done: int) -> None:
        """Go on after a pause."""
        if self._paused is not None:
            self._rested += self.clock() - self._paused
            self._paused = None
            self._marks = deque([(self.clock(), done)], maxlen=REMEMBERED)

    @property
    def paused(self) -> bool:
        return self._paused is not None

    def rate(self, done: int) -> float:
        """Items a second, lately."""
        since, before = self._marks[0]
        return (done - before) / max(1e-9, self.clock() - since)

    def mean_rate(self, done: int) -> float:
        """Items a second, from the start."""
        return (done - self._first[1]) / max(1e-9, self.clock() - self._began - self._rested)

    def seconds_left(self, done: int, total: int | None) -> float | None:
        """Until all are done; None if nobody can know."""
        rate = self.rate(done)
        if not total or rate <= 0:
            return None
        passed = self.clock() - self._began
        return max(0, total - done) / rate * passed / max(1e-9, passed - self._rested)


class Lines:
    """Lines on how far some work is, such as ``training: step 120 of 300, 2.1 steps/s, loss 1.234, 1 min 26 s left``.

    :meth:`update` says one when it is time; where one item takes long, a thread does. Used in a ``with``, which ends
    with a last line unless an exception ends it.

    Args:
        total: items; None if nobody knows.
        done: items that an earlier run has done.
        unit: what one item is called.
        note: gives what else a line says (``loss 1.234``); called by :meth:`say` and :meth:`update` only.
        deadline: gives the seconds until the work ends however far it is, or None.
    """

    def __init__(
        self,
        description: str,
        *,
        total: int | None = None,
        done: int = 0,
        unit: str = "",
        note: Callable[[], str] = str,
        deadline: Callable[[], float | None] = lambda: None,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.done, self.unit = description, total, done, unit
        self.note, self.deadline, self.console, self.clock = note, deadline, console, clock
        self.pace = Pace(done, clock)
        self.first, self.printed = done, 0
        self._began = clock()
        self._next = self._began + FIRST
        self._noted = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"lines on {description}", daemon=True)

    def __enter__(self) -> Lines:
        self.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.stop()
        if kind is None:
            self.say(last=True)

    def start(self) -> None:
        """Begin to look after the work."""
        self._thread.start()

    def stop(self) -> None:
        """Look after it no more."""
        self._ended.set()
        self._thread.join()

    def update(self, done: int) -> None:
        """So many items are done."""
        self.done = done
        if self.clock() >= self._next:
            self.say()

    def warmed_up(self, done: int) -> None:
        """So many items are done, with more time than they take from now on; say so."""
        self.done = done
        self.pace.restart(done)
        self.say()

    def say(self, *, last: bool = False) -> None:
        """Say a line now."""
        self._noted = self.note()
        self._print(last=last)

    def look(self) -> None:
        """Say a line if none has come for so long that one item must be taking its time."""
        if self.clock() >= self._next + PATIENCE and not self.pace.paused:
            self._print()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            try:
                self.look()
            except (OSError, ValueError):  # nobody reads any more: whoever does the work will notice
                return

    def _print(self, *, last: bool = False) -> None:
        with self._lock:
            self.console.print(self._line(last=last), soft_wrap=True, highlight=False)
            self.pace.mark(self.done)
            self._next = self.clock() + EVERY
            self.printed += 1

    def _line(self, *, last: bool) -> str:
        of = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.unit} {self.done:,}{of}".lstrip()]
        rate = self.pace.mean_rate(self.done) if last else self.pace.rate(self.done)
        if rate > 0:
            parts.append(f"{_number(rate)}{f' {_plural(self.unit)}' if self.unit else ''}/s")
        if self._noted:
            parts.append(self._noted)
        ends = (self.pace.seconds_left(self.done, self.total), self.deadline())
        if last:
            parts.append(f"{duration(self.clock() - self._began)} in all")
        elif known := [end for end in ends if end is not None]:
            parts.append(f"{duration(min(known))} left")
        return f"{self.description}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """``under 1 s``, ``26 s``, ``1 min 26 s``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s" if whole else "under 1 s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers; where it is narrow, nothing is cut off."""
    grid = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def metrics_table(metrics: Mapping[str, Any], *, title: str) -> Table:
    """What a trainer measured last, one metric a line."""
    rows = [[name, f"{float(value):.4g}"] for name, value in sorted(metrics.items()) if not name.endswith("_step")]
    return table(title, ["metric", "value"], rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table

Item = TypeVar("Item")


def console() -> Console:
    """The terminal; wide enough for tables where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=180)


def track(items: Iterable[Item], description: str, *, total: float | None = None) -> Iterator[Item]:
    """The items, with a progress bar that is gone when they are through."""
    yield from progress.track(items, description=description, total=total, transient=True, console=console())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def metrics_table(metrics: Mapping[str, Any], *, title: str) -> Table:
    """What a trainer measured last, one metric a line."""
    rows = [[name, f"{float(value):.4g}"] for name, value in sorted(metrics.items()) if not name.endswith("_step")]
    return table(title, ["metric", "value"], rows)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

"""What each change for the clock did, before and after: from the records of the benchmarks that time both ways.

    python benchmarks/changes.py          after train_step.py, cached_features.py, gather.py, decode.py and norm.py

Both ways of a row were timed in turns in one run. A change that does not pay where it was timed stands here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lavi.cli.arguments import Parser
from lavi.cli.entry import cli_entry_point
from lavi.report import console, table

RESULTS = Path(__file__).parent / "results"
PAYS = 0.98
"""The most that the time behind a change may be of that before it, to be called faster."""


class Change(NamedTuple):
    """What was changed, where it was timed, and the figure before and after."""

    name: str
    of: str
    before: float
    after: float


def records_of(benchmark: str) -> list[dict[str, Any]]:
    """The records of a benchmark; none if it has not run."""
    file = RESULTS / f"{benchmark}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def changes() -> Iterator[Change]:
    """All that were timed."""
    if records := records_of("train_step"):
        before, after = records
        width = f"{before['vocabulary']:,} words, width {before['width']}"
        yield Change("logits where they are trained", f"ms, {width}", before["milliseconds"], after["milliseconds"])
        yield Change("logits where they are trained", f"peak MiB, {width}", before["peak_mib"], after["peak_mib"])
    if records := records_of("cached_features"):
        before, after = records
        of = f"ms a step of {before['batch_size']}, SigLIP-so400m's shape"
        yield Change("a frozen tower's features, once", of, before["milliseconds"], after["milliseconds"])
    if records := records_of("gather"):
        before, after = records
        of = f"ms, {before['rows']} x {before['tokens']} of width {before['width']}, forward and backward"
        yield Change("rows gathered without an index", of, before["milliseconds"], after["milliseconds"])
    of_way = {(r["layers"], r["width"], r["fusion"], r["way"]): r["milliseconds"] for r in records_of("decode")}
    for (layers, width, fusion, way), after_ms in of_way.items():
        if way == "compiled":
            of = f"ms, {fusion}, {layers} layers, {width} wide"
            yield Change("a decode step as one graph", of, of_way[layers, width, fusion, "eager"], after_ms)
    of_norm = {(r["way"], r["stage"]): r for r in records_of("norm")}
    for (way, stage), record in of_norm.items():
        if way == "with deltas, one operator":
            of = f"ms, {record['tokens']:,} tokens of {record['width']}, {stage}"
            before = of_norm["with deltas", stage]["milliseconds"]
            yield Change("a norm and its deltas at once", of, before, record["milliseconds"])


def changes_table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["change", "of", "before", "after", "after / before", "pays"]
    rows = []
    for change in changes():
        share = change.after / change.before
        figures = [f"{value:,.1f}" for value in (change.before, change.after)]
        rows.append([change.name, change.of, *figures, f"{share:.2f}", "yes" if share <= PAYS else "no"])
    return columns, rows


@cli_entry_point
def main() -> None:
    Parser(description=__doc__).read()
    devices = sorted({record["device"] for name in ("train_step", "decode", "norm") for record in records_of(name)})
    console().print(table(f"Before and after; {', '.join(devices)}", *changes_table()))


if __name__ == "__main__":
    main()

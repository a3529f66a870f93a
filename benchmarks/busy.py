"""Do ratios of times hold on a machine that has other things to do?

    make busy      (or: python benchmarks/busy.py --out benchmarks/results/busy.jsonl)

The quickstart's model and its concatenation twin are timed as ``lavi.profile --measure`` and ``lavi.evaluate`` do it,
first on the machine as it is, then beside two processes that do nothing but compute. Each ratio of the second table is
to be within 25 % of the first's, or said to be noisy; the exit status is 1 if one is neither. The machine should have
nothing else to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.comparison import ratio_cell
from lavi.efficiency.estimate import NOISE, NOTE
from lavi.efficiency.figures import line_name
from lavi.efficiency.latency import TURNS
from lavi.efficiency.record import Record, check_writable, write_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import Sweep, sweep_records, with_baseline
from lavi.recipe import Recipe
from lavi.report import console, table, track

ROOT = Path(__file__).parent.parent
OTHERS = max(2, os.cpu_count() or 2)
"""Processes that keep the machine busy."""
STAGES = ("vision_encoder", "first_token", "prefill", "decode")


@contextmanager
def other_processes(number: int) -> Iterator[None]:
    """Other processes that compute without end, as long as it holds."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def timed(recipe: Recipe, device: torch.device, runs: int, load: str) -> list[Record]:
    """The model and its concatenation twin at one prompt."""
    bar = partial(track, description=f"{load} machine")
    sweep, prompt = Sweep.parse("visual_tokens=64"), Scenario(text=18)
    records = list(sweep_records(with_baseline([recipe]), sweep, prompt, device=device, runs=runs, track=bar))
    for record in records:
        record.knobs["load"] = load
    return records


def busy_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each ratio on the quiet and on the busy machine, and whether they agree."""
    quiet, busy = ([record for record in records if record.knobs["load"] == load] for load in ("quiet", "busy"))
    columns = ["method", "ratio", "quiet", f"beside {OTHERS} processes", "busy / quiet", "verdict"]
    rows = []
    for before, after in zip(quiet, busy, strict=True):
        for to, what in (("floor", "the floor"), ("concat", "concatenation")):
            for stage in STAGES:
                cells = [ratio_cell(record, to, stage) for record in (before, after)]
                if cells != ["-", "-"]:
                    label = f"{stage.replace('_', ' ')}, times {what}"
                    rows.append([line_name(before), label, *cells, *verdict(before, after, to, stage)])
    return columns, rows


def verdict(quiet: Record, busy: Record, to: str, stage: str) -> tuple[str, str]:
    """How far the ratio of the busy machine is from that of the quiet one, and whether that is near enough."""
    before, after = quiet.ratio(to, stage), busy.ratio(to, stage)
    if before is None or after is None:
        return "-", "not measured"
    if before.noisy or after.noisy:
        return "-", "noisy"
    change = after.median / before.median
    return f"{change:.2f}", "holds" if abs(change - 1) <= NOISE else "APART"


@cli_entry_point
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    parser.add_argument("--runs", type=whole_number(1), default=TURNS, help="timed turns of each stage")
    args = parser.read()
    if args.out:
        check_writable(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a prompt of no meaning"], Path(folder))
        recipe = Recipe.load(ROOT / "recipes" / "quickstart.yaml", [f"model.language.tokenizer={folder}"])
        recipe.source = "recipes/quickstart.yaml"
        records = timed(recipe, device, args.runs, "quiet")
        with other_processes(OTHERS):
            records += timed(recipe, device, args.runs, "busy")
    if args.out:
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)
    columns, rows = busy_table(records)
    console().print(table(f"Ratios of times; {records[0].device}", columns, rows))
    for load in ("quiet", "busy"):
        waited = max(record.waited for record in records if record.knobs["load"] == load)
        print(f"{load}: other processes had the cores {waited:.0%} of the time")
    print(NOTE)
    return int(any(row[-1] in ("APART", "not measured") for row in rows))


if __name__ == "__main__":
    main()

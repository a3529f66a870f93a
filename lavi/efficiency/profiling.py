"""Sweeps over recipes, shown on the terminal and kept in a folder: what ``python -m lavi.profile`` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lavi.efficiency import record, report
from lavi.efficiency.point import Scenario
from lavi.efficiency.record import Record
from lavi.efficiency.sweep import Sweep, run, with_baseline
from lavi.errors import UserError
from lavi.recipe import Recipe
from lavi.report import console, track


def profile(
    recipes: Sequence[Recipe],
    sweeps: Sequence[str],
    *,
    at: str,
    text: int,
    measure: bool,
    runs: int,
    out: Path | None,
) -> list[Record]:
    """Run the sweeps one after the other.

    Args:
        at: the scenario where a sweep turns another knob (``image=640x480``).
        text: tokens of the prompt.
        measure: take time and memory on the device in use.
        out: a folder for ``records.jsonl``, ``records.csv``, ``KNOB.png`` and TensorBoard's files.

    Raises:
        UserError: a sweep that cannot be read or that a model cannot take, or ``out`` exists.
    """
    parsed = [Sweep.parse(sweep) for sweep in sweeps]
    base = fixed(at, text)
    if out is not None and out.exists():
        raise UserError(f"{out} exists and is left as it is: choose another folder for --out.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if measure else None
    everything = []
    for sweep in parsed:
        bar = partial(track, description=f"profiling over {sweep.knob}")
        records = []
        for made in run(with_baseline(recipes), sweep, base, device=device, runs=runs, track=bar):
            records.append(made)
            if out is not None:  # at once: nothing is lost on a kill
                out.mkdir(parents=True, exist_ok=True)
                record.write([made], out / "records.jsonl")
        console().print(report.sweep_table(records))
        if out is not None:
            report.draw(records, out / f"{sweep.knob}.png")
            report.write_curves(records, out)
            report.write_savings(records, out)
        everything += records
    if out is not None:
        report.write_csv(everything, out / "records.csv")
        console().print(f"records, spreadsheet, pictures and curves: {out}   (tensorboard --logdir {out})")
    return everything


def fixed(at: str, text: int) -> Scenario:
    """The scenario that ``KNOB=VALUE`` names."""
    sweep = Sweep.parse(at)
    if sweep.knob not in ("visual_tokens", "image", "frames") or len(sweep.values) != 1:
        raise UserError(f"what is seen is one of visual_tokens=N, image=WIDTHxHEIGHT or frames=N, not '{at}'.")
    return sweep.scenario(sweep.values[0], Scenario(text=text))

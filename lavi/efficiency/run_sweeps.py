"""Sweeps over recipes, shown on the terminal and written into a folder: what ``python -m lavi.profile`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lavi.efficiency import figures
from lavi.efficiency.estimated import training_rows
from lavi.efficiency.hardware import device_named
from lavi.efficiency.latency import half_the_threads
from lavi.efficiency.measure import check_not_quantized
from lavi.efficiency.record import Record, write_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import Sweep, name_of, sweep_records, with_baseline, with_own_names
from lavi.errors import UserError
from lavi.recipe import Recipe
from lavi.report import console, table, track


def run_sweeps(
    recipes: Sequence[Recipe],
    sweeps: Sequence[str],
    *,
    at: str,
    text: int,
    measure: bool,
    runs: int,
    out: Path | None,
    estimate: Sequence[str] = (),
) -> list[Record]:
    """Run the sweeps one after the other.

    Args:
        at: the scenario where a sweep turns another knob (``image=640x480``).
        text: tokens of the prompt.
        measure: take time and memory on the device in use.
        estimate: devices whose time is estimated, and the memory (:func:`lavi.efficiency.hardware.device_named`).
        out: a folder for ``records.jsonl``, ``records.csv``, ``KNOB.png`` and TensorBoard's files.

    Raises:
        UserError: a sweep that cannot be read or that a model cannot take, or an ``out`` that exists or cannot
            be created: all before the first sweep begins.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists and is left as it is: choose another folder for --out.")
    with half_the_threads(torch.device("cpu")):  # as what is measured beside
        devices = [device_named(name) for name in estimate]
    parsed, base = [Sweep.parse(sweep) for sweep in sweeps], parse_scenario(at, text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if measure else None
    against = with_baseline(recipes)
    for recipe in against if measure or devices else ():
        check_not_quantized(recipe)
    planned = []
    for sweep in parsed:
        bar = partial(track, description=f"profiling over {sweep.knob}")
        planned.append(sweep_records(against, sweep, base, device=device, runs=runs, track=bar, estimate=devices))
    if out is not None:
        _create_folder(out)
    everything = []
    for sweep, upcoming in zip(parsed, planned, strict=True):
        records = []
        for record in upcoming:
            records.append(record)
            if out is not None:  # at once: nothing is lost on a kill
                write_records([record], out / "records.jsonl")
        for shown in figures.sweep_tables(records):
            console().print(shown)
        if out is not None:
            figures.draw_curves(records, out / f"{sweep.knob}.png")
            figures.write_curves(records, out)
            figures.write_savings(records, out)
        everything += records
    if out is not None:
        figures.write_csv(everything, out / "records.csv")
        console().print(f"records, spreadsheet, pictures and curves: {out}   (tensorboard --logdir {out})")
    return everything


def show_training(recipes: Sequence[Recipe], *, at: str, text: int, rows: int) -> None:
    """Print the memory of a training step of each recipe, estimated.

    Args:
        at: what each row shows, as in :func:`run_sweeps`.
        rows: of the batch of one rank.
    """
    scenario = replace(parse_scenario(at, text), batch=rows)
    for recipe in with_own_names(recipes):
        check_not_quantized(recipe)
        title = f"{name_of(recipe)}: GiB of a training step of {rows} x {scenario}, {text} text tokens; estimated"
        console().print(table(title, *training_rows(recipe, scenario)))
        precision = str(recipe.settings.get("trainer", {}).get("precision", ""))
        if precision.endswith("mixed"):
            console().print(
                f"Activations are estimated in the dtypes of the weights: trainer.precision={precision} keeps most of "
                "those of fp32 weights in half, and casts of the weights besides."
            )


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): choose another folder for --out.") from None


def parse_scenario(at: str, text: int) -> Scenario:
    """The scenario that ``KNOB=VALUE`` names."""
    sweep = Sweep.parse(at)
    if sweep.knob not in ("visual_tokens", "image", "frames") or len(sweep.values) != 1:
        raise UserError(f"--at is one of visual_tokens=N, image=WIDTHxHEIGHT or frames=N, not '{at}'.")
    return sweep.scenario(sweep.values[0], Scenario(text=text))

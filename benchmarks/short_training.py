"""Does training work on this device, and how fast? The quickstart's two recipes on a few scenes, each for some seconds.

    python benchmarks/short_training.py --out short_training.jsonl

In fp32 and, on a GPU, in bf16-mixed: steps a second, and what was learned of the easy question families. ``--small`` is
for a quick look.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from own_records import keep, parser_of, read

from datamodules.scenes import write_dataset
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.record import device_name
from lavi.errors import UserError
from lavi.evaluation.compare_runs import score_run
from lavi.recipe import Recipe
from lavi.report import console, table
from lavi.training.run import train

ROOT = Path(__file__).parent.parent
RECIPES = {"LaVi": "quickstart", "concatenation": "scenes/concat"}
STEPS, SCENES, QUESTIONS = 150, 4000, 400
SMALL_STEPS, SMALL_SCENES, SMALL_QUESTIONS = 2, 256, 16


def settings_of(file: str, data: Path, steps: int, precision: str) -> Recipe:
    """A recipe of the quickstart on these scenes, without pictures and times."""
    changes = [f"data.{split}={data / split}" for split in ("train", "validation", "test")]
    changes += [f"model.language.tokenizer={data / 'tokenizer'}", f"trainer.precision={precision}"]
    changes += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    changes += ["callbacks.samples=null", "callbacks.efficiency=null"]
    return Recipe.load(ROOT / "recipes" / f"{file}.yaml", changes)


def measure(device: torch.device, *, steps: int, scenes: int, questions: int) -> Iterator[dict[str, Any]]:
    """One record for each method and precision."""
    about = {"device": device_name(device), "torch": torch.__version__, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scenes"
        counts = {"train": scenes, "validation": 64, "test": questions}
        write_dataset(data, counts=counts, turns=4, seed=0, workers=1)
        for precision in ("32-true", "bf16-mixed") if device.type == "cuda" else ("32-true",):
            for method, file in RECIPES.items():
                recipe, run = settings_of(file, data, steps, precision), Path(folder) / f"{method}-{precision}"
                run.mkdir()
                began = time.perf_counter()
                if train(recipe, run):
                    raise UserError("stopped.")
                seconds = time.perf_counter() - began
                record = score_run(run, overrides=(), trust=False, limit=questions, device=device).record
                learned = {"easy": record.accuracy.get("level/easy"), "no image": record.controls["no image"]["all"]}
                yield about | {"method": method, "precision": precision, "rate": steps / seconds, **learned}


def training_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["method", "precision", "steps", "steps a second, starting included", "easy %", "without images %"]
    rows = [
        [r["method"], r["precision"], str(r["steps"]), f"{r['rate']:.1f}", f"{r['easy']:.1f}", f"{r['no image']:.1f}"]
        for r in records
    ]
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps")
    args = read(parser)
    steps, scenes, questions = STEPS, SCENES, QUESTIONS
    if args.small:
        steps, scenes, questions = SMALL_STEPS, SMALL_SCENES, SMALL_QUESTIONS
    records = keep(measure(device_of("auto"), steps=steps, scenes=scenes, questions=questions), args.out)
    console().print(table(f"Short trainings; {records[0]['device']}", *training_table(records)))


if __name__ == "__main__":
    main()

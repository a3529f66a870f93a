"""Train a recipe.

    python -m lavi.fit --recipe recipes/quickstart.yaml                      train; the run folder is runs/NAME
    python -m lavi.fit --recipe recipes/quickstart.yaml trainer.max_steps=50 change any key of the recipe
    python -m lavi.fit --resume runs/NAME                                    go on where a run stopped

Watch it with `tensorboard --logdir runs`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.errors import UserError, one_line

if TYPE_CHECKING:
    from lavi.recipe import Recipe


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m lavi.fit", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", type=path, metavar="FILE", help="the recipe to train")
    what.add_argument("--resume", type=path, metavar="RUN", help="a run folder to go on with")
    parser.add_argument(
        "--run", type=path, metavar="FOLDER", help="the run folder; must not exist (default: runs/NAME, numbered)"
    )
    parser.add_argument(
        "--save-every", type=whole_number(1), default=100, metavar="STEPS", help="steps between two checkpoints"
    )
    parser.add_argument("--trust", action="store_true", help="with --resume: build whatever the run's recipe names")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.read()
    if args.resume and args.run:
        parser.error("--run names a new folder, and --resume goes on in the old one")
    return args


@cli_entry_point
def main() -> int:
    args = arguments()
    from lavi.checkpoints import run_folder
    from lavi.recipe import Recipe

    if args.resume:
        resume_from = run_folder.resume_point(args.resume)
        run = resume_from.parent
        recipe = Recipe.load(run / run_folder.RECIPE, args.overrides, trusted=args.trust)
    else:
        resume_from = None
        recipe = Recipe.load(args.recipe, args.overrides)
        run = args.run or Path("runs") / recipe.settings.get("name", args.recipe.stem)
        if run_folder.is_first_rank():
            run = run_folder.new_run_folder(run, exact=args.run is not None)
    with run_folder.lock_run_folder(run):
        try:
            return train(recipe, run, resume_from, args.save_every)
        finally:
            if run_folder.is_first_rank():
                run_folder.remove_unused(run)


def train(recipe: Recipe, run: Path, resume_from: Path | None, save_every: int) -> int:
    """Build everything, show what is about to happen, train, show what came of it."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from rich.syntax import Syntax

    from lavi import report
    from lavi.checkpoints import model_folder, run_folder
    from lavi.checkpoints.curves import Curves
    from lavi.checkpoints.keep_run import KeepRun
    from lavi.model import VisionLanguageModel
    from lavi.training import startup

    first = run_folder.is_first_rank()
    resumed_step = run_folder.step_of(resume_from) if resume_from else None
    logger = Curves(run, resumed_step=resumed_step)
    console = report.console()
    console.quiet = not first
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    console.print(Syntax(recipe.yaml(), "yaml", background_color="default"))
    recipe.build("trainer", logger=False, enable_checkpointing=False)  # what it refuses is said before the work
    pl.seed_everything(recipe.settings.get("seed", 0), workers=True, verbose=False)
    model = model_folder.build(recipe)
    if isinstance(model, VisionLanguageModel):
        recipe = model_folder.with_resolved_arguments(recipe, model)
    module = recipe.build("module", model=model)
    data = recipe.build("data", processor=model.processor)
    keep = KeepRun(run, recipe, every=save_every, resumed_step=resumed_step)
    callbacks = [keep, *recipe.build_callbacks()]
    wants_bar = recipe.settings["trainer"].get("enable_progress_bar", True)
    if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(startup.StepBar() if report.has_bars(console) else startup.StepLines(console))
    # The table of what trains says what Lightning's own does; a recipe may ask for that besides.
    summary = {} if "enable_model_summary" in recipe.settings["trainer"] else {"enable_model_summary": False}
    own = {"logger": logger, "default_root_dir": str(run), "enable_checkpointing": True}
    trainer: pl.Trainer = recipe.build("trainer", callbacks=callbacks, **own, **summary)
    console.print(startup.what_trains(module))
    if first and isinstance(model, VisionLanguageModel):
        console.print(startup.as_trained(model, data.stream("train")))
    console.print(f"run folder: {run}   (tensorboard --logdir {run.parent})")
    try:
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)  # of a pickle, nothing but tensors
    except (SystemExit, KeyboardInterrupt):
        console.print(keep.farewell(trainer), highlight=False)
        return 130 if first else 0  # the first rank is killed when another one ends with an error
    except MisconfigurationException as error:
        refused = UserError(f"the trainer refuses this run: {one_line(error)}.")
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from error
    console.print(report.metrics_table(trainer.callback_metrics, title=f"{run} after {trainer.global_step} steps"))
    return 0


if __name__ == "__main__":
    main()

"""One run: everything is built from the recipe, shown, trained, and its last figures are shown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.syntax import Syntax

from lavi.checkpoints.curves import Curves
from lavi.checkpoints.keep_run import KeepRun
from lavi.checkpoints.model_folder import build, with_resolved_arguments
from lavi.checkpoints.run_folder import is_first_rank, step_of
from lavi.data.data_module import DataModule
from lavi.errors import UserError, one_line
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.report import console, has_bars, metrics_table
from lavi.training.startup import StepBar, StepLines, as_trained, what_trains


@dataclass(frozen=True)
class Run:
    """What a recipe's run consists of."""

    module: pl.LightningModule
    data: Any
    trainer: pl.Trainer
    keep: KeepRun


def train(recipe: Recipe, folder: Path, *, resume_from: Path | None = None, save_every: int | None = None) -> int:
    """Train a recipe into a run folder.

    Args:
        resume_from: the checkpoint to go on from.
        save_every: steps between two checkpoints; None: as :class:`lavi.checkpoints.keep_run.KeepRun`.

    Returns:
        The exit status: 0, or 130 of a run that was stopped.
    """
    first, out = is_first_rank(), console()
    out.quiet = not first
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run = build_run(recipe, folder, resume_from, save_every, out)
    model = run.module.model
    out.print(what_trains(run.module))
    if first and isinstance(model, VisionLanguageModel):
        out.print(as_trained(model, run.data.stream("train")))
    out.print(f"run folder: {folder}   (tensorboard --logdir {folder.parent})")
    try:
        # Of a pickle, nothing but tensors and numbers is read.
        run.trainer.fit(run.module, run.data, ckpt_path=resume_from, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        out.print(run.keep.farewell(run.trainer), highlight=False)
        return 130 if first else 0  # the first rank is killed when another one ends with an error
    except MisconfigurationException as error:
        refusal = UserError(f"the trainer refuses this run: {one_line(error)}.")
        for note in getattr(error, "__notes__", ()):
            refusal.add_note(note)
        raise refusal from error
    title = f"{folder} after {run.trainer.global_step} steps"
    out.print(metrics_table(run.trainer.callback_metrics, title=title))
    return 0


def check_data(recipe: Recipe) -> None:
    """Refuse data that the model cannot be trained on; models of another kind take any data module of Lightning.

    Raises:
        UserError: the recipe's data are no data module, or validation data that would never be used.
    """
    recipe.check_validation()
    model = recipe.component("model")
    is_ours = not isclass(model) or issubclass(model, VisionLanguageModel)
    base = DataModule if is_ours else pl.LightningDataModule
    recipe.require("data", base, "derive the class from it" + (" and give it samples(split)" if is_ours else ""))


def build_run(recipe: Recipe, folder: Path, resume_from: Path | None, save_every: int | None, out: Console) -> Run:
    """Build model, module, data, callbacks and trainer of a recipe, which is printed first."""
    check_data(recipe)
    resumed_step = step_of(resume_from) if resume_from else None
    logger = Curves(folder, resumed_step=resumed_step)
    out.print(Syntax(recipe.yaml(), "yaml", background_color="default"))
    recipe.build("trainer", logger=False, enable_checkpointing=False)  # what it refuses is said before the work
    pl.seed_everything(recipe.settings.get("seed", 0), workers=True, verbose=False)
    model = build(recipe)
    if isinstance(model, VisionLanguageModel):
        recipe = with_resolved_arguments(recipe, model)
    module = recipe.build("module", model=model)
    data = recipe.build("data", processor=model.processor)
    keep = KeepRun(folder, recipe, every=save_every, resumed_step=resumed_step)
    # Last: what the recipe's own checkpoint callbacks did when a step ended belongs into the run's checkpoint of it;
    # what they do behind the validation of that step is in the next.
    settings, callbacks = recipe.settings["trainer"], [*recipe.build_callbacks(), keep]
    wants_bar = settings.get("enable_progress_bar", True)
    if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(StepBar() if has_bars(out) else StepLines(out))
    # The table of what trains says what Lightning's own does; a recipe may ask for that besides.
    summary = {} if "enable_model_summary" in settings else {"enable_model_summary": False}
    fixed = {"logger": logger, "default_root_dir": str(folder), "enable_checkpointing": True}
    return Run(module, data, recipe.build("trainer", callbacks=callbacks, **fixed, **summary), keep)

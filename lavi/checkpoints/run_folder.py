"""Run folders: created, locked while a run trains, removed if nothing was trained, opened again.

runs/name/recipe.yaml            the resolved recipe
          trained.safetensors    the weights that differ from the checkpoints that the recipe names; recipe, versions,
                                 and step in its header
          last.ckpt              Lightning's checkpoint (optimiser, schedule, position in the data) for --resume
          events.out.tfevents    TensorBoard
          run.lock               while a process trains into the folder

A checkpoint is written as *.part and replaces the one before it when it is on the disk.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lavi.checkpoints.model_folder import FUSION, RECIPE, build
from lavi.checkpoints.trained_weights import TRAINED, load_trained
from lavi.config.files import one_process
from lavi.config.paths import home_path
from lavi.errors import UserError, reason
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

log = logging.getLogger("lavi")

LAST, LOCK = "last.ckpt", "run.lock"


def is_first_rank() -> bool:
    """Whether this process writes and prints; launchers say it in the environment, before ranks know each other."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def new_run_folder(preferred: Path, *, exact: bool = False) -> Path:
    """Create a run folder; one that exists is never written into: refused if ``exact``, else the new one is numbered.

    Raises:
        UserError: ``exact`` and it exists; no folder can be created there.
    """
    folder, number = home_path(preferred), 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not _create(folder):  # looking first would leave a moment in which another run creates it
            if exact:
                goes_on = (folder / LAST).is_file()
                instead = f"go on with --resume {folder}" if goes_on else "remove it (it holds no checkpoint)"
                raise UserError(f"{folder} exists and is left as it is: choose another --run, or {instead}.")
            number += 1
            folder = home_path(preferred).with_name(f"{preferred.name}-{number}")
    except (OSError, ValueError) as error:
        raise UserError(f"no run folder can be created at {folder} ({reason(error)}): choose another --run.") from None
    return folder


def _create(folder: Path) -> bool:
    """Create a folder; False if it exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def remove_unused(run: Path) -> None:
    """Remove a run folder in which no training has begun: its name is free again when a mistake is mended."""
    if run.is_dir() and all(file.name.startswith((LOCK, "events.", "hparams.")) for file in run.iterdir()):
        shutil.rmtree(run, ignore_errors=True)


@contextmanager
def lock_run_folder(run: Path) -> Iterator[None]:
    """Keep other processes from training into a run folder; of several ranks the first holds it for all.

    Raises:
        Busy: another process trains into it.
        UserError: nothing can be written there.
    """
    if not is_first_rank():
        yield
        return
    busy = f"another process is training {run} at this moment: wait for it, or stop it first."
    with one_process(run / LOCK, busy=busy):
        yield


def load_run(
    folder: Path, *, overrides: list[str] | None = None, trust: bool = False
) -> tuple[Recipe, VisionLanguageModel]:
    """The recipe of a run, and its model with the trained weights, ready to answer.

    Raises:
        UserError: not a run folder, or its weights and its recipe do not belong together.
    """
    folder = home_path(folder)
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {RECIPE}.")
    if (folder / FUSION).is_file():
        raise UserError(
            f"{folder} is a model that lavi.export has written, whose {RECIPE} names no data and no training: give the "
            "run folder that it was exported from (lavi.generate and lavi.load take the model as it is)."
        )
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder} has no {TRAINED} yet: its run stopped before the first checkpoint.")
    recipe = Recipe.load(folder / RECIPE, overrides or [], trusted=trust)
    module: pl.LightningModule = recipe.build("module", model=build(recipe))
    load_trained(module, folder / TRAINED)
    return recipe, cast(VisionLanguageModel, module.eval().model)


def cannot_write(what: str, run: Path, failure: str) -> str:
    """The sentence of an error: ``what`` could not be written into the folder of ``run``."""
    if not run.is_dir():
        return f"{what} cannot be written: the run folder {run} has been removed."
    return f"{what} cannot be written into {run} ({failure}): make room there, or mend it."


def resume_point(folder: Path) -> Path:
    """The checkpoint that ``--resume`` goes on from.

    Raises:
        UserError: there is none.
    """
    folder = home_path(folder)
    for name in (LAST, RECIPE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name} to resume from: give the run folder that `python -m lavi.fit` printed."
            )
    return folder / LAST


def step_of(file: Path) -> int:
    """The step that a checkpoint is of.

    Raises:
        UserError: it cannot be read.
    """
    try:
        step: int = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError) as error:
        held_more = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        why = "holds more than tensors and numbers" if held_more else "is cut or damaged"
        raise UserError(
            f"{file} {why} and cannot be resumed from: begin anew from its weights with "
            f"module.start_from={file.parent}."
        ) from None
    return step

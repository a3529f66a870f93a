"""Run folders and checkpoints: what was trained is kept, together with the recipe and the versions that made it.

runs/name/recipe.yaml            the resolved recipe
          trained.safetensors    what differs from the checkpoints that the recipe names: trained parameters, and those
                                 that the run had started from; recipe, versions and step in its header
          last.ckpt              Lightning's checkpoint (optimiser, schedule, place in the data) for --resume
          events.out.tfevents    TensorBoard
          run.lock               while a process trains into the folder

A checkpoint is written as *.part and takes the place of the one before it when it is on the disk.
"""

from __future__ import annotations

import errno
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from torch import Tensor, nn

from lavi.checkpoints.model_folder import RECIPE, build
from lavi.checkpoints.weight_files import (
    INHERITED,
    TRAINED,
    check_compatible,
    load_into,
    open_safetensors,
    saved_parameter_names,
)
from lavi.config.paths import home_path
from lavi.errors import UserError, reason
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

log = logging.getLogger("lavi")


LAST, LOCK = "last.ckpt", "run.lock"
RANKS, DATA = "ranks", "data_of_ranks"
PATIENCE = 2.0
"""Seconds to wait for the lock: a process that was just killed may need a moment to be gone."""
NO_RUN = ": give a run folder of `python -m lavi.fit`"


def is_first_rank() -> bool:
    """Whether this process writes and prints; launchers say it in the environment, before ranks know each other."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def new_run_folder(wanted: Path, *, exact: bool = False) -> Path:
    """Make a run folder; what exists is never written over: refused if ``exact``, else numbered.

    Raises:
        UserError: ``exact`` and it exists; no folder can be made there.
    """
    folder, number = home_path(wanted), 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while not _make(folder):  # looking first would leave a moment in which another run makes it
            if exact:
                goes_on = (folder / LAST).is_file()
                instead = f"go on with --resume {folder}" if goes_on else "remove it (it holds no checkpoint)"
                raise UserError(f"{folder} exists and is left as it is: choose another --run, or {instead}.")
            number += 1
            folder = home_path(wanted).with_name(f"{wanted.name}-{number}")
    except (OSError, ValueError) as error:
        raise UserError(f"no run folder can be made at {folder} ({reason(error)}): choose another --run.") from None
    return folder


def _make(folder: Path) -> bool:
    """Whether the folder is new."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def remove_unused(run: Path) -> None:
    """Take a run folder away in which no training has begun: its name is free again when a mistake is mended."""
    if run.is_dir() and all(file.name.startswith((LOCK, "events.", "hparams.")) for file in run.iterdir()):
        shutil.rmtree(run, ignore_errors=True)


@contextmanager
def lock_run_folder(run: Path) -> Iterator[None]:
    """Keep other processes from training into a run folder; of several ranks the first holds it for all.

    Raises:
        UserError: another process trains into it, or nothing can be written there.
    """
    if not is_first_rank():
        yield
        return
    file = run / LOCK
    lock = FileLock(file, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is training {run} at this moment: wait for it, or stop it first.") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"nothing can be written into {run} ({reason(error)}).") from None
        log.warning("%s cannot be locked (%s): let no other process train into it.", run, reason(error))
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                file.unlink()  # while it is held: whoever opened it meanwhile sees that and tries again
            lock.release()


def load_trained(module: nn.Module, file: Path) -> None:
    """Load what a run kept into ``module``, whose other parameters come from their own checkpoints.

    Raises:
        UserError: no such file, not readable, or not made by this recipe: names or shapes differ.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        load_into(_kept_in(weights, module), weights, file, reason="belongs to another recipe")


def check_trained(module: nn.Module, file: Path, *, ranks: str) -> None:
    """Before a run goes on: hold what it kept against the recipe, and take up what it had from the one it started from.

    Raises:
        UserError: as :func:`load_trained`, or the run was trained by other ``ranks``.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        check_compatible(_kept_in(weights, module), weights, file, reason="belongs to another recipe")
        theirs = (weights.metadata() or {}).get(RANKS, ranks)
    if theirs != ranks:
        raise UserError(
            f"{file.parent} was trained by {theirs}, not by {ranks}, and can only go on so: resume it with the same "
            "trainer.devices and trainer.strategy, or begin anew with module.start_from."
        )


def _kept_in(weights: Any, module: nn.Module) -> dict[str, Tensor]:
    """What an open file should hold of ``module``: more than what trains only if its recipe starts from a run."""
    if getattr(module, "start_from", None) is not None:
        cast(set[str], module.inherited).update(json.loads((weights.metadata() or {}).get(INHERITED, "[]")))
    kept = saved_parameter_names(module)
    return {name: parameter for name, parameter in module.named_parameters() if name in kept}


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
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder} has no {TRAINED} yet: its run stopped before the first checkpoint.")
    recipe = Recipe.load(folder / RECIPE, overrides or [], trusted=trust)
    module: pl.LightningModule = recipe.build("module", model=build(recipe))
    load_trained(module, folder / TRAINED)
    return recipe, cast(VisionLanguageModel, module.eval().model)


def failed_write(write: Callable[[], None]) -> str | None:
    """Why the system did not let ``write`` write; None if it did."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return reason(error)
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        return reason(error)  # what torch.save makes of it
    return None


def cannot_write(what: str, run: Path, failure: str) -> str:
    """The sentence for it."""
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

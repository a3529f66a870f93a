"""Run folders and checkpoints: what was trained is kept, together with the recipe and the versions that made it.

runs/name/recipe.yaml            the resolved recipe
          trained.safetensors    what differs from the checkpoints that the recipe names: trained parameters, and those
                                 that the run had started from; recipe, versions and step in its header
          last.ckpt              Lightning's checkpoint (optimiser, schedule, place in the data) for --resume
          events.out.tfevents    TensorBoard
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.pretrained import RECIPE, build
from lavi.recipe import Recipe
from lavi.weights import CARRIED, TRAINED, compare, fill, kept_names, opened, write_state

__all__ = ["LAST", "RECIPE", "TRAINED", "KeepRun", "load_run", "load_trained", "new_run_folder"]

LAST = "last.ckpt"
RANKS, DATA = "ranks", "data_of_ranks"
NO_RUN = ": give a run folder of `python -m lavi.fit`"


def is_first_rank() -> bool:
    """Whether this process writes and prints; launchers say it in the environment, before ranks know each other."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def new_run_folder(wanted: Path, *, exact: bool = False) -> Path:
    """Make a run folder; what exists is never written over: refused if ``exact``, else numbered.

    Raises:
        UserError: ``exact`` and it exists.
    """
    folder, number = wanted, 1
    while folder.exists():
        if exact:
            raise UserError(
                f"{folder} exists and is left as it is: choose another --run, or go on with --resume {folder}."
            )
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True)
    return folder


def load_trained(module: nn.Module, file: Path) -> None:
    """Load what a run kept into ``module``, whose other parameters come from their own checkpoints.

    Raises:
        UserError: no such file, not readable, or not made by this recipe: names or shapes differ.
    """
    with opened(file, instead=NO_RUN) as weights:
        fill(_kept_in(weights, module), weights, file, reason="was made by another recipe")


def check_trained(module: nn.Module, file: Path, *, ranks: str) -> None:
    """Before a run goes on: hold what it kept against the recipe, and take up what it had from the one it started from.

    Raises:
        UserError: as :func:`load_trained`, or the run was trained by other ``ranks``.
    """
    with opened(file, instead=NO_RUN) as weights:
        compare(_kept_in(weights, module), weights, file, reason="was made by another recipe")
        theirs = (weights.metadata() or {}).get(RANKS, ranks)
    if theirs != ranks:
        raise UserError(
            f"{file.parent} was trained by {theirs}, not by {ranks}, and can only go on so: resume it with the same "
            "trainer.devices and trainer.strategy, or begin anew with module.start_from."
        )


def _kept_in(weights: Any, module: nn.Module) -> dict[str, Tensor]:
    """What an open file should hold of ``module``: more than what trains only if its recipe starts from a run."""
    if getattr(module, "start_from", None) is not None:
        module.carried = set(json.loads((weights.metadata() or {}).get(CARRIED, "[]")))  # type: ignore[assignment]
    kept = kept_names(module)
    return {name: parameter for name, parameter in module.named_parameters() if name in kept}


def load_run(
    folder: Path, *, overrides: list[str] | None = None, trust: bool = False
) -> tuple[Recipe, VisionLanguageModel]:
    """The recipe of a run, and its model with the trained weights, ready to answer.

    Raises:
        UserError: not a run folder, or its weights and its recipe do not belong together.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {RECIPE}.")
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder} has no {TRAINED} yet: its run stopped before the first checkpoint.")
    recipe = Recipe.load(folder / RECIPE, overrides or [], trusted=trust)
    module: pl.LightningModule = recipe.build("module", model=build(recipe))
    load_trained(module, folder / TRAINED)
    return recipe, cast(VisionLanguageModel, module.eval().model)


class KeepRun(pl.Callback):
    """Writes checkpoints: every so many steps, at the end, and when the run is asked to stop (Ctrl-C, SIGTERM).

    A stop is carried out between two steps, and by all ranks in the same one, so that a checkpoint never holds half a
    step; a second Ctrl-C stops now. The first rank alone writes; what it writes is whole, whatever the strategy.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, every: int, resumes: bool = False) -> None:
        self.folder, self.recipe, self.every, self.resumes = folder, recipe, every, resumes
        self.asked_to_stop = False
        self.saved_step = -1
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Settle on the folder that the first rank has made, and may have numbered; hold the run against the recipe."""
        self.folder = trainer.strategy.broadcast(self.folder)
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        if self.resumes:  # before a strategy that shards loads what no callback has seen
            check_trained(module, self.folder / TRAINED, ranks=_ranks(trainer))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Not before: a checkpoint that does not fit the recipe has been refused by now, its run folder untouched.
        if trainer.is_global_zero:
            (self.folder / RECIPE).write_text(self.recipe.yaml())
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        stop = trainer.strategy.reduce_boolean_decision(self.asked_to_stop, all=False)
        if stop or (trainer.global_step % self.every == 0 and trainer.global_step > 0):
            self._save(trainer)
        if stop:
            self.asked_to_stop = True
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        keep = kept_names(module)
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in keep}
        checkpoint["recipe"] = self.recipe.yaml()
        if (data := _data_of(trainer)) is not None:
            checkpoint[DATA] = _of_every_rank(data.state_dict())
        if trainer.is_global_zero:
            header = {"recipe": self.recipe.yaml(), "step": str(trainer.global_step), RANKS: _ranks(trainer)}
            header[CARRIED] = json.dumps(sorted(getattr(module, CARRIED, ())))
            write_state(checkpoint["state_dict"], self.folder / TRAINED, **header)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give each rank its own place in the data back; Lightning knows that of the first rank only."""
        places, data = checkpoint.get(DATA), _data_of(trainer)
        if places is not None and data is not None:
            data.load_state_dict(places[trainer.global_rank])

    def _save(self, trainer: pl.Trainer) -> None:
        if self.saved_step == trainer.global_step:
            return
        part = self.folder / f"{LAST}.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / LAST)
        self.saved_step = trainer.global_step

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True


def _ranks(trainer: pl.Trainer) -> str:
    """How many there are, and whether each holds a part of the weights: what optimiser and data were saved for."""
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return f"{trainer.world_size} {'sharded ' if sharded else ''}rank{'s' if trainer.world_size > 1 else ''}"


def _data_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return trainer.datamodule  # type: ignore[attr-defined]


def _of_every_rank(mine: Any) -> list[Any]:
    """What each rank has, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def resume_point(folder: Path) -> Path:
    """The checkpoint that ``--resume`` goes on from.

    Raises:
        UserError: there is none.
    """
    if not (folder / LAST).is_file():
        raise UserError(
            f"{folder} has no {LAST} to resume from: give the run folder that `python -m lavi.fit` printed."
        )
    return folder / LAST

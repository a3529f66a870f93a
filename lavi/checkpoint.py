"""Run folders and checkpoints: what was trained is kept, together with the recipe and the versions that made it.

runs/name/recipe.yaml            the resolved recipe
          trained.safetensors    trained parameters; recipe, versions and step in its header
          last.ckpt              Lightning's checkpoint (optimiser, schedule, place in the data) for --resume
          events.out.tfevents    TensorBoard
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

RECIPE, TRAINED, LAST = "recipe.yaml", "trained.safetensors", "last.ckpt"
PACKAGES = ("lavi", "torch", "lightning", "transformers", "open_clip_torch", "webdataset")


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


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that train, each shared one once (tied embeddings have two names)."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_trained(state: Mapping[str, Tensor], file: Path, *, recipe: str, step: int) -> None:
    """Write trained parameters with what made them; a file that is there is replaced in one step."""
    header = {"recipe": recipe, "versions": json.dumps(versions()), "step": str(step)}
    part = file.with_name(f"{file.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, part, metadata=header)
    os.replace(part, file)


def load_trained(module: nn.Module, file: Path) -> None:
    """Load trained parameters into ``module``, whose other parameters come from their own checkpoints.

    Raises:
        UserError: no such file, not readable, or not made by this recipe: names or shapes differ.
    """
    state = _read_state(file)
    parameters = dict(module.named_parameters())
    expected = trained_names(module)
    for kind, names in (("lacks", expected - set(state)), ("has besides", set(state) - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise UserError(f"{file} was made by another recipe: it {kind} {len(names)} parameters ({some} ...).")
    for name, tensor in state.items():
        if parameters[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)} in the file, {list(parameters[name].shape)} in the model"
            raise UserError(f"{file} was made by another recipe: {name} is {shapes}.")
        parameters[name].data.copy_(tensor)


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"there is no {file}: give --checkpoint a run folder of `python -m lavi.fit`.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable checkpoint ({error}).") from None


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
    module: pl.LightningModule = recipe.build("module", model=recipe.build("model"))
    load_trained(module, folder / TRAINED)
    return recipe, cast(VisionLanguageModel, module.eval().model)


class KeepRun(pl.Callback):
    """Writes checkpoints: every so many steps, at the end, and when the run is asked to stop (Ctrl-C, SIGTERM).

    A stop is carried out between two steps, so that a checkpoint never holds half a step; a second Ctrl-C stops now.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, every: int) -> None:
        self.folder, self.recipe, self.every = folder, recipe, every
        self.asked_to_stop = False
        self.saved_step = -1
        self._handlers: dict[int, Any] = {}

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
        if self.asked_to_stop or (trainer.global_step % self.every == 0 and trainer.global_step > 0):
            self._save(trainer)
        if self.asked_to_stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        keep = trained_names(module)
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in keep}
        checkpoint["recipe"] = self.recipe.yaml()
        if trainer.is_global_zero:
            save_trained(
                checkpoint["state_dict"], self.folder / TRAINED, recipe=self.recipe.yaml(), step=trainer.global_step
            )

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        expected, given = trained_names(module), set(checkpoint["state_dict"])
        if expected != given:
            some = ", ".join(sorted(expected ^ given)[:3])
            raise UserError(
                f"{self.folder / LAST} was made by another recipe: {some} ... differ. Resume with the run's own."
            )

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

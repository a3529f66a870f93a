"""The callback that writes checkpoints while a run trains."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors import SafetensorError
from torch import Tensor, nn

from lavi.checkpoints.model_folder import RECIPE
from lavi.checkpoints.run_folder import LAST, cannot_write
from lavi.checkpoints.trained_weights import (
    INHERITED,
    RANKS,
    TRAINED,
    check_trained,
    inherited_names,
    saved_tensors,
    step_of_trained,
)
from lavi.checkpoints.weight_files import save_state
from lavi.config.files import replacing
from lavi.config.targets import find_target, folders_beside
from lavi.config.text import TARGET
from lavi.errors import UserError, reason
from lavi.recipe import Recipe

log = logging.getLogger("lavi")

DATA = "data_of_ranks"
"""Key of a checkpoint: the state of each rank's data module."""

EVERY = 100
"""Steps between two checkpoints, where nobody says how many."""
SLURM_PREFIX = "hpc_ckpt_"
"""How the name begins under which Lightning saves when SLURM is about to end a job."""

OF_OPTIMIZER = ("learning_rate", "weight_decay", "muon")
"""Settings of a module that a checkpoint brings back with the optimizer's state."""


class KeepRun(Checkpoint):
    """Writes checkpoints: every so many steps, at the end, and when the run is asked to stop (Ctrl-C, SIGTERM).

    A checkpoint and a stop fall between two steps of the optimizer, and on all ranks between the same two: also where
    a step has several micro-batches. What else ends the run (``max_time``) waits for the end of the step, too. A
    second Ctrl-C stops now. The first rank alone writes; what it writes is whole, whatever the strategy.

    As a ``Checkpoint`` it is called behind all other callbacks, and as the last of the trainer's behind other
    ``Checkpoint``s, whose own files go where they say.

    Args:
        every: steps between two checkpoints; None: :data:`EVERY`, or what the run that goes on was begun with.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, *, every: int | None = None, resumed_step: int | None = None
    ) -> None:
        self.folder, self.recipe, self.every, self._every_is_given = folder, recipe, every or EVERY, every is not None
        self.asked_to_stop = False
        self.saved_step = resumed_step
        """The step that the checkpoint in the folder is of; None: there is none."""
        self._broken: str | None = None
        """A weight of the checkpoint that is being written that is not finite."""
        self._seen_step = 0
        self._stopping = self._ending = self._trains = False
        self._keys: list[str] = []
        self._handlers: dict[int, Any] = {}
        """Of each signal that is answered here, what answered it before the run."""
        self._saved_tensors: dict[str, Tensor] = {}

    # --- the folder

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Take over the folder that the first rank created, and may have numbered; check a resumed run's weights."""
        self.folder = trainer.strategy.broadcast(self.folder)
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        self._io = FirstRankIO(self._write, self.folder)
        trainer.strategy.checkpoint_io = self._io
        if self.saved_step is not None:  # before a strategy that shards loads the checkpoint past all callbacks
            check_trained(module, self.folder / TRAINED, ranks=_ranks(trainer))

    def _write_recipe(self) -> None:
        with replacing(self.folder / RECIPE) as part:
            part.write_text(self.recipe.yaml(), encoding="utf-8")

    def _refuse(self, trainer: pl.Trainer, failure: str | None, what: str) -> None:
        """On all ranks, if the first could not write: the others would wait for it."""
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise UserError(cannot_write(what, self.folder, failure))

    # --- when to write

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._refuse_others_in_the_folder(trainer)
        # Not before: a checkpoint that does not fit the recipe has been refused by now, its run folder untouched.
        self._refuse(trainer, failed_write(self._write_recipe) if trainer.is_global_zero else None, RECIPE)
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def _refuse_others_in_the_folder(self, trainer: pl.Trainer) -> None:
        """Another callback would take the run's own files for its own, and replace or remove them."""
        others = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        for callback in others:
            if callback.dirpath is not None and _is_same(Path(callback.dirpath), self.folder):
                raise UserError(
                    f"{type(callback).__name__} would save into {self.folder} itself, where the run's own files are: "
                    "leave its dirpath out (then it saves into checkpoints/ there), or give it another one."
                )

    def on_sanity_check_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._take_signals()

    def _take_signals(self) -> None:
        """Answer Ctrl-C and SIGTERM here; Lightning's own answer to SIGTERM ends a run at the next batch, in mid-step.

        Not in ``on_fit_start``: behind it Lightning takes SIGTERM, and what it finds there it puts back at the end.
        """
        for number in self._handlers:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._give_signals_back()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._take_signals()
        self._seen_step, self._trains = trainer.global_step, True

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if self._stopping:  # not where it was decided: what that step logs comes after the callbacks
            raise KeyboardInterrupt
        self._keys = getattr(batch, "keys", [])

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._keys = []
        if trainer.global_step == self._seen_step:
            self._end_with_the_step(trainer)
            return
        self._seen_step = trainer.global_step
        trainer.should_stop = trainer.should_stop or self._ending
        self._stopping = trainer.strategy.reduce_boolean_decision(self.asked_to_stop, all=False)
        is_last = _is_last_step(trainer)
        if self._stopping or is_last or trainer.should_stop or trainer.global_step % self.every == 0:
            self._save(trainer)
        if is_last:  # nothing is left to lose: what follows, such as timing, can be stopped at once
            self._give_signals_back()

    def _end_with_the_step(self, trainer: pl.Trainer) -> None:
        """Let a run that would end between two micro-batches of a step end behind that step."""
        if trainer.should_stop:
            self._ending, trainer.should_stop = True, False

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *args: Any
    ) -> None:
        self._keys = getattr(batch, "keys", [])

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._keys = []

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.fit_loop._should_accumulate():
            self._end_with_the_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    # --- what is written

    def _save(self, trainer: pl.Trainer) -> None:
        if self.saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(self.folder / LAST)
        if broken := trainer.strategy.broadcast(self._broken):
            raise UserError(
                f"after step {trainer.global_step} the weight {broken} is not finite, and is not saved: lower "
                "module.learning_rate, clip gradients (trainer.gradient_clip_val), or train in fp32."
            )
        self._refuse(trainer, self._io.failure, f"the checkpoint of step {trainer.global_step}")
        self.saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"every": self.every}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._every_is_given:
            self.every = state_dict["every"]

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what a run goes on with; another callback's checkpoint comes here, too, and keeps all weights."""
        self._saved_tensors = saved_tensors(module)
        checkpoint["recipe"] = self.recipe.yaml()
        checkpoint[RANKS], checkpoint[INHERITED] = _ranks(trainer), sorted(inherited_names(module))
        if (data := _data_of(trainer)) is not None:
            checkpoint[DATA] = _of_every_rank(data.state_dict())

    def _write(self, checkpoint: dict[str, Any]) -> None:
        """Write both files of a checkpoint; each replaces the one before when it is whole, :data:`TRAINED` first.

        With a weight that is not finite nothing is written: the checkpoint before is what a run can go on from.
        """
        state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in self._saved_tensors}
        weights = [name for name in state if isinstance(self._saved_tensors[name], nn.Parameter)]
        self._broken = next((name for name in weights if not torch.isfinite(state[name]).all()), None)
        if self._broken is not None:
            return
        header = {"recipe": checkpoint["recipe"], "step": str(checkpoint["global_step"]), RANKS: checkpoint[RANKS]}
        header[INHERITED] = json.dumps(checkpoint[INHERITED])
        with replacing(self.folder / LAST) as last, replacing(self.folder / TRAINED) as trained:
            save_state(state, trained, **header)
            with open(last, "wb") as stream:
                torch.save(checkpoint | {"state_dict": state}, stream)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give each rank its own position in the data back; Lightning knows that of the first rank only.

        Raises:
            UserError: the recipe changes what the optimizer's state brings back as it was.
        """
        before, now = (_of_optimizer(text) for text in (checkpoint["recipe"], self.recipe.yaml()))
        if changed := [key for key in before | now if not _same(before.get(key), now.get(key))]:
            raise UserError(
                f"--resume goes on with the run's own optimizer, and module.{changed[0]} cannot change (it was "
                f"{before.get(changed[0])}): begin anew from its weights with module.start_from={self.folder}."
            )
        states, data = checkpoint.get(DATA), _data_of(trainer)
        if states is not None and data is not None:
            data.load_state_dict(states[trainer.global_rank])
        step = step_of_trained(self.folder / TRAINED)
        if trainer.is_global_zero and step != str(self.saved_step):
            log.warning("%s is of step %s; the run goes on from step %d.", TRAINED, step, self.saved_step)

    # --- when something goes wrong

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Note where the run was, and what is safe."""
        self._give_signals_back()
        if self._trains or not isinstance(exception, UserError):  # else nothing has happened yet
            exception.add_note(f"{self._where(trainer)} {self.what_is_safe()}")

    def _where(self, trainer: pl.Trainer) -> str:
        if not self._trains:
            return "This was before the first step."
        some = f", with sample{'s' * (len(self._keys) > 1)} {', '.join(self._keys[:8])}" if self._keys else ""
        more = f" and {len(self._keys) - 8} more" if len(self._keys) > 8 else ""
        return f"This was {'in the validation ' * trainer.validating}after step {trainer.global_step}{some}{more}."

    def what_is_safe(self) -> str:
        """One sentence on the last checkpoint."""
        if self.saved_step is None:
            return "No checkpoint had been written yet."
        if not (self.folder / LAST).is_file():
            return f"{self.folder / LAST} is gone."
        return f"{self.folder / LAST} of step {self.saved_step} is intact: go on with {self._how_to_go_on()}"

    def farewell(self, trainer: pl.Trainer) -> str:
        """The last sentence of a run that was stopped."""
        if self.saved_step != trainer.global_step:
            return f"interrupted after step {trainer.global_step}. {self.what_is_safe()}"
        return f"stopped at step {self.saved_step}, saved. Go on with: {self._how_to_go_on()}"

    def _how_to_go_on(self) -> str:
        """The command, with ``--trust`` where the recipe names what is not built from a checkpoint otherwise, and with
        the folders of modules that lie beside the recipe."""
        trust = " --trust" if _needs_trust(self.recipe) else ""
        folders = shlex.quote(os.pathsep.join(map(str, folders_beside())))
        path = f"PYTHONPATH={folders} " if folders_beside() else ""
        return f"{path}python -m lavi.fit --resume {shlex.quote(str(self.folder))}{trust}"


def _needs_trust(recipe: Recipe) -> bool:
    """Whether a recipe that stands in a run folder is refused unless its reader trusts it."""
    try:
        Recipe(copy.deepcopy(recipe.settings), trusted=False).check()
    except UserError:
        return True
    return False


def _same(before: Any, now: Any) -> bool:
    """Whether two settings are the same; rates in the same order, too, which is that of the optimizer's groups."""
    return bool(before == now) and (not isinstance(now, dict) or list(before) == list(now))


def _of_optimizer(recipe: str) -> dict[str, Any]:
    """The settings of a recipe's module that the optimizer's state holds, the defaults among them."""
    node = yaml.safe_load(recipe)["module"]
    arguments = inspect.signature(find_target(node[TARGET], "module", where="recipe", trusted=True)).parameters
    settings = {name: argument.default for name, argument in arguments.items()} | node
    settings = {key: settings[key] for key in OF_OPTIMIZER if key in settings}
    if isinstance(rates := settings.get("learning_rate"), dict):
        settings["learning_rate"] = {part: rate for part, rate in rates.items() if rate is not None}  # null: frozen
    return settings


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


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are of the same folder."""
    return one.resolve() == other.resolve()


class FirstRankIO(TorchCheckpointIO):
    """Hands the run's checkpoint to ``write``, in the first rank alone; keeps why that failed, for all ranks to know.

    Lightning's own puts the file together in memory, and a second time in the system's folder for temporary files.
    What is saved elsewhere than in ``last.ckpt`` of the run ``folder``, as other callbacks do, Lightning writes.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], folder: Path) -> None:
        super().__init__()
        self.write, self.folder = write, folder
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path)
        if (file.name == LAST or file.name.startswith(SLURM_PREFIX)) and _is_same(file.parent, self.folder):
            self.failure = failed_write(lambda: self.write(checkpoint))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether training ends with this step, by the number of steps or of epochs."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)


def _ranks(trainer: pl.Trainer) -> str:
    """``1 rank``, ``2 ranks``, or ``2 sharded ranks`` where each holds a part of the weights.

    The states of optimiser and data are of these ranks alone.
    """
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return f"{trainer.world_size} {'sharded ' if sharded else ''}rank{'s' if trainer.world_size > 1 else ''}"


def _data_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return trainer.datamodule  # type: ignore[attr-defined]


def _of_every_rank(mine: Any) -> list[Any]:
    """The value of each rank, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered

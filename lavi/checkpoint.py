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
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError
from torch import Tensor, nn

from lavi.arguments import home_path
from lavi.errors import UserError, reason
from lavi.model import VisionLanguageModel
from lavi.pretrained import RECIPE, build
from lavi.recipe import Recipe
from lavi.weights import CARRIED, TRAINED, compare, fill, kept_names, opened, replacing, save_state

log = logging.getLogger("lavi")

__all__ = ["LAST", "RECIPE", "TRAINED", "Curves", "KeepRun", "held", "load_run", "load_trained", "new_run_folder"]

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
def held(run: Path) -> Iterator[None]:
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
    folder = home_path(folder)
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {RECIPE}.")
    if not (folder / TRAINED).is_file():
        raise UserError(f"{folder} has no {TRAINED} yet: its run stopped before the first checkpoint.")
    recipe = Recipe.load(folder / RECIPE, overrides or [], trusted=trust)
    module: pl.LightningModule = recipe.build("module", model=build(recipe))
    load_trained(module, folder / TRAINED)
    return recipe, cast(VisionLanguageModel, module.eval().model)


class KeepRun(Checkpoint):
    """Writes checkpoints: every so many steps, at the end, and when the run is asked to stop (Ctrl-C, SIGTERM).

    A checkpoint and a stop fall between two steps of the optimizer, and on all ranks between the same two: also where
    a step has several micro-batches. What else ends the run (``max_time``) waits for the end of the step, too. A
    second Ctrl-C stops now. The first rank alone writes; what it writes is whole, whatever the strategy.

    As a ``Checkpoint`` it is called behind all other callbacks.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, every: int, resumed_step: int | None = None) -> None:
        self.folder, self.recipe, self.every = folder, recipe, every
        self.asked_to_stop = False
        self.saved_step = resumed_step
        """The step that the checkpoint in the folder is of; None: there is none."""
        self._seen_step = 0
        self._stopping = self._ending = self._trains = False
        self._keys: list[str] = []
        self._handlers: dict[int, Any] = {}

    # --- the folder

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Settle on the folder that the first rank has made, and may have numbered; hold the run against the recipe."""
        self.folder = trainer.strategy.broadcast(self.folder)
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        self._io = FirstRankIO(self._write)
        trainer.strategy.checkpoint_io = self._io
        if self.saved_step is not None:  # before a strategy that shards loads what no callback has seen
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
        # Not before: a checkpoint that does not fit the recipe has been refused by now, its run folder untouched.
        self._refuse(trainer, failed_write(self._write_recipe) if trainer.is_global_zero else None, RECIPE)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

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
        is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if self._stopping or is_last or trainer.global_step % self.every == 0:
            self._save(trainer)

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
        self._refuse(trainer, self._io.failure, f"the checkpoint of step {trainer.global_step}")
        self.saved_step = trainer.global_step

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        keep = kept_names(module)
        checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in keep}
        checkpoint["recipe"] = self.recipe.yaml()
        checkpoint[RANKS], checkpoint[CARRIED] = _ranks(trainer), sorted(getattr(module, CARRIED, ()))
        if (data := _data_of(trainer)) is not None:
            checkpoint[DATA] = _of_every_rank(data.state_dict())

    def _write(self, checkpoint: dict[str, Any]) -> None:
        """Both files of a checkpoint, each in its place when it is whole; :data:`TRAINED` first: all runs have it."""
        header = {"recipe": checkpoint["recipe"], "step": str(checkpoint["global_step"]), RANKS: checkpoint[RANKS]}
        header[CARRIED] = json.dumps(checkpoint[CARRIED])
        with replacing(self.folder / LAST) as last, replacing(self.folder / TRAINED) as trained:
            save_state(checkpoint["state_dict"], trained, **header)
            with open(last, "wb") as stream:
                torch.save(checkpoint, stream)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give each rank its own place in the data back; Lightning knows that of the first rank only."""
        places, data = checkpoint.get(DATA), _data_of(trainer)
        if places is not None and data is not None:
            data.load_state_dict(places[trainer.global_rank])
        with opened(self.folder / TRAINED) as weights:
            trained = (weights.metadata() or {}).get("step")
        if trainer.is_global_zero and trained != str(self.saved_step):
            log.warning("%s is of step %s; the run goes on from step %d.", TRAINED, trained, self.saved_step)

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
        """One sentence."""
        if self.saved_step is None:
            return "No checkpoint had been written yet."
        if not (self.folder / LAST).is_file():
            return f"{self.folder / LAST} is gone."
        return (
            f"{self.folder / LAST} of step {self.saved_step} is intact: go on with python -m lavi.fit --resume "
            f"{self.folder}"
        )

    def farewell(self, trainer: pl.Trainer) -> str:
        """What to say when the run was stopped."""
        if self.saved_step != trainer.global_step:
            return f"interrupted after step {trainer.global_step}. {self.what_is_safe()}"
        return f"stopped at step {self.saved_step}, saved. Go on with: python -m lavi.fit --resume {self.folder}"


class FirstRankIO(TorchCheckpointIO):
    """Hands a checkpoint to ``write``, in the first rank alone; keeps why that failed, for all ranks to know.

    Lightning's own puts the file together in memory, and a second time in the system's folder for temporary files.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.write = write
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = failed_write(lambda: self.write(checkpoint))


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


class Curves(TensorBoardLogger):
    """TensorBoard's files in a run folder; what a run had logged behind the checkpoint it goes on from is hidden."""

    def __init__(self, run: Path, *, resumed_step: int | None = None) -> None:
        super().__init__(run, name="", version="", purge_step=resumed_step)
        self._usual_hook, threading.excepthook = threading.excepthook, self._on_thread_exception

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        """The thread that writes hands its error to the run, which says it: not a second time."""
        if type(args.thread).__name__ != "_AsyncWriterThread":
            self._usual_hook(args)

    @property
    def experiment(self) -> Any:
        with self._writing():
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._writing():
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with self._writing():
            super().save()

    def finalize(self, status: str) -> None:
        threading.excepthook = self._usual_hook
        # After a failure another one would hide it.
        with self._writing() if status == "success" else suppress(OSError):
            super().finalize(status)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # Lightning makes the second of the first
            if not isinstance(error.__cause__ or error, OSError):
                raise
            raise UserError(cannot_write("TensorBoard's curves", Path(self.log_dir), reason(error))) from None


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

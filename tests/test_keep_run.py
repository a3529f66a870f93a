"""What keeps a run: signals that end it, beside other callbacks that save, and what going on with it remembers."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import refused, small
from lightning.fabric.utilities.seed import pl_worker_init_function
from safetensors.torch import load_file
from test_run_folders import acting, curves, equal, fit, resume  # noqa: F401  (two fixtures)

from datamodules.image_text import ImageTextData
from datamodules.shards.processes import GRACE, leave_signals_to_parent
from lavi.checkpoints.keep_run import KeepRun
from lavi.checkpoints.run_folder import LAST, step_of
from lavi.checkpoints.trained_weights import TRAINED
from lavi.fusion.lavi import LaViFusion
from lavi.recipe import Recipe

SIGNALS = [signal.SIGINT, signal.SIGTERM]

# --- signals ----------------------------------------------------------------------------------------------------------


class Signalled(pl.Callback):
    """A signal comes when a micro-batch begins, counted over the whole run from 0.

    Args:
        where: ``train``, ``validation`` or ``sanity``.
    """

    def __init__(self, number: int, where: str, at: int = 0) -> None:
        self.number, self.where, self.at = number, where, at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.where == "train" and trainer.fit_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int, *args: Any) -> None:
        if self.where == ("sanity" if trainer.sanity_checking else "validation") and index == 0:
            os.kill(os.getpid(), self.number)


def signalled(number: int, where: str, at: int = 0) -> str:
    node = {"_target_": "test_keep_run.Signalled", "number": int(number), "where": where, "at": at}
    return f"callbacks.act={json.dumps(node)}"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [2, 3])
def test_a_run_that_is_ended_in_mid_step_loses_nothing(
    fit,  # noqa: F811
    resume,  # noqa: F811
    tmp_path: Path,
    number: int,
    at: int,
) -> None:  # type: ignore[no-untyped-def]
    """SIGTERM as Ctrl-C: at either micro-batch of the second step, which is done and saved."""
    settings = {"accumulate_grad_batches": 2, "max_steps": 3}
    status, out, _ = fit("run", signalled(number, "train", at), **settings)
    assert (status, step_of(tmp_path / "run" / LAST)) == (130, 2)
    assert "stopped at step 2, saved." in " ".join(out.split())
    assert resume("run", "callbacks.act=null")[0] == 0
    assert fit("whole", **settings)[0] == 0
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("where", "step"), [("validation", 2), ("sanity", 1)])
def test_a_run_that_is_ended_while_it_validates_is_saved_behind_the_next_step(
    fit,  # noqa: F811
    tmp_path: Path,
    number: int,
    where: str,
    step: int,
) -> None:  # type: ignore[no-untyped-def]
    settings = {"accumulate_grad_batches": 2, "max_steps": 4, "limit_val_batches": 2, "val_check_interval": 2}
    status, out, _ = fit("run", signalled(number, where), **settings)
    assert (status, step_of(tmp_path / "run" / LAST)) == (130, step)
    assert f"stopped at step {step}, saved." in " ".join(out.split())


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [1, 100])
def test_signals_are_given_back(fit, number: int, at: int) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """Of a run that was stopped, and of one that ended."""
    before = [signal.getsignal(one) for one in SIGNALS]
    assert fit("run", signalled(number, "train", at), max_steps=3)[0] == (130 if at == 1 else 0)
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Python's own answers, as a process has them that was spawned; afterwards what was there."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, answer) for number, answer in usual.items()}
    yield
    for number, answer in before.items():
        signal.signal(number, answer)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", SIGNALS)
def test_reading_processes_leave_signals_to_the_main_process(build, scenes: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    """A terminal sends Ctrl-C to all of them, a scheduler SIGTERM; to one that does not end it is sent once more."""
    processor = build(LaViFusion(generator=small())).processor
    data = ImageTextData(processor, train=str(scenes / "train"), batch_size=2, workers=1)
    batches: Any = iter(data.train_dataloader())
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, number)
    assert len([next(batches) for _ in range(6)]) == 6  # more than were read ahead
    assert worker.is_alive()
    if number == signal.SIGTERM:
        os.kill(worker.pid, number)
        with pytest.raises((RuntimeError, ConnectionError)):  # by what is noticed first: it has ended, it sends nothing
            list(islice(batches, 100))


@pytest.mark.usefixtures("usual_signals")
def test_a_process_that_its_parent_forgets_ends_by_itself() -> None:
    leave_signals_to_parent()
    signal.raise_signal(signal.SIGTERM)
    assert 0 < signal.alarm(0) <= GRACE
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("usual_signals")
def test_reading_processes_begin_with_seeds_of_their_own(build, scenes: Path) -> None:  # type: ignore[no-untyped-def]
    """As Lightning gives them where nothing else begins them; and what begins them can be sent to them."""
    data = ImageTextData(build(LaViFusion(generator=small())).processor, train=str(scenes / "train"), workers=1)
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, global_rank=1, world_size=2)  # type: ignore[assignment]
    begin = pickle.loads(pickle.dumps(data.train_dataloader().worker_init_fn))
    seeds = []
    for function in (begin, lambda worker: pl_worker_init_function(worker, 1)):
        torch.manual_seed(5)
        function(0)
        seeds.append(torch.initial_seed())
    assert seeds[0] == seeds[1] != 5
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# --- beside other callbacks that save ---------------------------------------------------------------------------------


def saving(**settings: Any) -> str:
    node = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "{step}", **settings}
    return f"callbacks.best={json.dumps(node)}"


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_other_callbacks_save_goes_where_they_say(fit, tmp_path: Path, weights_only: bool) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """With all weights, as Lightning writes it, and the run's own files hold what they always do."""
    there = saving(
        dirpath=str(tmp_path / "there"), every_n_train_steps=2, save_top_k=-1, save_weights_only=weights_only
    )
    assert fit("run", there, max_steps=5)[0] == 0
    assert fit("alone", max_steps=5)[0] == 0
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"step=2.ckpt", "step=4.ckpt"}
    saved = torch.load(tmp_path / "there" / "step=4.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert ("optimizer_states" in saved) == (not weights_only)
    trained = load_file(tmp_path / "run" / TRAINED)
    assert set(trained) < set(saved["state_dict"])
    assert any(not torch.equal(saved["state_dict"][name], tensor) for name, tensor in trained.items())
    assert equal(tmp_path / "run", tmp_path / "alone")
    last = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert (last["global_step"], set(last["state_dict"])) == (5, set(trained))


def test_a_run_that_goes_on_knows_what_its_other_callbacks_saved(
    fit,  # noqa: F811
    resume,  # noqa: F811
    tmp_path: Path,
) -> None:  # type: ignore[no-untyped-def]
    """Also in the step that the run stopped behind: the one file that is to be kept replaces that of then."""
    best = saving(every_n_train_steps=2)
    assert fit("run", best, acting(at=1), max_steps=4)[0] == 130
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=2.ckpt"]
    assert resume("run", "callbacks.act=null")[0] == 0
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=4.ckpt"]


def test_other_callbacks_do_not_save_among_the_run_s_own_files(fit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    result = fit("run", saving(dirpath=str(tmp_path / "run"), every_n_train_steps=2))
    refused(result, "ModelCheckpoint would save into", "leave its dirpath out")
    assert not (tmp_path / "run").exists()


class SavesForSlurm(pl.Callback):
    """Saves as Lightning does when SLURM is about to end a job, which is begun again from the run's last checkpoint."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 2:
            shutil.copytree(trainer.default_root_dir, f"{trainer.default_root_dir}-2")


def test_what_is_saved_when_slurm_ends_a_job_is_the_run_s_own_checkpoint(fit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    assert fit("run", 'callbacks.act={"_target_": "test_keep_run.SavesForSlurm"}', max_steps=3)[0] == 0
    assert step_of(tmp_path / "run-2" / LAST) == 2


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_saves_as_often_as_it_was_begun_with(
    fit,  # noqa: F811
    resume,  # noqa: F811
    tmp_path: Path,
) -> None:  # type: ignore[no-untyped-def]
    """Unless it is said anew; then that is what it remembers. It is stopped short each time, without saving."""
    assert fit("run", "--save-every", 2, max_steps=2)[0] == 0
    for begins, words, saved in ((5, (), 4), (7, ("--save-every", 3), 6), (10, (), 9)):
        status, out, _ = resume("run", *words, "trainer.max_steps=12", acting(at=begins, do="stop_now"))
        assert (status, f"interrupted after step {begins}." in " ".join(out.split())) == (130, True)
        assert step_of(tmp_path / "run" / LAST) == saved


def test_a_run_from_before_that_was_kept_goes_on_with_the_default(
    fit,  # noqa: F811
    resume,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # type: ignore[no-untyped-def]
    with monkeypatch.context() as patch:
        patch.setattr(KeepRun, "state_dict", lambda self: {})
        assert fit("run", "--save-every", 2, max_steps=2)[0] == 0
    assert resume("run", "trainer.max_steps=12", acting(at=5, do="stop_now"))[0] == 130
    assert step_of(tmp_path / "run" / LAST) == 2


def test_the_command_that_is_said_goes_on(fit, run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """With ``--trust`` where the recipe names a class of one's own, without which it is refused."""
    status, out, _ = fit("run", acting(at=1), max_steps=3)
    assert status == 130
    said = " ".join(out.split())
    assert said.endswith("--trust"), said
    refused(run("lavi.fit", "--resume", tmp_path / "run"), "pass --trust")
    assert run("lavi.fit", "--resume", tmp_path / "run", "--trust")[0] == 0


def test_the_command_says_no_more_than_it_needs(tiny_recipe: Path, tmp_path: Path) -> None:
    """No ``--trust`` for classes of ours; a folder that a shell would take for two words is quoted."""
    folder = tmp_path / "a run"
    keep = KeepRun(folder, Recipe.load(tiny_recipe), resumed_step=3)
    _, _, command = keep.farewell(SimpleNamespace(global_step=3)).partition("Go on with: ")  # type: ignore[arg-type]
    assert shlex.split(command) == ["python", "-m", "lavi.fit", "--resume", str(folder)]

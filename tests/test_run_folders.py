"""Run folders: what stays whole and what is said when a disk is full, a run is killed, or something is unforeseen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import refused
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lavi.checkpoints import model_folder, run_folder
from lavi.checkpoints.keep_run import KeepRun
from lavi.checkpoints.model_folder import RECIPE
from lavi.checkpoints.run_folder import LAST, LOCK, new_run_folder, remove_unused, step_of
from lavi.checkpoints.trained_weights import TRAINED
from lavi.cli.entry import cli_entry_point
from lavi.config import files
from lavi.config.files import replacing
from lavi.errors import UserError
from lavi.recipe import Recipe
from lavi.training.module import VisionLanguageModule
from lavi.training.run import train

NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class AtStep(pl.Callback):
    """Does something when a micro-batch begins (or ends), counted over the whole run from 0."""

    def __init__(self, at: int = 0, do: str = "stop", when: str = "start") -> None:
        self.at, self.do, self.when = at, do, when

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self._act(trainer, "start")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._act(trainer, "end")

    def _act(self, trainer: pl.Trainer, when: str) -> None:
        if trainer.fit_loop.total_batch_idx == self.at and when == self.when:
            getattr(self, self.do)(trainer)

    def stop(self, trainer: pl.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def stop_now(self, trainer: pl.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def end(self, trainer: pl.Trainer) -> None:
        trainer.should_stop = True

    def fail(self, trainer: pl.Trainer) -> None:
        raise KeyError("a fault of the program")

    def fill_memory(self, trainer: pl.Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 1 GiB")

    def remove_folder(self, trainer: pl.Trainer) -> None:
        shutil.rmtree(trainer.default_root_dir)


def acting(**settings: Any) -> str:
    return f"callbacks.act={json.dumps({'_target_': 'test_run_folders.AtStep', **settings})}"


@pytest.fixture
def fit(run, tiny_recipe: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Trains the tiny recipe into a folder of ``tmp_path``: (status, out, err)."""

    def call(name: str, *words: object, **trainer: Any) -> tuple[int, str, str]:
        settings = yaml.safe_load(tiny_recipe.read_text())
        settings["trainer"] |= {"limit_val_batches": 0} | trainer
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(settings))
        return run("lavi.fit", "--recipe", file, "--run", tmp_path / name, *words)

    return call


@pytest.fixture
def resume(run, tmp_path: Path):  # type: ignore[no-untyped-def]
    def call(name: str, *words: object) -> tuple[int, str, str]:
        return run("lavi.fit", "--resume", tmp_path / name, "--trust", *words)

    return call


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def in_one_go(fit, kept: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The folder of a run that nothing stopped, trained once for all tests."""

    def call(**trainer: Any) -> Path:
        folder = kept / "-".join(map(str, trainer.values()))
        if not folder.exists():
            assert fit("whole", **trainer)[0] == 0
            shutil.copytree(tmp_path / "whole", folder)
        return folder

    return call


def equal(one: Path, two: Path) -> bool:
    first, second = load_file(one / TRAINED), load_file(two / TRAINED)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def keep_a_copy(monkeypatch: pytest.MonkeyPatch, *, step: int, into: Path) -> None:
    """Of the run folder as a kill would leave it, when this step ends."""
    begin = KeepRun.on_train_batch_start

    def and_copy(self: KeepRun, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == step and not into.exists():
            shutil.copytree(self.folder, into, ignore=shutil.ignore_patterns(LOCK))
        begin(self, trainer, *args)

    monkeypatch.setattr(KeepRun, "on_train_batch_start", and_copy)


# --- stops, kills and the curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "at"), [(1, 1), (2, 2), (2, 3)])
def test_a_stop_falls_between_two_steps_of_the_optimizer(
    fit, resume, in_one_go, tmp_path: Path, accumulate: int, at: int
) -> None:  # type: ignore[no-untyped-def]
    """At whichever micro-batch it comes: what is resumed ends with the weights and the curves of one go."""
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 3}
    status, out, _ = fit("run", acting(at=at), **settings)
    assert (status, step_of(tmp_path / "run" / LAST)) == (130, 2)
    assert "stopped at step 2, saved. Go on with: python -m lavi.fit --resume" in " ".join(out.split())
    assert resume("run", "callbacks.act=null")[0] == 0
    whole = in_one_go(**settings)
    assert equal(tmp_path / "run", whole)
    assert curves(tmp_path / "run") == curves(whole)


def test_what_ends_a_run_ends_it_between_two_steps(fit, resume, in_one_go, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As ``max_time`` does: in the middle of a step it waits for the step's end, so that resuming loses nothing."""
    settings = {"accumulate_grad_batches": 2, "max_steps": 3}
    status, out, _ = fit("run", acting(at=2, do="end", when="end"), **settings)
    assert status == 0
    assert "after 2 steps" in " ".join(out.split())
    assert resume("run", "callbacks.act=null")[0] == 0
    assert equal(tmp_path / "run", in_one_go(**settings))


def test_a_second_interrupt_stops_now_and_says_what_is_safe(fit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = fit("early", acting(at=0, do="stop_now"))
    assert status == 130
    assert "No checkpoint had been written yet." in " ".join(out.split())
    status, out, _ = fit("late", acting(at=3, do="stop_now"), "--save-every", 2)
    assert status == 130
    said = " ".join(out.split())
    assert "interrupted after step 3." in said
    assert "last.ckpt of step 2 is intact: go on with python -m lavi.fit --resume" in said
    assert step_of(tmp_path / "late" / LAST) == 2


def curves(folder: Path) -> dict[str, list[int]]:
    """The steps at which each scalar and image stands in TensorBoard.

    Not of speeds, which a run knows after a while. In order of steps: TensorBoard reads files by their names, and two
    that one process began within the same second bear names that tell nothing of their order.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: sorted(event.step for event in events.Scalars(tag)) for tag in tags["scalars"]}
    images = {tag: sorted(event.step for event in events.Images(tag)) for tag in tags["images"]}
    return {tag: steps for tag, steps in (scalars | images).items() if not tag.startswith("train/device")}


SHOWN = {
    "samples": {"_target_": "callbacks.samples.Samples", "count": 1},
    "speed": {"_target_": "callbacks.throughput.Throughput", "window": 2},
    "rate": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"},
}


def test_after_a_kill_no_step_stands_twice_in_the_curves_and_none_is_missing(
    fit, resume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Saved at 3, killed behind 5: what was scored and shown at 3 stands, what came behind is trained anew."""
    shown = [f"callbacks.{name}={json.dumps(node)}" for name, node in SHOWN.items()]
    settings = {"limit_val_batches": 1, "val_check_interval": 3}
    with monkeypatch.context() as patch:
        keep_a_copy(patch, step=5, into=tmp_path / "killed")
        assert fit("whole", "--save-every", 3, *shown, **settings)[0] == 0
    whole = curves(tmp_path / "whole")
    assert whole["train/loss"] == [0, 1, 2, 3, 4, 5]
    assert whole["val/loss"] == whole["samples"] == [2, 5]
    assert not [tag for tag in whole if tag.startswith("validate")]  # of speeds over batches, which no purge would meet
    assert len(curves(tmp_path / "killed")["train/loss"]) == 5
    assert resume("killed")[0] == 0
    assert curves(tmp_path / "killed") == whole
    assert all(len(set(steps)) == len(steps) for tag, steps in whole.items() if tag != "epoch")  # beside each other tag
    assert equal(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_that_goes_on_leaves_no_gap_in_the_curves(fit, resume, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert fit("run", limit_val_batches=1, val_check_interval=2, max_steps=2)[0] == 0
    assert resume("run", "trainer.max_steps=4")[0] == 0
    assert curves(tmp_path / "run")["train/loss"] == [0, 1, 2, 3]
    assert curves(tmp_path / "run")["val/loss"] == [1, 3]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_checkpoints_do_not_pass_through_the_folder_for_temporary_files(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    assert fit("run", max_steps=1)[0] == 0
    assert {file.name.split(".")[0] for file in (tmp_path / "run").iterdir()} == {
        "recipe",
        "trained",
        "last",
        "events",
        "hparams",
    }


def _no_room(*args: Any, **kwargs: Any) -> None:
    raise NO_ROOM


def _as_torch_says_it(checkpoint: Any, stream: Any) -> None:
    stream.write(b"some of it")
    raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 640 vs 598") from NO_ROOM


def _as_safetensors_says_it(state: Any, file: Path, **kwargs: Any) -> None:
    file.write_bytes(b"some of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_the_checkpoint_before(
    fit, resume, in_one_go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """One sentence with what is safe, nothing half-written lies about; and when there is room the run goes on."""
    write = KeepRun._write
    full = {
        "torch.save": _as_torch_says_it,
        "lavi.checkpoints.weight_files.save_file": _as_safetensors_says_it,
        "lavi.checkpoints.weight_files.os.fsync": _no_room,
    }
    for function, fake in full.items():

        def full_at_three(
            self: KeepRun, checkpoint: dict[str, Any], function: str = function, fake: Any = fake
        ) -> None:
            with monkeypatch.context() as patch:
                if checkpoint["global_step"] == 3:
                    patch.setattr(function, fake)
                write(self, checkpoint)

        with monkeypatch.context() as patch:
            patch.setattr(KeepRun, "_write", full_at_three)
            result = fit("run", "--save-every", 2, max_steps=3) if function == "torch.save" else resume("run")
        refused(result, "the checkpoint of step 3 cannot be written into", "(No space left on device)", "make room")
        refused(result, "last.ckpt of step 2 is intact: go on with python -m lavi.fit --resume")
        assert not list((tmp_path / "run").glob("*.part"))
        assert step_of(tmp_path / "run" / LAST) == 2
    assert resume("run")[0] == 0
    assert equal(tmp_path / "run", in_one_go(max_steps=3))


@pytest.mark.parametrize("file", [RECIPE, "events"], ids=str)
def test_other_files_on_a_full_disk(fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:  # type: ignore[no-untyped-def]
    if file == RECIPE:
        monkeypatch.setattr("lavi.checkpoints.weight_files.os.fsync", _no_room)
    else:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", _no_room)
    result = fit("run")
    refused(result, f"cannot be written into {tmp_path / 'run'} (No space left on device): make room there")
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_run_folder_that_is_removed_while_it_trains(fit) -> None:  # type: ignore[no-untyped-def]
    result = fit("run", acting(at=2, do="remove_folder"), "--save-every", 2)
    refused(result, "run has been removed", "last.ckpt is gone")


@pytest.mark.parametrize("folder", ["/proc/x", "/proc/x/y", "file/run", "link/run", "x" * 300])
def test_a_run_folder_that_cannot_be_created(run, tiny_recipe: Path, tmp_path: Path, folder: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    refused(
        run("lavi.fit", "--recipe", tiny_recipe, "--run", folder), "no run folder can be created at", folder, "--run"
    )


@pytest.mark.parametrize("taken", ["folder", "file", "dangling link"])
def test_what_has_the_name_of_a_run_folder_is_left_as_it_is(tmp_path: Path, taken: str) -> None:
    wanted = tmp_path / "run"
    {
        "folder": wanted.mkdir,
        "file": lambda: wanted.write_text("mine"),
        "dangling link": lambda: wanted.symlink_to("nothing"),
    }[taken]()
    with pytest.raises(UserError, match="exists and is left as it is: choose another --run, or remove it"):
        new_run_folder(wanted, exact=True)
    assert new_run_folder(wanted) == tmp_path / "run-2"


def test_the_home_folder_is_found_in_any_path(run, tiny_recipe: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    short = ["trainer.max_steps=1", "trainer.limit_val_batches=0"]
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run=~/runs/a", *short)[0] == 0
    assert (tmp_path / "home/runs/a" / LAST).is_file()
    assert not (tmp_path / "~").exists()
    assert run("lavi.fit", "--resume=~/runs/a", *short)[0] == 0
    assert run_folder.load_run(Path("~/runs/a"))[1] is not None
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run=~/b", "module.start_from=~/runs/a", *short)[0] == 0
    assert run("lavi.export", "--checkpoint=~/runs/a", "--out=~/model")[0] == 0
    assert model_folder.from_pretrained(Path("~/model")) is not None


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_a_folder_that_another_run_makes_at_the_same_moment_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    wanted, make = tmp_path / "run", Path.mkdir

    def another_first(self: Path, *args: Any, **kwargs: Any) -> None:
        if self == wanted and not wanted.exists():
            make(wanted)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", another_first)
    if exact:
        with pytest.raises(UserError, match="exists and is left as it is"):
            new_run_folder(wanted, exact=True)
    else:
        assert new_run_folder(wanted) == tmp_path / "run-2"


def test_a_run_is_trained_by_one_process_at_a_time(
    fit, resume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Also while its processes that read data outlive it; the lock of a process that was killed holds nobody up."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    assert fit("run", max_steps=1)[0] == 0
    folder = tmp_path / "run"
    code = f"""
import os, time
from filelock import FileLock
lock = FileLock({str(folder / LOCK)!r})
lock.acquire()
if reader := os.fork():
    print(reader, flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    reader = int(other.stdout.readline())
    try:
        refused(resume("run", "trainer.max_steps=2"), "another process is training", "run at this moment: wait for it")
        other.kill()
        other.wait()
        assert resume("run", "trainer.max_steps=2")[0] == 0
    finally:
        other.kill()
        os.kill(reader, signal.SIGKILL)
    assert not (folder / LOCK).exists()


def test_only_the_first_rank_holds_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with run_folder.lock_run_folder(tmp_path):
        with pytest.raises(UserError, match="another process is training"), run_folder.lock_run_folder(tmp_path):
            pass
        monkeypatch.setattr(run_folder, "is_first_rank", lambda: False)
        with run_folder.lock_run_folder(tmp_path):
            pass


def test_a_file_system_without_locks_is_trained_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileLock) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    number = errno.ENOLCK
    with run_folder.lock_run_folder(tmp_path):
        pass
    number = errno.EROFS
    with (
        pytest.raises(UserError, match=r"nothing can be written into .*Read-only"),
        run_folder.lock_run_folder(tmp_path),
    ):
        pass


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_checkpoints_that_were_cut_are_refused_before_anything_is_built(fit, resume, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert fit("run", max_steps=1)[0] == 0
    last = tmp_path / "run" / LAST
    whole = last.read_bytes()
    for length in (0, 10, 5000, len(whole) - 10):
        last.write_bytes(whole[:length])
        status, out, err = resume("run")
        refused((status, out, err), "last.ckpt is cut or damaged", f"module.start_from={last.parent}")
        assert "What trains" not in out
    last.write_bytes(whole)
    (last.parent / RECIPE).rename(last.parent / "away")
    refused(resume("run"), f"run has no {RECIPE} to resume from")
    (last.parent / "away").rename(last.parent / RECIPE)
    assert fit("again", f"module.start_from={last.parent}", max_steps=1)[0] == 0


def test_weights_of_another_step_than_the_checkpoint_are_named(fit, resume, in_one_go, tmp_path: Path, caplog) -> None:  # type: ignore[no-untyped-def]
    """Killed between the two files: the run goes on from its checkpoint, and ends as in one go."""
    assert fit("run", acting(at=1), max_steps=3)[0] == 130
    shutil.copy(in_one_go(max_steps=3) / TRAINED, tmp_path / "run")
    assert resume("run", "callbacks.act=null")[0] == 0
    assert "trained.safetensors is of step 3; the run goes on from step 2." in caplog.text
    assert equal(tmp_path / "run", in_one_go(max_steps=3))


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_refuses_before_the_model_is_loaded(fit, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert fit("run", max_steps=1)[0] == 0
    monkeypatch.setattr(run_folder, "build", lambda recipe: pytest.fail("the model was built"))
    Path("there").mkdir()
    Path("killed.part").mkdir()
    export = ("lavi.export", "--checkpoint", tmp_path / "run", "--out")
    refused(run(*export, "there"), "there exists and is left as it is")
    refused(run(*export, "/"), "/ exists and is left as it is")
    refused(run(*export, "killed"), "killed.part is in the way")
    refused(run(*export, "/proc/x/y"), "/proc/x/y cannot be created", "No such file or directory")
    assert not Path("there.part").exists()


def test_export_on_a_full_disk(fit, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Said before the first file where it can be known; nothing half-written is left in any case."""
    assert fit("run", max_steps=1)[0] == 0
    export = ("lavi.export", "--checkpoint", tmp_path / "run", "--out", "new/model")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        patch.setattr(model_folder, "_write", lambda *args: pytest.fail("it was written"))
        refused(run(*export), "new/model needs", "MiB", "are free there: make room")
    with monkeypatch.context() as patch:
        patch.setattr("lavi.checkpoints.weight_files.save_file", _as_safetensors_says_it)
        refused(run(*export), "new/model cannot be written (No space left on device)")
    assert not list(Path("new").iterdir())
    assert run(*export)[0] == 0
    written = [tmp_path / "run" / TRAINED, *Path("new").rglob("*.*")]
    assert {file.stat().st_mode & 0o777 for file in written} == {Path("changed.yaml").stat().st_mode & 0o777}


# --- what nobody foresaw ----------------------------------------------------------------------------------------------


def notes(raised: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(getattr(raised.value, "__notes__", ()))


def test_below_a_fault_stands_where_it_was_and_what_is_safe(fit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KeyError) as raised:
        fit("run", acting(at=3, do="fail", when="end"), "--save-every", 2)
    assert "after step 4, with samples " in notes(raised)
    assert "last.ckpt of step 2 is intact: go on with python -m lavi.fit --resume" in notes(raised)
    with pytest.raises(KeyError) as raised:
        fit("early", acting(at=0, do="fail"))
    assert "No checkpoint had been written yet." in notes(raised)
    assert not (tmp_path / "early" / LOCK).exists()


def test_a_fault_in_validation_names_its_samples(fit, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*args: Any) -> None:
        raise KeyError("a fault of the program")

    monkeypatch.setattr("lavi.training.module.VisionLanguageModule.validation_step", fail)
    with pytest.raises(KeyError) as raised:
        fit("run", limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0)
    assert "in the validation after step 2, with samples " in notes(raised)


def test_too_little_memory_is_one_sentence(fit) -> None:  # type: ignore[no-untyped-def]
    said = fit("run", acting(at=2, do="fill_memory", when="end"), "--save-every", 2)
    refused(
        said, "CUDA out of memory. Tried to allocate 2.00 GiB", "lower data.batch_size", "after step 3, with sample"
    )
    refused(said, "last.ckpt of step 2 is intact")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied: change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system: choose a place"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a/b"), "choose a shorter name"),
        (OSError(errno.EISDIR, "Is a directory", "/a/b"), "/a/b: Is a directory: give a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room there"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "given/here"), "give one that exists"),
        (
            RuntimeError("writing: No space left on device (os error 28)"),
            "No space left on device: make room there",
        ),
        (MemoryError(), "the memory is too small (of this machine)"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "give it more memory, or lower data.",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [::1]:2: Connection reset by peer. This is ..."),
            "another rank has ended (Read error [::1]:2: Connection reset by peer): what it says",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lavi", "--out=given/here"])

    @cli_entry_point
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    refused((int(left.value.code or 0), "", capsys.readouterr().err), words)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "deep/inside"),
        OSError(errno.EPERM, "Operation not permitted"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("a fault"),
    ],
    ids=str,
)
def test_faults_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys, "argv", ["lavi", "--out=given/here"])

    @cli_entry_point
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


def test_output_that_nobody_reads_ends_quietly() -> None:
    code = (
        "from lavi.cli.entry import cli_entry_point\n"
        "cli_entry_point(lambda: [print('x' * 100000) for _ in range(100)] and 0)()"
    )
    command = [sys.executable, "-c", code]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.close()
    assert started.wait() == 128 + signal.SIGPIPE
    assert started.stderr is not None
    assert started.stderr.read() == b""


def test_a_file_is_replaced_only_by_one_that_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def stop_half_way() -> None:
        with replacing(file) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
    with replacing(file) as part:
        part.write_text("new")
    assert file.read_text() == "new"


def test_a_mistake_leaves_no_run_folder_behind(run, tiny_recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The name is free again; what holds a run stays, whatever becomes of a later start."""
    refused(run("lavi.fit", "--recipe", tiny_recipe, "data.train=gone"), "no shards at gone")
    assert not list((tmp_path / "runs").iterdir())
    holds = tmp_path / "holds"
    holds.mkdir()
    (holds / LAST).write_bytes(b"a run")
    remove_unused(holds)
    assert (holds / LAST).exists()


def test_the_last_step_of_the_last_epoch_is_saved_before_what_follows(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What measures at the end of training takes minutes, and may be stopped."""
    monkeypatch.setattr(pl.LightningModule, "on_train_end", lambda module: seen.append(step_of(tmp_path / LAST)))
    seen: list[int] = []
    changes = ["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.limit_train_batches=2"]
    recipe = Recipe.load(tiny_recipe, [*changes, "trainer.val_check_interval=2"])
    before = signal.getsignal(signal.SIGINT)
    handlers = []
    monkeypatch.setattr(
        VisionLanguageModule, "on_train_epoch_end", lambda module: handlers.append(signal.getsignal(signal.SIGINT))
    )
    assert train(recipe, tmp_path, save_every=1000) == 0
    assert seen == [4]
    assert [handler == before for handler in handlers] == [False, True]  # Ctrl-C ends what follows at once

"""Other processes for tests.

By default they are forked from this one, which has imported everything: they start in no time. A fork has this
process's seeds of hashes, and of its end nothing is heard (``atexit``, ``__del__``): where that could hide a fault, a
test spawns a new interpreter, or starts a command as users do.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

RUNNING: list[Started] = []
"""Of the test at hand: :func:`kill_all` ends what it leaves."""


@dataclass
class Started:
    """A function that runs in a process of its own.

    Args:
        process: which runs it.
        said: the folder where its output is: ``out`` and ``err``.
    """

    process: BaseProcess
    said: Path

    @property
    def out(self) -> str:
        return (self.said / "out").read_text()

    @property
    def err(self) -> str:
        return (self.said / "err").read_text()

    def kill(self, number: signal.Signals) -> None:
        assert self.process.exitcode is None, f"it has ended already:\n{self.out}\n{self.err}"
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> int | None:
        """The exit status; of one that a signal ended, its number with a minus, as :mod:`subprocess` has it. None: it
        still runs."""
        self.process.join(seconds)
        return self.process.exitcode


def start_process(
    run: Callable[[], object], said: Path, environment: dict[str, str] | None = None, *, method: str = "fork"
) -> Started:
    """Start a function in a process of its own, with one thread; what it prints goes into files in ``said``.

    Args:
        method: ``fork``, or ``spawn`` for a new interpreter. Beside an accelerator a process that has computed
            gradients cannot be forked: there all are spawned.
    """
    said.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else method)
    process: BaseProcess = context.Process(
        target=_inside, args=(run, said, environment or {}, multiprocessing.get_start_method())
    )
    process.start()
    RUNNING.append(Started(process, said))
    return RUNNING[-1]


def start_command(said: Path, module: str, *arguments: object) -> Started:
    """Start the ``main`` of a module with these arguments, as ``python -m MODULE ARGUMENTS`` does, but in a fork."""
    return start_process(partial(_command, module, [str(argument) for argument in arguments]), said)


def run_in_triton_s_interpreter(code: str) -> None:
    """Run a check in a new interpreter of Python, where Triton's kernels run on the CPU, line by line."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(str(root / folder) for folder in ("", "tests", "benchmarks"))
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=settings, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kill_all() -> None:
    """End what a test has left running, so that it does not keep this process from ending."""
    for one in RUNNING:
        if one.process.exitcode is None:
            one.process.kill()
            one.process.join()
    RUNNING.clear()


def _command(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def _inside(run: Callable[[], object], said: Path, environment: dict[str, str], workers: str) -> None:
    """``workers``: how data workers start, which in a spawned process would be spawned."""
    gc.freeze()  # garbage of the parent is the parent's: to end its threads, which are not here, crashes or hangs
    multiprocessing.set_start_method(workers, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger().handlers.clear()  # pytest's, which would keep what is logged
    torch.set_num_threads(1)
    torch.seed()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = (said / name).open("w", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, f"std{name}", file)
    faulthandler.enable()  # of a crash, `err` says where
    run()

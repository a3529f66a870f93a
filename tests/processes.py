"""Other processes for tests, forked from this one: it has imported everything, so that a start takes no time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch


@dataclass
class Fork:
    """A function that runs in a process of its own.

    Args:
        process: which runs it.
        said: the folder where its output is: ``out`` and ``err``.
    """

    process: ForkProcess
    said: Path

    @property
    def out(self) -> str:
        return (self.said / "out").read_text()

    @property
    def err(self) -> str:
        return (self.said / "err").read_text()

    def kill(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status; of one that a signal ended, its number with a minus, as :mod:`subprocess` has it."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        assert status is not None, f"it did not end:\n{self.out}\n{self.err}"
        return status


def fork(run: Callable[[], object], said: Path, environment: dict[str, str] | None = None) -> Fork:
    """Start a function in a process of its own, with one thread; what it prints goes into files in ``said``."""
    said.mkdir(parents=True, exist_ok=True)

    def inside() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        os.environ.update(environment or {})
        for name, stream in (("out", "stdout"), ("err", "stderr")):
            file = (said / name).open("w", buffering=1)
            os.dup2(file.fileno(), 1 if name == "out" else 2)
            setattr(sys, stream, file)
        run()

    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    return Fork(process, said)


def fork_command(said: Path, module: str, *arguments: object, **environment: str) -> Fork:
    """Start ``python -m MODULE ARGUMENTS`` so."""

    def run() -> None:
        sys.argv = [module, *map(str, arguments)]
        importlib.import_module(module).main()

    return fork(run, said, environment)

"""Trying a mutant: the tests of its module run in a forked process that imports it from a changed source."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from mutant_sources import Mutant

ROOT = Path.cwd()
MEMORY = 24 << 30
"""Bytes of addresses that one process may have: a mutant that allocates without end must not take the machine along."""
fork = multiprocessing.get_context("fork")


class Planted(SourceFileLoader):
    """Imports a module from a changed source, and leaves its file as it is."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        super().__init__(module, str(path))
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Watch:
    """A plugin of pytest: which test failed, how long each took; those that are likely to fail come first."""

    def __init__(self, first: dict[str, float]) -> None:
        self.first = first
        self.failed: str | None = None
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.first.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


@dataclass
class Tried:
    """The result of a run of a module's tests."""

    status: int | None = None
    """Of pytest; None: it took too long, or the process died."""
    failed: str | None = None
    """The first test that failed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each test."""
    imported: list[str] = field(default_factory=list)
    """Modules that are not of this project."""
    output: str = ""


def run_tests(planted: Planted, tests: str, first: dict[str, float], folder: Path) -> None:
    """Run pytest in this (forked) process on a planted module, and write the result into ``folder``."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(folder / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    tempfile.tempdir = str(folder)
    os.environ |= {
        "TMPDIR": str(folder),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        "PYTEST_XDIST_WORKER": "gw0",  # one of several at work: torch gets one thread
    }
    for name in [name for name, module in sys.modules.items() if is_own(name, module)]:
        del sys.modules[name]
    sys.meta_path.insert(0, planted)  # type: ignore[arg-type]
    watch = Watch(first)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--basetemp", str(folder / "pytest")]
    options += ["--hypothesis-seed", "0"] if importlib.util.find_spec("hypothesis") else []
    status = int(pytest.main([*options, *shlex.split(tests)], plugins=[watch]))
    imported = [name for name, module in sys.modules.items() if not is_own(name, module)]
    tried = Tried(status, watch.failed, dict(watch.seconds), imported)
    (folder / "tried").write_text(json.dumps(vars(tried)))


def is_own(name: str, module: object) -> bool:
    """Whether a module is of this project (its tests included), and has to be imported anew with each mutant."""
    file = getattr(module, "__file__", None)
    return name != "__main__" and file is not None and Path(file).is_relative_to(ROOT) and "site-packages" not in file


class Attempt:
    """One forked process that runs the tests of one mutant."""

    def __init__(self, planted: Planted, tests: str, first: dict[str, float], *, limit: float) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="mutant-")
        folder = Path(self.folder.name)
        self.process: ForkProcess = fork.Process(target=run_tests, args=(planted, tests, first, folder))
        self.begun = time.monotonic()
        self.end = self.begun + limit
        self.process.start()

    @property
    def over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() > self.end

    def close(self) -> tuple[str, Tried, float]:
        """The outcome (``passed``, ``failed`` or ``timeout``), the result of the run, and its seconds."""
        late = self.process.is_alive()
        if late:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        folder = Path(self.folder.name)
        done = not late and (folder / "tried").exists()
        tried = Tried(**json.loads((folder / "tried").read_text())) if done else Tried()
        tried.output = (folder / "output").read_text(errors="replace")
        self.folder.cleanup()
        happened = "timeout" if late else "passed" if tried.status == 0 else "failed"
        return happened, tried, time.monotonic() - self.begun


def warmed_up(module: str, path: Path, tests: str) -> Tried:
    """The tests of a module as it is, once; what they import from elsewhere is imported here, for all that follow."""
    attempt = Attempt(Planted(module, path, path.read_text()), tests, {}, limit=600.0)
    attempt.process.join(600)
    happened, tried, _ = attempt.close()
    if happened != "passed":
        sys.exit(f"the tests of {module} fail without a mutant ({happened}):\n{tried.output[-3000:]}")
    for name in tried.imported:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - a module without a file; then each mutant imports it
                continue
    return tried


def tried_mutants(
    mutants: Sequence[Mutant], path: Path, tests: str, usual: dict[str, float], *, jobs: int
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Each mutant with its outcome, as they come; tests that have killed before, and quick ones, run first."""
    limit = 15 + 5 * sum(usual.values())
    kills: Counter[str] = Counter()
    waiting, running = list(reversed(mutants)), dict[int, tuple[Mutant, Attempt]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                first = {test: seconds - 1000.0 * kills[test] for test, seconds in usual.items()}
                attempt = Attempt(Planted(mutant.module, path, mutant.source), tests, first, limit=limit)
                running[attempt.process.sentinel] = mutant, attempt
            wait(running, timeout=1.0)
            for sentinel, (mutant, attempt) in list(running.items()):
                if attempt.over:
                    del running[sentinel]
                    happened, tried, seconds = attempt.close()
                    outcome = {"passed": "survived", "failed": "killed", "timeout": "timeout"}[happened]
                    kills[tried.failed or ""] += 1
                    yield mutant, {"outcome": outcome, "by": tried.failed, "seconds": round(seconds, 1)}
    finally:
        for _, attempt in running.values():  # somebody stopped the run
            attempt.close()

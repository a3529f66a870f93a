"""Do the tests notice a fault? Small ones are planted in a module, one at a time: the tests meant for it must fail.

    python benchmarks/mutants.py                                  every module that benchmarks/mutants.toml names
    python benchmarks/mutants.py --only lavi.training.optim lavi.nn        some of them, by name or package
    python benchmarks/mutants.py --only lavi.training.optim --sample 10    fewer mutants of each

benchmarks/mutants.toml says which tests are meant for which module, and which mutants nobody could tell from the code
that they were made of. Each mutant is noted in ``--work`` when it has been tried: a run that was stopped goes on where
it was. What was killed is not tried again until the module changes, and what survived not until its tests change too.
``--out`` gets a line for each module, and the survivors with their diffs; beside it they stand as a page to read.

mutmut says how code can be changed (its operators for single expressions and statements). It tries mutants by itself,
too, but not in functions with decorators and not outside of functions, and with all tests that reach a function: hours,
where importing torch, transformers and Lightning alone takes seconds. Here they are imported once, and a process is
forked for each mutant. Not changed: annotations, decorators, imports, asserts and casts, which are for the reader and
the type checker; the words of error messages and of progress; ``strict`` of zip, which guards against a mistake that is
not there; ``device``, which means nothing on a machine that has one.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import CodeType
from typing import Any

import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path.cwd()
MEMORY = 24 << 30
"""Bytes of addresses that one process may have: a mutant that allocates without end must not take the machine along."""
KEPT = {"strict", "device", "description"}
"""Arguments that are not changed."""
fork = multiprocessing.get_context("fork")


# --- mutants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One change of one module; ``before`` and ``after`` are the lines that differ, without their indentation."""

    module: str
    line: int
    before: str
    after: str
    source: str = field(repr=False)

    @property
    def key(self) -> tuple[int, str, str]:
        return self.line, self.before, self.after


class Sites(cst.CSTVisitor):
    """Collects what can be changed: pairs of a node and what may stand in its place."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[cst.CSTNode, cst.CSTNode]] = []
        self.in_raise = False

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom | cst.Assert):
            return False
        if isinstance(node, cst.Raise):
            self.in_raise = True
        if self.in_raise and isinstance(node, cst.SimpleString | cst.FormattedString):
            return False
        if isinstance(node, cst.Arg) and node in kept_arguments(node):
            return False
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "cast":
            return True  # for the type checker, too; not so what is inside
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                others = [other for other in operator(node) if kept_arguments(node) == kept_arguments(other)]
                self.changes += [(node, other) for other in others]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.Raise):
            self.in_raise = False


def kept_arguments(node: cst.CSTNode) -> list[cst.Arg]:
    """Those of a call, or of an argument by itself, that are not changed."""
    arguments = node.args if isinstance(node, cst.Call) else [node] if isinstance(node, cst.Arg) else []
    return [argument for argument in arguments if argument.keyword and argument.keyword.value in KEPT]


def mutants_of(module: str, source: str, *, sample: int, seed: int) -> list[Mutant]:
    """A draw of ``sample`` mutants of a module's source, or all that there are; in the order of its lines."""
    tree = MetadataWrapper(cst.parse_module(source))
    sites = Sites()
    tree.visit(sites)
    random.Random(f"{seed} {module}").shuffle(sites.changes)
    drawn: dict[tuple[int, str, str], Mutant] = {}
    for node, other in sites.changes:
        if len(drawn) == sample:
            break
        changed = tree.module.deep_replace(node, other)
        mutant = _mutant(module, source, cst.ensure_type(changed, cst.Module).code)
        if mutant is not None:
            drawn[mutant.key] = mutant
    return sorted(drawn.values(), key=lambda mutant: mutant.key)


def _mutant(module: str, source: str, changed: str) -> Mutant | None:
    """None: it is no Python, or says the same."""
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    old, new = source.splitlines(), changed.splitlines()
    blocks = [block for block in difflib.SequenceMatcher(None, old, new).get_opcodes() if block[0] != "equal"]
    first, last = blocks[0], blocks[-1]
    before, after = (
        "\n".join(line.strip() for line in lines) for lines in (old[first[1] : last[2]], new[first[3] : last[4]])
    )
    return Mutant(module, first[1] + 1, before, after, changed)


# --- trying one -------------------------------------------------------------------------------------------------------


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
    """What became of a run of a module's tests."""

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
    """Run pytest in this (forked) process on a planted module, and write what became of it into ``folder``."""
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
        """What happened (``passed``, ``failed`` or ``timeout``), the run, and its seconds."""
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
            except Exception:  # noqa: BLE001 - a module that somebody made by hand; then each mutant imports it
                continue
    return tried


def tried_mutants(
    mutants: Sequence[Mutant], path: Path, tests: str, usual: dict[str, float], *, jobs: int
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Each mutant with what became of it, as they come; tests that have killed before, and quick ones, run first."""
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


# --- records ----------------------------------------------------------------------------------------------------------


def whole_lines(file: Path) -> str:
    """The text of a file; a line that was cut off by a kill is left out."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1]


def records_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(file).splitlines()]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_of_tests(tests: str) -> str:
    """The selection, and the files that it is of."""
    files = [Path(word.partition("::")[0]) for word in shlex.split(tests) if word.partition("::")[0].endswith(".py")]
    return tests + "".join(file.read_text() for file in dict.fromkeys(files))


def measure(module: str, tests: str, args: argparse.Namespace) -> dict[str, Any]:
    """Try the mutants of one module that have not been tried yet; its record."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    source = path.read_text()
    mutants = mutants_of(module, source, sample=args.sample, seed=args.seed)
    file = args.work / f"{module}.jsonl"
    state = {"source": digest(source), "tests": digest(text_of_tests(tests))}
    done = {
        (made["line"], made["before"], made["after"]): made
        for made in records_of(file)
        if made["source"] == state["source"] and (made["tests"] == state["tests"] or made["outcome"] != "survived")
    }
    left = [mutant for mutant in mutants if mutant.key not in done]
    if left:
        usual = warmed_up(module, path, tests).seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as stream:
            stream.truncate(len(whole_lines(file).encode()))
            attempts = tried_mutants(left, path, tests, usual, jobs=args.jobs)
            for mutant, outcome in _track(attempts, module, len(left)):
                made = {key: value for key, value in asdict(mutant).items() if key != "source"} | state | outcome
                done[mutant.key] = made
                stream.write(json.dumps(made) + "\n")
                stream.flush()
    return summary(module, [done[mutant.key] for mutant in mutants], args)


def _track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    from lavi.report import track

    yield from track(items, description=description, total=total)


def summary(module: str, tried: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """A module's line of the results."""
    why = {(made["module"], made["before"], made["after"]): made["why"] for made in args.config.get("equivalent", [])}
    survivors = [
        {key: made[key] for key in ("line", "before", "after")}
        | {"equivalent": why.get((module, made["before"], made["after"]))}
        for made in tried
        if made["outcome"] == "survived"
    ]
    outcomes = Counter(made["outcome"] for made in tried)
    equivalent = sum(survivor["equivalent"] is not None for survivor in survivors)
    return {
        "module": module,
        "seed": args.seed,
        "mutants": len(tried),
        "killed": outcomes["killed"],
        "timeouts": outcomes["timeout"],
        "survived": outcomes["survived"] - equivalent,
        "equivalent": equivalent,
        "percent": percent(len(tried), outcomes["survived"], equivalent),
        "seconds": round(sum(made["seconds"] for made in tried)),
        "survivors": survivors,
    }


def percent(mutants: int, survived: int, equivalent: int) -> float:
    """Noticed (killed or endless) of those that can be noticed."""
    return round(100 * (mutants - survived) / max(1, mutants - equivalent), 1)


def page(records: Iterable[dict[str, Any]]) -> str:
    """The survivors as a page to read."""
    parts = ["# Mutants that no test has noticed\n\nWritten by `make mutants`; the figures are in `mutants.jsonl`.\n"]
    for made in records:
        parts.append(f"\n## {made['module']}: {made['percent']} % of {made['mutants'] - made['equivalent']}\n")
        for survivor in made["survivors"]:
            lines = [f"-{line}" for line in survivor["before"].splitlines()]
            lines += [f"+{line}" for line in survivor["after"].splitlines()]
            note = f"equivalent: {survivor['equivalent']}" if survivor["equivalent"] else "not noticed"
            parts.append("\n".join([f"\nline {survivor['line']}, {note}\n", "```diff", *lines, "```\n"]))
    return "".join(parts)


def main() -> None:
    args = arguments()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    records = {made["module"]: made for made in records_of(args.out)}
    for module, tests in args.modules.items():
        records[module] = measure(module, tests, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        kept = [records[name] for name in args.config["modules"] if name in records]
        args.out.write_text("".join(json.dumps(made) + "\n" for made in kept))
        args.out.with_name(args.out.stem + "_survivors.md").write_text(page(kept))
    _show([records[module] for module in args.modules])


def _show(records: Sequence[dict[str, Any]]) -> None:
    from lavi.report import console, table

    columns = ["module", "mutants", "killed", "timeouts", "survived", "equivalent", "percent", "seconds"]
    total = {name: sum(made[name] for made in records) for name in columns[1:]}
    total["percent"] = percent(total["mutants"], total["survived"] + total["equivalent"], total["equivalent"])
    rows = [[str(made[name]) for name in columns] for made in [*records, {"module": "all", **total}]]
    console().print(table("mutants", columns, rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("benchmarks/mutants.toml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="MODULE", help="modules, or packages of them")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/mutants"), help="where each mutant is noted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mutants.jsonl"))
    args = parser.parse_args()
    args.config = tomllib.loads(args.config.read_text())
    chosen = {
        module: tests
        for module, tests in args.config["modules"].items()
        if not args.only or any(f"{module}.".startswith(f"{name}.") for name in args.only)
    }
    if not chosen:
        parser.error(f"--only names none of {', '.join(args.config['modules'])}.")
    args.modules = chosen
    return args


if __name__ == "__main__":
    main()

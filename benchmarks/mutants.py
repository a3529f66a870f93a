"""Do the tests notice a fault? Small ones are planted in a module, one at a time: the tests meant for it must fail.

    python benchmarks/mutants.py                                  every module that benchmarks/mutants.toml names
    python benchmarks/mutants.py --only lavi.training.optim lavi.nn        some of them, by name or package
    python benchmarks/mutants.py --only lavi.training.optim --sample 10    fewer mutants of each

benchmarks/mutants.toml says which tests are meant for which module, and which mutants no test can tell from the code.
Each mutant is noted in ``--work`` when it has been tried: a run that was stopped goes on where it was. What was killed
is not tried again until the module changes, and what survived not until its tests change too. ``--out`` gets a line for
each module, and the survivors with their diffs; beside it they stand as a page to read.

benchmarks/mutant_sources.py says which faults there are, benchmarks/mutant_trials.py how one is tried. mutmut, whose
operators they are, tries mutants by itself, too, but not in functions with decorators and not outside of functions, and
with all tests that reach a function: hours, where importing torch, transformers and Lightning alone takes seconds. Here
they are imported once, and a process is forked for each mutant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import tomllib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutant_sources import mutants_of
from mutant_trials import ROOT, tried_mutants, warmed_up

from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point


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


def measure(module: str, tests: str, args: Namespace) -> dict[str, Any]:
    """Try the mutants of one module that have not been tried yet; its record."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    source = path.read_text()
    mutants = mutants_of(module, source, sample=args.sample, seed=args.seed)
    file = args.work / f"{module}.jsonl"
    state = {"source": digest(source), "tests": digest(text_of_tests(tests))}
    done = {
        (record["line"], record["before"], record["after"]): record
        for record in records_of(file)
        if record["source"] == state["source"]
        and (record["tests"] == state["tests"] or record["outcome"] != "survived")
    }
    left = [mutant for mutant in mutants if mutant.key not in done]
    if left:
        usual = warmed_up(module, path, tests).seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as stream:
            stream.truncate(len(whole_lines(file).encode()))
            attempts = tried_mutants(left, path, tests, usual, jobs=args.jobs)
            for mutant, outcome in _track(attempts, module, len(left)):
                record = {key: value for key, value in asdict(mutant).items() if key != "source"} | state | outcome
                done[mutant.key] = record
                stream.write(json.dumps(record) + "\n")
                stream.flush()
    return summary(module, [done[mutant.key] for mutant in mutants], args)


def _track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    from lavi.report import track

    yield from track(items, description=description, total=total)


def summary(module: str, tried: Sequence[dict[str, Any]], args: Namespace) -> dict[str, Any]:
    """A module's line of the results."""
    equivalents = args.config.get("equivalent", [])
    why = {(entry["module"], entry["before"], entry["after"]): entry["why"] for entry in equivalents}
    survivors = [
        {key: record[key] for key in ("line", "before", "after")}
        | {"equivalent": why.get((module, record["before"], record["after"]))}
        for record in tried
        if record["outcome"] == "survived"
    ]
    outcomes = Counter(record["outcome"] for record in tried)
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
        "seconds": round(sum(record["seconds"] for record in tried)),
        "survivors": survivors,
    }


def percent(mutants: int, survived: int, equivalent: int) -> float:
    """Noticed (killed or endless) of those that can be noticed."""
    return round(100 * (mutants - survived) / max(1, mutants - equivalent), 1)


def page(records: Iterable[dict[str, Any]]) -> str:
    """The survivors as a page to read."""
    parts = ["# Mutants that no test has noticed\n\nWritten by `make mutants`; the figures are in `mutants.jsonl`.\n"]
    for record in records:
        parts.append(f"\n## {record['module']}: {record['percent']} % of {record['mutants'] - record['equivalent']}\n")
        for survivor in record["survivors"]:
            lines = [f"-{line}" for line in survivor["before"].splitlines()]
            lines += [f"+{line}" for line in survivor["after"].splitlines()]
            note = f"equivalent: {survivor['equivalent']}" if survivor["equivalent"] else "not noticed"
            parts.append("\n".join([f"\nline {survivor['line']}, {note}\n", "```diff", *lines, "```\n"]))
    return "".join(parts)


@cli_entry_point
def main() -> None:
    args = arguments()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    records = {record["module"]: record for record in records_of(args.out)}
    for module, tests in args.modules.items():
        records[module] = measure(module, tests, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        lines = [records[name] for name in args.config["modules"] if name in records]
        args.out.write_text("".join(json.dumps(record) + "\n" for record in lines))
        args.out.with_name(args.out.stem + "_survivors.md").write_text(page(lines))
    _show([records[module] for module in args.modules])


def _show(records: Sequence[dict[str, Any]]) -> None:
    from lavi.report import console, table

    columns = ["module", "mutants", "killed", "timeouts", "survived", "equivalent", "percent", "seconds"]
    total = {name: sum(record[name] for record in records) for name in columns[1:]}
    total["percent"] = percent(total["mutants"], total["survived"] + total["equivalent"], total["equivalent"])
    rows = [[str(record[name]) for name in columns] for record in [*records, {"module": "all", **total}]]
    console().print(table("mutants", columns, rows))


def arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", type=path, default=Path("benchmarks/mutants.toml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="MODULE", help="modules, or packages of them")
    parser.add_argument("--sample", type=whole_number(1), default=40, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=whole_number(1), default=2, help="mutants at a time")
    parser.add_argument("--work", type=path, default=Path("runs/mutants"), help="where each mutant is noted")
    parser.add_argument("--out", type=path, default=Path("benchmarks/results/mutants.jsonl"))
    args = parser.read()
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

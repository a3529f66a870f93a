"""Everything that wants a GPU, in one command and within ten minutes.

    make gpu-check OUT=folder            on a machine with a GPU
    make gpu-check DEVICE=cpu OUT=folder the same plan with small models, on any machine

The parts run in the order of their worth, each for its share of the time at most; what a part leaves unused the later
ones may have. A part that is stopped leaves the records that it had written by then; what there is no time for is
dropped, and said so. The last lines are a summary of all of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 540.0
"""Seconds of all parts together."""
LEAST = 5.0
"""Seconds below which a part is not begun."""
CPU_ALONE = {"LAVI_CHECK_ON": "cpu", "CUDA_VISIBLE_DEVICES": ""}
SUMMARY = 40
"""Lines of the summary, at most."""


@dataclass(frozen=True)
class Part:
    """One command of the plan."""

    name: str
    seconds: float
    """Its share."""
    command: tuple[str, ...]
    """Behind ``python``; ``OUT`` stands for its file of records."""
    small: tuple[str, ...] = ()
    """Added on a CPU."""
    lines: int = 2
    """Of the summary, at most."""


def benchmark(name: str, seconds: float, *options: str, small: tuple[str, ...] = ("--small",), lines: int = 2) -> Part:
    """A benchmark that writes records."""
    return Part(name, seconds, (f"benchmarks/{name}.py", "--out", "OUT", *options), small, lines)


PLAN = (
    Part("oracles", 90, ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"), lines=1),
    benchmark("verify_claims", 110, "--runs", "5", "--longest", "16", small=("--runs", "2", "--small"), lines=5),
    benchmark("decode", 65, lines=3),
    benchmark("norm", 20),
    benchmark("prefill", 40, "--turns", "5"),
    benchmark("train_step", 20),
    benchmark("gather", 15, lines=1),
    benchmark("cached_features", 40, "--batch-size", "8"),
    benchmark("short_training", 40),
    benchmark("encoder", 20, "--turns", "5"),
    benchmark("serving", 25, "--requests", "15", small=("--requests", "5")),
    benchmark("fusion_cost", 25, "--runs", "5", small=("--runs", "2"), lines=1),
    benchmark("compare", 30, "--runs", "3", small=("--runs", "2"), lines=1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for records and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same plan, small")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of all parts together")
    args = parser.parse_args()
    try:
        import torch
    except ModuleNotFoundError:
        print("This Python has no torch: name another, such as `make gpu-check PYTHON=.venv/bin/python`.")
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here: nothing was run, and no GPU figure exists. DEVICE=cpu runs the same plan, small.")
        return 0
    args.out = args.out.resolve()  # the parts run in another folder
    args.out.mkdir(parents=True, exist_ok=True)
    named = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, small models: no GPU figure"
    lines = run_plan(PLAN, args.out, device=args.device, limit=args.limit)
    text = "\n".join([f"{named}; torch {torch.__version__}", *lines][:SUMMARY])
    (args.out / "summary.txt").write_text(text + "\n")
    print(text)
    return int(any(": failed" in line for line in lines))


def run_plan(plan: tuple[Part, ...], out: Path, *, device: str, limit: float) -> list[str]:
    """Run the parts while there is time; a summary of each, its last lines among it."""
    end, lines = time.monotonic() + limit, []
    spare = limit - sum(part.seconds for part in plan)
    for part in plan:
        allowed = min(part.seconds + max(0.0, spare), end - time.monotonic())
        if allowed < LEAST:
            lines.append(f"{part.name}: dropped, no time was left")
            continue
        began, log = time.monotonic(), out / f"{part.name}.log"
        command = [sys.executable, *part.command, *(part.small if device == "cpu" else ())]
        command = [str(out / f"{part.name}.jsonl") if word == "OUT" else word for word in command]
        print(f"{part.name}: {allowed:.0f} s at most ...", flush=True)
        status = run(command, log, timeout=allowed, device=device)
        took = time.monotonic() - began
        spare += part.seconds - took
        lines.append(f"{part.name}: {status} after {took:.0f} s (log: {log})")
        lines += [f"    {line[:160]}" for line in summary_lines(log.read_text(), part.lines, failed=status == "failed")]
    return lines


def summary_lines(log: str, count: int, *, failed: bool = False) -> list[str]:
    """So many lines of a log: rows of tables, verdicts and LaVi's before others; none that is estimated, which needs no
    device. Of a part that failed, or has no table, the last lines that are not empty."""
    written = [line.strip() for line in log.splitlines() if line.strip()]
    tables = [line for line in written if line.startswith("│") and any(map(str.isdigit, line))]
    rows = [line for line in tables if "estimated" not in line]
    if failed or not rows:
        return written[-count:]
    verdicts = [line for line in rows if "PASS" in line or "FAIL" in line]
    ours = [line for line in rows if "lavi" in line.lower()]
    chosen = list(dict.fromkeys([*verdicts, *ours, *rows]))[:count]
    return [line for line in rows if line in chosen]


def run(command: list[str], log: Path, *, timeout: float, device: str) -> str:
    """Run a command into its log; ``done``, ``failed`` or ``stopped, its time was over``."""
    settings = {"PYTHONPATH": str(ROOT)} | (CPU_ALONE if device == "cpu" else {})
    with open(log, "w") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=os.environ | settings,
            )
        except subprocess.TimeoutExpired:
            return "stopped, its time was over"
    return "done" if done.returncode == 0 else "failed"


if __name__ == "__main__":
    sys.exit(main())

"""Everything that wants a GPU, in one command and within ten minutes: the tests marked ``gpu``, then every benchmark.

    make gpu-check OUT=folder

Records and logs are left in the folder. Without a GPU it says so and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 570
BENCHMARKS = ("verify_claims", "verify_visor", "fusion_cost")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for records and logs")
    args = parser.parse_args()
    try:
        import torch
    except ModuleNotFoundError:
        print("This Python has no torch: name another, such as `make gpu-check PYTHON=.venv/bin/python`.")
        return 2
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was run, and no GPU figure exists.")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}")
    commands = {"tests": ["-m", "pytest", "-m", "gpu", "tests"]}
    commands |= {name: [f"benchmarks/{name}.py", "--out", str(args.out / f"{name}.jsonl")] for name in BENCHMARKS}
    end, failed = time.monotonic() + LIMIT, []
    for name, command in commands.items():
        log = args.out / f"{name}.log"
        left = end - time.monotonic()
        status = run([sys.executable, *command], log, timeout=max(1.0, left))
        print(f"{name}: {status} (log in {log})\n{log.read_text()[-3000:]}", flush=True)
        failed += [name] if status != "done" else []
    return 1 if failed else 0


def run(command: list[str], log: Path, *, timeout: float) -> str:
    """Run a command into its log; ``done``, ``failed`` or ``out of time``."""
    with open(log, "w") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    return "done" if done.returncode == 0 else "failed"


if __name__ == "__main__":
    sys.exit(main())

"""What does a prompt cost under each fusion, and does it show on the clock?

    python benchmarks/fusion_cost.py --out benchmarks/results/fusion_cost.jsonl

LaVi and token concatenation on SigLIP-so400m and Qwen2 of 0.5B (on a GPU in bf16; elsewhere at reduced size, which
gives ratios and no GPU figure), random weights, one image of growing length, the bare language model (the floor)
measured in the same run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from sizes import QWEN2_05B, SIGLIP_SO400M, SMALL_QWEN2, SMALL_SIGLIP, recipe_of

from callbacks.efficiency import Efficiency
from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency import figures
from lavi.efficiency.latency import TURNS
from lavi.efficiency.record import check_writable, write_records
from lavi.report import console

FULL: dict[str, Any] = {
    "vision": SIGLIP_SO400M,
    "language": QWEN2_05B,
    "sweep": [0, 9, 144, 729, 1458, 2916, 7290],
    "dtype": "bfloat16",
}
REDUCED: dict[str, Any] = {
    "vision": SMALL_SIGLIP,
    "language": SMALL_QWEN2,
    "sweep": [0, 9, 144, 729, 1458, 2916],
    "dtype": "float32",
}


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="append the records to this file of JSON lines")
    parser.add_argument("--runs", type=whole_number(1), default=TURNS, help="timed turns of each stage")
    args = parser.read()
    if args.out:
        check_writable(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = FULL if device.type == "cuda" else REDUCED
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a prompt of no meaning"], Path(folder))
        recipe = recipe_of(
            sizes["vision"], sizes["language"], Path(folder), dtype=sizes["dtype"], source="benchmarks/fusion_cost.py"
        )
        records = Efficiency(visual_tokens=sizes["sweep"], text_tokens=50, runs=args.runs).sweep(recipe, device)
    for record in records:
        record.knobs |= {"size": "full" if sizes is FULL else "reduced"}
    if args.out:
        write_records(records, args.out)
    for shown in figures.sweep_tables(records):
        console().print(shown)
    if device.type != "cuda":
        console().print("No GPU here: reduced size, ratios only. No GPU figure exists from this run.")


if __name__ == "__main__":
    main()

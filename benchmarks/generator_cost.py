"""What does each delta generator add to a 7B model, in parameters and in FLOPs?

    python benchmarks/generator_cost.py --out benchmarks/results/generators.jsonl

SigLIP-so400m and Qwen2-7B, 50 text tokens, from the real modules on the meta device: no weights, no GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sizes import QWEN2_7B, SIGLIP_SO400M, recipe_of

from datamodules.tokenizer import train_tokenizer
from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.measure import build_on, count
from lavi.efficiency.record import Record, check_writable, write_records
from lavi.efficiency.scenario import Scenario
from lavi.report import console, table

TEXT = 50
VISUAL = (729, 2929, 7371)
GENERATORS = {"attention": "AttentionDeltas", "mlp": "MLPDeltas", "conv": "ConvDeltas", "pooled": "PooledDeltas"}
"""Of lavi/nn/delta_generators.py, by the name in the table."""


def costs() -> list[Record]:
    """One record for each generator and number of visual tokens."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a prompt of no meaning"], Path(folder))
        for kind, name in GENERATORS.items():
            generator = {"_target_": f"lavi.nn.delta_generators.{name}"}
            source = "benchmarks/generator_cost.py"
            recipe = recipe_of(SIGLIP_SO400M, QWEN2_7B, Path(folder), source=source, generator=generator)
            model = build_on(recipe, "meta")
            for visual in VISUAL:
                record = count(recipe, model, Scenario(text=TEXT, visual_tokens=visual))
                record.knobs = {"generator": kind, "parameters": sum(p.numel() for p in model.fusion.parameters())}
                records.append(record)
    return records


def generator_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: parameters, and FLOPs beside what they are added to."""
    columns = ["generator", "parameters (M)", "visual tokens", "GFLOPs", "% of encoder + bare language model"]
    rows = []
    for record in records:
        added = record.flops["generator"] + record.flops["modulation"]
        base = record.flops["vision_encoder"] + record.flops_floor
        figures = [f"{record.knobs['parameters'] / 1e6:.2f}", f"{record.visual_tokens:,}"]
        rows.append([record.knobs["generator"], *figures, f"{added / 1e9:.2f}", f"{100 * added / base:.2f}"])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    args = parser.read()
    if args.out:
        check_writable(args.out)
    records = costs()
    if args.out:
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)
    console().print(table(f"Delta generators, {TEXT} text tokens", *generator_table(records)))


if __name__ == "__main__":
    main()

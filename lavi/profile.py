"""What a model costs, at any size, without its weights: FLOPs by component, over a sweep.

    python -m lavi.profile --recipe recipes/lavi/qwen2_7b_siglip_stage2.yaml \\
        --recipe recipes/baselines/llava_onevision_7b.yaml --sweep image=384x384,640x480,1024x1024
    python -m lavi.profile --recipe recipes/quickstart.yaml --sweep visual_tokens=0..576 --measure
    python -m lavi.profile --recipe recipes/lavi/qwen2_7b_siglip_stage2.yaml --sweep batch=1..64 \\
        --estimate h100 a100 model.language.dtype=bfloat16
    python -m lavi.profile --recipe recipes/quickstart.yaml --show targets

Models are built on the meta device: from their configurations, in seconds. Savings are against the first recipe that
concatenates, or the first recipe's own concatenation twin. With --measure time and memory are taken on this machine,
with random weights; with --estimate they are estimated for devices that are not there. --out writes records (JSON
lines), a spreadsheet, pictures and TensorBoard curves.
"""

from __future__ import annotations

import argparse

from lavi.cli.arguments import Parser, path, whole_number, without_overrides
from lavi.cli.entry import cli_entry_point

SHOW = ("targets",)
OF_COUNTING = ("sweep", "at", "text", "measure", "runs", "estimate", "training", "out")
"""Options that say nothing of what ``--show`` shows."""
INPUTS = ("image=", "frames=", "visual_tokens=")
"""How sweeps begin that say what is looked at."""


@cli_entry_point
def main() -> None:
    args = arguments()
    import torch

    from lavi.recipe import Recipe

    devices, behind = without_overrides(args.estimate)
    recipes = [Recipe.load(file, args.overrides + behind) for file in args.recipe]
    if args.show:
        from lavi.efficiency.modulation_targets import show_targets
        from lavi.report import console

        with torch.device("meta"):
            for recipe in recipes:
                console().print(show_targets(recipe))
        return
    from lavi.efficiency.run_sweeps import run_sweeps, show_training

    run_sweeps(
        recipes,
        args.sweep,
        at=args.at,
        text=args.text,
        measure=args.measure,
        runs=args.runs,
        out=args.out,
        estimate=devices,
    )
    if args.training is not None:
        show_training(recipes, at=args.at, text=args.text, rows=args.training)


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m lavi.profile", description=__doc__)
    parser.add_argument("--recipe", type=path, required=True, action="append", metavar="FILE", help="may be repeated")
    parser.add_argument("--show", choices=SHOW, help="targets: the norms that vision can enter, and what is added")
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="KNOB=VALUES",
        help="visual_tokens=0..7290, image=384x384,640x480, frames=1..128, batch=1,8, layers=1,7,28, text=50,500, or a "
        "key of the recipe; may be repeated (default: image=384x384,640x480,1024x1024)",
    )
    shown = "the image, the video or the number of visual tokens in sweeps of another knob"
    parser.add_argument("--at", default="image=1024x1024", metavar="KNOB=VALUE", help=shown)
    parser.add_argument("--text", type=whole_number(1), default=50, metavar="TOKENS", help="text tokens of the prompt")
    parser.add_argument("--measure", action="store_true", help="time and memory on this machine, too")
    parser.add_argument("--runs", type=whole_number(1), default=20, help="timed runs of each stage")
    parser.add_argument(
        "--estimate",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="time on l4, rtx4090, a100, h100, h200, b200 (h100-graph and so on: where each stage is one captured "
        "graph) or the cpu in use, and memory, from the operators' shapes; nothing is measured but the cpu's own rates",
    )
    parser.add_argument(
        "--training",
        type=whole_number(1),
        metavar="ROWS",
        help="also the memory of a training step of so many rows (--text tokens and the input of --at each), estimated",
    )
    parser.add_argument("--out", type=path, metavar="FOLDER", help="must not exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to every recipe")
    args = parser.read()
    if args.show and (given := parser.given(args, OF_COUNTING)):
        parser.error(f"--show counts nothing: leave out {given[0]}")
    args.sweep = args.sweep or ["image=384x384,640x480,1024x1024"]
    if not args.measure and parser.given(args, ["runs"]):
        parser.error("--runs are those of --measure: leave it out")
    if parser.given(args, ["at"]) and args.training is None and all(sweep.startswith(INPUTS) for sweep in args.sweep):
        parser.error("--at is for sweeps of another knob than what is looked at: leave it out")
    return args


if __name__ == "__main__":
    main()

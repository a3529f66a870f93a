"""Score trained runs on their test split, and set them side by side.

    python -m lavi.evaluate --checkpoint runs/A [runs/B ...]
    python -m lavi.evaluate --checkpoint recipes/baselines/released_smolvlm_256m.yaml data.test=FOLDER

For each run: the score of its answers per question family, by the metric that its recipe names (data.metric, by
default the share of right answers) with a 95 % interval (bootstrap over samples), the same with the images shuffled
among the questions and without images (what can be guessed), FLOPs, milliseconds and memory of one typical prompt.
All runs are timed in this process, on this device, so that their ratios mean something.
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path, whole_number, without_overrides
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of

CHECKPOINTS = "run folders of lavi.fit, or recipes of released models (recipes/baselines/released_*.yaml)"


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", action="extend", required=True, metavar="RUN", help=CHECKPOINTS)
    parser.add_argument("--limit", type=whole_number(1), help="score at most this many test samples")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=path, metavar="FILE", help="also append the records to this file of JSON lines")
    parser.add_argument(
        "--text", type=path, metavar="FILE", help="also the language models' perplexity on its texts, without images"
    )
    parser.add_argument("--trust", action="store_true", help="build whatever the runs' recipes name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipes, such as data.test=FOLDER"
    )
    args = parser.read()
    names, behind = without_overrides(args.checkpoint)
    folders = list(map(path, names))
    if not folders:
        parser.error("--checkpoint needs a run folder")
    device = device_of(args.device)
    from lavi.evaluation.compare_runs import compare_runs

    overrides = args.overrides + behind
    compare_runs(
        folders,
        overrides=overrides,
        trust=args.trust,
        limit=args.limit,
        device=device,
        out=args.out,
        text=args.text,
    )


if __name__ == "__main__":
    main()

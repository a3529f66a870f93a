"""Score trained runs on their test split, and set them side by side.

    python -m lavi.evaluate --checkpoint runs/A [runs/B ...]
    python -m lavi.evaluate --checkpoint recipes/baselines/released_smolvlm_256m.yaml data.test=FOLDER
    python -m lavi.evaluate --checkpoint runs/A [runs/B ...] --tasks gqa textvqa

For each run: the score of its answers per question family, by the metric that its recipe names (data.metric, by
default the share of right answers) with a 95 % interval (bootstrap over samples), the same with the images shuffled
among the questions and without images (what can be guessed), and with noise on them (--noise), FLOPs, milliseconds
and memory of one typical prompt.
All runs are timed in this process, on this device, so that their ratios mean something.

With --tasks: on benchmarks instead, read from data/tasks/NAME as recipes/tasks/NAME.yaml says. Every answer is kept in
the run folder as it is given (tasks/NAME.jsonl), and a run that was stopped goes on; two runs are compared question by
question.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lavi.cli.arguments import Parser, path, share, whole_number, without_overrides
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of

if TYPE_CHECKING:  # a command that a mistake ends does not wait for it
    import torch

OF_OWN_SPLIT = ("noise", "text", "max_new_tokens")
OF_TASKS = ("data", "processes", "again", "no_timing")
"""Options that say nothing of the other kind of evaluation."""
CHECKPOINTS = "run folders of lavi.fit, or recipes of released models (recipes/baselines/released_*.yaml)"


@cli_entry_point
def main() -> None:
    parser = _parser()
    args = parser.read()
    names, behind = without_overrides(args.checkpoint)
    folders = list(map(path, names))
    if not folders:
        parser.error("--checkpoint needs a run folder")
    device = device_of(args.device)
    words, of_noise = without_overrides(args.noise)
    noise, overrides = deviations_of(words, parser), behind + of_noise
    unused, where = (OF_OWN_SPLIT, "a run's own test split, not with ") if args.tasks else (OF_TASKS, "")
    if given := parser.given(args, unused):
        parser.error(f"{given[0]} goes with {where}--tasks")
    if args.tasks:
        score_tasks(args, folders, overrides, device)
    else:
        score_own_splits(args, folders, overrides, device, noise)


def _parser() -> Parser:
    parser = Parser(prog="python -m lavi.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", nargs="+", action="extend", required=True, metavar="RUN", help=CHECKPOINTS)
    parser.add_argument("--limit", type=whole_number(1), help="score at most this many test samples, or questions")
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help="questions answered at a time (default: 128; of --tasks 32)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="append the records to this file, too; of --tasks: the folder"
    )
    own = parser.add_argument_group("a run's own test split")
    own.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        metavar="N",
        help="of answers that are scored whole (default: 64)",
    )
    own.add_argument(
        "--text", type=path, metavar="FILE", help="also the language models' perplexity on its texts, without images"
    )
    own.add_argument(
        "--noise",
        nargs="+",
        action="extend",
        default=[],
        metavar="DEVIATION",
        help="also with Gaussian noise of these deviations on the images (1: from black to white)",
    )
    tasks = parser.add_argument_group("benchmarks")
    tasks.add_argument("--tasks", nargs="+", action="extend", metavar="NAME", help="tasks, or files of one's own")
    tasks.add_argument("--data", type=path, default=path("data/tasks"), help="a folder with one of each task")
    tasks.add_argument("--processes", type=whole_number(1), default=1, help="that answer; on GPUs one each")
    tasks.add_argument("--again", action="store_true", help="answer anew what was answered before")
    tasks.add_argument("--no-timing", action="store_true", help="scores and FLOPs alone")
    parser.add_argument("--trust", action="store_true", help="build whatever the runs' recipes name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipes, such as data.test=FOLDER"
    )
    return parser


def score_own_splits(
    args: Namespace, folders: list[Path], overrides: list[str], device: torch.device, noise: list[float]
) -> None:
    """Score runs on their test splits."""
    from lavi.evaluation.compare_runs import compare_runs
    from lavi.evaluation.scoring import AnswerLimits

    usual = AnswerLimits()
    compare_runs(
        folders,
        overrides=args.overrides + overrides,
        trust=args.trust,
        limit=args.limit,
        device=device,
        out=args.out,
        text=args.text,
        noise=noise,
        limits=AnswerLimits(args.batch_size or usual.batch_size, args.max_new_tokens or usual.max_new_tokens),
    )


def deviations_of(words: list[str], parser: Parser) -> list[float]:
    """The numbers of ``--noise``."""
    try:
        return list(map(share, words))
    except ArgumentTypeError:
        parser.error(f"--noise takes deviations above 0 and at most 1, not {' '.join(words)}")


def score_tasks(args: Namespace, folders: list[Path], overrides: list[str], device: torch.device) -> None:
    """Score runs on benchmarks."""
    from lavi.evaluation.run_tasks import Settings, run_tasks

    names, behind = without_overrides(args.tasks)
    settings = Settings(
        data=args.data,
        out=args.out,
        overrides=(*args.overrides, *overrides, *behind),
        trust=args.trust,
        limit=args.limit,
        batch_size=args.batch_size or Settings.batch_size,
        processes=args.processes,
        device=device,
        again=args.again,
        timing=not args.no_timing,
    )
    run_tasks(folders, names, settings)


if __name__ == "__main__":
    main()

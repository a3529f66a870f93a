"""Train a recipe.

    python -m lavi.fit --recipe recipes/quickstart.yaml                      train; the run folder is runs/NAME
    python -m lavi.fit --recipe recipes/quickstart.yaml trainer.max_steps=50 change any key of the recipe
    python -m lavi.fit --resume runs/NAME                                    go on where a run stopped

A run that goes on has the optimizer it had: with another learning rate it begins anew from the weights of the first,
with module.start_from=runs/NAME.

Watch it with `tensorboard --logdir runs`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m lavi.fit", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", type=path, metavar="FILE", help="the recipe to train")
    what.add_argument("--resume", type=path, metavar="RUN", help="a run folder to go on with")
    parser.add_argument(
        "--run", type=path, metavar="FOLDER", help="the run folder; must not exist (default: runs/NAME, numbered)"
    )
    parser.add_argument(
        "--save-every",
        type=whole_number(1),
        metavar="STEPS",
        help="steps between two checkpoints (default: 100; with --resume, what the run was begun with)",
    )
    parser.add_argument("--trust", action="store_true", help="with --resume: build whatever the run's recipe names")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.read()
    if args.resume and args.run:
        parser.error("--run names a new folder, and --resume goes on in the old one")
    return args


@cli_entry_point
def main() -> int:
    args = arguments()
    from lavi.checkpoints import run_folder
    from lavi.checkpoints.model_folder import RECIPE
    from lavi.recipe import Recipe
    from lavi.training.run import train

    if args.resume:
        resume_from = run_folder.resume_point(args.resume)
        folder = resume_from.parent
        recipe = Recipe.load(folder / RECIPE, args.overrides, trusted=args.trust)
    else:
        resume_from = None
        recipe = Recipe.load(args.recipe, args.overrides)
        folder = args.run or Path("runs") / recipe.settings.get("name", args.recipe.stem)
        if run_folder.is_first_rank():
            folder = run_folder.new_run_folder(folder, exact=args.run is not None)
    with run_folder.lock_run_folder(folder):
        try:
            return train(recipe, folder, resume_from=resume_from, save_every=args.save_every)
        finally:
            if run_folder.is_first_rank():
                run_folder.remove_unused(folder)


if __name__ == "__main__":
    main()

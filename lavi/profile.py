"""Look into the model of a recipe without its weights.

    python -m lavi.profile --recipe recipes/quickstart.yaml --show targets    which norms are found, chosen and refused

Models are built on the meta device: from their configurations, in seconds, at any size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lavi.errors import HelpFormatter, front

SHOW = ("targets",)


@front
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lavi.profile", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--show", choices=SHOW, required=True, help="targets: the norms that vision can enter, and the parameters added"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()
    import torch

    from lavi.recipe import Recipe
    from lavi.report import console
    from lavi.targets import show_targets

    with torch.device("meta"):
        console().print(show_targets(Recipe.load(args.recipe, args.overrides)))


if __name__ == "__main__":
    main()

"""Compute the features of a frozen vision backbone once, for all steps, epochs and runs that read them.

    python -m lavi.cache_features --recipe recipes/real/lavi.yaml --out data/photographs-features
    python -m lavi.fit --recipe recipes/real/lavi.yaml data.train=data/photographs-features/train

Writes the shards of each split anew, with features beside images and videos, in the same order. A recipe that reads
them trains as it would on pixels, without the backbone's forward; another backbone, layer, image size or tiling is
refused. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import os
from pathlib import Path

from lavi.cli.arguments import Parser, path, whole_number, without_overrides
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.errors import UserError

DTYPES = ("bfloat16", "float32")


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.cache_features", description=__doc__)
    parser.add_argument("--recipe", type=path, required=True, metavar="FILE", help="its tower, tiling and data")
    parser.add_argument("--out", type=path, metavar="FOLDER", help="the shards (default: data/features/NAME)")
    parser.add_argument("--splits", nargs="+", default=["train"], metavar="SPLIT", help="of the data")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the features")
    parser.add_argument("--batch-size", type=whole_number(1), default=16, metavar="VIEWS", help="encoded at a time")
    parser.add_argument("--threads", type=whole_number(1), default=os.cpu_count() or 2, help="that decode images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.read()
    splits, behind = without_overrides(args.splits)
    device = device_of(args.device)
    from lavi.checkpoints.feature_cache import feature_request
    from lavi.checkpoints.model_folder import build
    from lavi.recipe import Recipe
    from lavi.report import console
    from lavi.training.module import VisionLanguageModule
    from lavi.training.run import check_data

    recipe = Recipe.load(args.recipe, args.overrides + behind)
    check_data(recipe)
    model = build(recipe)
    module = recipe.build("module", model=model)
    if not isinstance(module, VisionLanguageModule):
        raise UserError(f"features are kept for a VisionLanguageModule, not for a {type(module).__name__}.")
    if module.trains_vision:
        raise UserError("module.learning_rate trains 'vision': features are kept of a frozen vision backbone.")
    module.load_start()
    model.vision.to(device).eval()
    data = recipe.build("data", processor=model.processor)
    if unknown := [split for split in splits if split not in data.splits]:
        raise UserError(f"--splits: the recipe names no {unknown[0]} data, it has {', '.join(data.splits)}.")
    request = feature_request(
        model,
        device=device,
        precision=str(recipe.settings["trainer"].get("precision", "32-true")),
        dtype=args.dtype,
        batch_size=args.batch_size,
        threads=args.threads,
    )
    out = args.out or Path("data/features") / recipe.settings.get("name", args.recipe.stem)
    changes: list[str] = []
    for split in splits:
        written, overrides = data.write_features(split, out / split, request)
        changes += overrides
        for line in written:
            console().print(line)
    console().print(f"to read them: {' '.join(changes)}")


if __name__ == "__main__":
    main()

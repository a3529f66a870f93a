"""Train a router of tiles: of a large image only those are encoded that a question is likely to need.

    python -m lavi.route_tiles --checkpoint runs/large --out runs/large-router

A trained run says of questions of its data how likely the true answer is with each tile alone, the overview in the
place of the others; the router learns to choose from the question and the overview. The run stays as it is. What the
router chooses is encoded by lavi.vision.tiles_on_request.TilesOnRequest (docs/models.md): the command says how to name
it, for answers and for scores (on pixels: features that were kept are of all tiles).
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.route_tiles", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="run folder of lavi.fit")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write the router into")
    parser.add_argument("--split", default="train", choices=["train", "validation"], help="whose questions it learns")
    parser.add_argument("--samples", type=whole_number(1), default=4000, help="of its conversations the first so many")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's recipe")
    args = parser.read()
    device = device_of(args.device)
    from lavi.checkpoints.model_folder import check_new_folder
    from lavi.checkpoints.run_folder import load_run
    from lavi.report import console
    from lavi.training.tile_routing import as_override, train_tile_router

    check_new_folder(args.out)
    recipe, model = load_run(args.checkpoint, overrides=args.overrides, trust=args.trust)
    data = recipe.build("data", processor=model.processor)
    for line in train_tile_router(recipe, model, data, args.out, split=args.split, limit=args.samples, device=device):
        console().print(line)
    console().print(f"to use it:\n{as_override(recipe, args.out)}", soft_wrap=True)


if __name__ == "__main__":
    main()

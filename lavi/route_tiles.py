"""Train a router of tiles: of a large image only those are encoded that a question is likely to need.

    python -m lavi.route_tiles --checkpoint runs/large --out runs/large-router

A trained run says of questions of its training data how likely the true answer is with each tile alone, the overview in
the place of the others; the router learns to choose from the question and the overview. Nothing else is trained. What
it chooses is encoded by lavi.vision.tiles_on_request.TilesOnRequest (docs/models.md); the command says how to name it.
"""

from __future__ import annotations

from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of

SAVE_EVERY = 50
"""Batches between two writings of the router: a kill loses no more."""
LAST = 50
"""Batches that what is printed is the mean of."""


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.route_tiles", description=__doc__)
    parser.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="run folder of lavi.fit")
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="of the router")
    parser.add_argument("--split", default="train", choices=["train", "validation"], help="of the run's data")
    parser.add_argument("--samples", type=whole_number(1), default=4000, help="at most this many")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.read()
    device = device_of(args.device)
    from lavi.checkpoints.feature_cache import check_feature_caches
    from lavi.checkpoints.run_folder import load_run
    from lavi.report import console, track
    from lavi.training.tile_routing import train_tile_router

    recipe, model = load_run(args.checkpoint, overrides=args.overrides, trust=args.trust)
    data = recipe.build("data", processor=model.processor)
    check_feature_caches(model, data, [args.split])
    batches = data.stream(args.split, limit=args.samples)
    watched = track(batches, "training the router")
    figures: list[dict[str, float]] = []
    for number, (router, of_batch) in enumerate(train_tile_router(model, watched, device=device), start=1):
        figures = [*figures, of_batch][-LAST:]
        if number % SAVE_EVERY == 0:
            router.save_pretrained(args.out)
    router.save_pretrained(args.out)
    for cause, count in batches.left_out.items():
        console().print(f"left out: {count} x {cause}")
    means = {name: sum(one[name] for one in figures) / len(figures) for name in figures[0]}
    console().print(
        f"the true answer is given {100 * means['likely']:.1f} % with the tile that the router chooses, "
        f"{100 * means['best']:.1f} with the best one, {100 * means['any']:.1f} with any (its last {len(figures)} "
        "batches, before it learned from them)"
    )
    console().print(
        f"written: {args.out}\nto use it: model.vision={{_target_: lavi.vision.tiles_on_request.TilesOnRequest, tower: "
        "THE RUN'S model.vision, keep: 0.25, ranking: {_target_: lavi.vision.tile_router.TileRouter, source: "
        f"{args.out}}}}}"
    )


if __name__ == "__main__":
    main()

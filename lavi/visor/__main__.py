"""VISOR's two offline steps, between its stages. Both go on where they were stopped.

    python -m lavi.visor search --checkpoint runs/universal --out viable.json
    python -m lavi.visor label --checkpoint runs/universal --configurations viable.json --out labels.jsonl

search: how many answers of the validation split are right with each set of the optional layers; viable are those that
keep a share of the full model's accuracy. label: for each training sample the cheapest viable configuration that is as
good as the full model, to train a router on.
"""

from __future__ import annotations

import argparse

from lavi.cli.arguments import Parser, path, share, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of


@cli_entry_point
def main() -> None:
    args = arguments()
    device = device_of(args.device)
    from lavi.checkpoints.feature_cache import check_feature_caches
    from lavi.checkpoints.run_folder import load_run
    from lavi.report import console, table
    from lavi.visor import offline
    from lavi.visor.files import read_viable

    if args.step == "label":
        viable = read_viable(args.configurations)
    recipe, model = load_run(args.checkpoint, overrides=args.overrides, trust=args.trust)
    offline.visor_of(model)
    model.to(device).eval()
    data = recipe.build("data", processor=model.processor)
    check_feature_caches(model, data, [args.split])
    batches = data.stream(args.split, limit=args.samples)
    read = {key: value for key, value in recipe.settings["data"].items() if key not in ("workers", "batch_size")}
    about = {"run": offline.fingerprint(args.checkpoint), "split": args.split, "data": read}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.step == "search":
        # A search goes on behind the last of its batches: they must hold what they held.
        about |= {"samples": args.samples, "batch_size": data.batch_size}
        result = offline.search(model, batches, args.out, about=about, keep=args.keep, most=args.most, device=device)
        rows = [
            [
                name,
                f"{score:.1f}",
                "viable" if [int(n) for n in name.split(",") if n != "none"] in result["viable"] else "",
            ]
            for name, score in result["scores"].items()
        ]
        console().print(table(f"{result['samples']} samples of {args.split}", ["refining layers", "right %", ""], rows))
    else:
        counts = offline.label(model, batches, viable, args.out, about=about, keep=args.keep, by=args.by, device=device)
        rows = [[",".join(map(str, one)) or "none", f"{count:,}"] for one, count in counts.items()]
        console().print(table(f"labels of {args.split}", ["refining layers", "samples"], rows))
    for cause, count in batches.left_out.items():
        console().print(f"left out: {count} x {cause}")
    console().print(f"written: {args.out}")


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m lavi.visor", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for step, split, keep in (("search", "validation", 0.95), ("label", "train", 0.99)):
        own = steps.add_parser(step)
        own.add_argument("--checkpoint", type=path, required=True, metavar="RUN", help="run folder of lavi.fit")
        own.add_argument("--out", type=path, required=True, metavar="FILE")
        own.add_argument("--split", default=split, choices=["train", "validation", "test"])
        own.add_argument("--samples", type=whole_number(1), help="at most this many")
        own.add_argument("--keep", type=share, default=keep, help="share of the full configuration's accuracy to keep")
        own.add_argument("--device", default="auto", help="cpu, cuda, or auto")
        own.add_argument("--trust", action="store_true", help="build whatever the run's recipe names")
        own.add_argument(
            "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as data.train=FOLDER"
        )
        if step == "search":
            own.add_argument(
                "--most",
                type=whole_number(2),
                default=256,
                help="score at most this many configurations, none and all of the layers among them",
            )
        else:
            own.add_argument("--configurations", type=path, required=True, metavar="FILE", help="what search wrote")
            judged = "what --keep is a share of: right answers (the paper's), or the probability of the right answer"
            own.add_argument("--by", choices=["right", "likely"], default="right", help=judged)
    return parser.read()


if __name__ == "__main__":
    main()

"""What VISOR reaches on the scenes: is reading enough for easy questions, and for hard ones not?

    make visor-scenes      trains everything (about two hours on two cores), then runs this
    python benchmarks/visor_scenes.py --out benchmarks/results/visor_scenes.jsonl      scores what was trained

Held-out answers of concatenation, of cross-attention alone and with refining layers, of the universal model at each
of its configurations, and of its router; beside them the FLOPs of one prompt, of the router the mean over what it
chose. Stopped, it goes on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tables import visor_scenes

from lavi.checkpoints.run_folder import load_run
from lavi.cli.arguments import Parser, path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency import measure
from lavi.efficiency.record import read_records, write_records
from lavi.evaluation import scoring
from lavi.report import track
from lavi.visor.offline import fingerprint

UNIVERSAL = "runs/visor-scenes-universal"
RUNS: dict[str, tuple[str, list[str]]] = {
    "concatenation": ("runs/visor-scenes-concat-longer", []),
    "cross-attention alone": ("runs/visor-scenes-cross", []),
    "cross-attention, layer 1 refining": ("runs/visor-scenes-refining", []),
    "cross-attention, both refining": ("runs/visor-scenes-refining-both", []),
    **{
        f"universal, refining {name}": (UNIVERSAL, [f"model.fusion.configuration={layers}"])
        for name, layers in (("none", "[]"), ("layer 1", "[1]"), ("layer 2", "[2]"), ("both", "[1, 2]"))
    },
    "universal, routed": ("runs/visor-scenes-router", []),
}
TEST = "data/scenes-single/test"


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, help="write the records to this file of JSON lines")
    parser.add_argument("--limit", type=whole_number(1), help="score at most this many test samples")
    args = parser.read()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = (
        {record.knobs["name"]: record for record in read_records(args.out)} if args.out and args.out.exists() else {}
    )
    for name, (run, changes) in RUNS.items():
        scored = {"name": name, "run": Path(run).name, "weights": fingerprint(Path(run)), "limit": args.limit}
        record = there.get(name)
        if record is not None and scored.items() <= record.knobs.items():  # of a run that was stopped
            continue
        recipe, model = load_run(Path(run), overrides=[f"data.test={TEST}", *changes])
        model.to(device)
        data = recipe.build("data", processor=model.processor)
        samples = data.sample_stream("test", limit=args.limit)
        watched = track(samples, name, total=samples.expected)
        scores = scoring.evaluate(model, watched, metric=data.metric, device=device)
        record = measure.count(recipe, model, scores.typical, scores.route_counts)
        record.accuracy, record.controls = scores.accuracy, scores.controls
        record.knobs |= scored | {"test_samples": scores.samples}
        there[name] = record
        if args.out:
            args.out.unlink(missing_ok=True)
            write_records([there[known] for known in RUNS if known in there], args.out)
        easy, hard = (scores.accuracy[f"level/{level}"] for level in ("easy", "hard"))
        print(f"{name}: easy {easy:.1f} %, hard {hard:.1f} %", flush=True)
    print(visor_scenes([there[name] for name in RUNS]))


if __name__ == "__main__":
    main()

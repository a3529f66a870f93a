"""Score trained runs on their test split, and set them side by side.

    python -m lavi.evaluate --checkpoint runs/A [runs/B ...]

For each run: accuracy per question family, the same with the images shuffled among the questions and without images
(what can be guessed), FLOPs, milliseconds and memory of one typical prompt. All runs are timed in this process, on
this device, so that their ratios mean something.
"""

from __future__ import annotations

from functools import partial

from lavi.cli.arguments import Parser, device_of, path, whole_number, without_overrides
from lavi.cli.entry import cli_entry_point


@cli_entry_point
def main() -> None:
    parser = Parser(prog="python -m lavi.evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", action="extend", required=True, metavar="RUN", help="run folders of lavi.fit"
    )
    parser.add_argument("--limit", type=whole_number(1), help="score at most this many test samples")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=path, metavar="FILE", help="also append the records to this file of JSON lines")
    parser.add_argument("--trust", action="store_true", help="build whatever the runs' recipes name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipes, such as data.test=FOLDER"
    )
    args = parser.read()
    args.checkpoint, behind = without_overrides(args.checkpoint)
    args.overrides += behind
    if not args.checkpoint:
        parser.error("--checkpoint needs a run folder")
    device = device_of(args.device)
    from lavi.checkpoints.run_folder import load_run
    from lavi.efficiency import measure
    from lavi.efficiency.comparison import side_by_side
    from lavi.efficiency.estimate import NOTE
    from lavi.efficiency.figures import waited
    from lavi.efficiency.record import check_writable, write_records
    from lavi.evaluation import scoring
    from lavi.report import console, table, track

    if args.out:
        check_writable(args.out)
    for run in args.checkpoint:
        if run.is_dir():
            check_writable(run / "evaluation.jsonl")
    measurements, twins = [], []
    for run in args.checkpoint:
        recipe, model = load_run(run, overrides=args.overrides, trust=args.trust)
        model.to(device)
        samples = recipe.build("data", processor=model.processor).samples("test", limit=args.limit)
        watched = track(samples, f"{run.name}: answering", total=samples.expected)
        scores = scoring.evaluate(model, watched, device=device)
        scenario = scores.typical
        record = measure.count(recipe, model, scenario, scores.routes)
        record.accuracy, record.controls = scores.accuracy, scores.controls
        record.knobs |= {"run": run.name, "test_samples": scores.samples, "answers": scores.answers}
        left_out = samples.left_out + scores.left_out
        record.knobs |= {"left_out": dict(left_out)} if left_out else {}
        usual = max(scores.routes, key=scores.routes.__getitem__, default=None)
        record.knobs |= {} if usual is None else {"timed way": str(usual)}
        console().print(f"{run}: {scores}")
        for cause, count in left_out.items():
            console().print(f"  left out: {count} x {cause}")
        measurements.append(measure.Measurement(record, scenario, partial(model.to, device), usual))
        twin = measure.concat_twin(recipe)
        twins.append(measure.count(twin, measure.build_on(twin, "meta"), scenario))
    records = [measurement.record for measurement in measurements]
    try:
        measure.measure(measurements, device=device, track=partial(track, description="timing in turns"))
    finally:  # what was scored is kept, whatever the timing comes to
        for run, record in zip(args.checkpoint, records, strict=True):
            write_records([record], run / "evaluation.jsonl")
        if args.out:
            write_records(records, args.out)
    columns, rows = side_by_side(records, twins[0])
    seen = f"an image of {scenario}" if scenario.image else str(scenario)
    prompt = f"{scenario.text} text tokens and {seen}"
    title = f"{scores.samples} test samples; one prompt of {prompt}; 1 multiply-add = 2 FLOPs; {records[0].device}"
    console().print(table(title, columns, rows))
    console().print(" ".join(filter(None, [NOTE, waited(records)])))


if __name__ == "__main__":
    main()

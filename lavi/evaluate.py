"""Score trained runs on their test split, and set them side by side.

    python -m lavi.evaluate --checkpoint runs/A [runs/B ...]

For each run: accuracy per question family, the same with the images shuffled among the questions and without images
(what can be guessed), FLOPs, milliseconds and memory of one typical prompt. All runs are timed in this process, on
this device, so that their ratios mean something.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lavi.errors import HelpFormatter, front


@front
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lavi.evaluate", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, metavar="RUN", help="run folders of lavi.fit"
    )
    parser.add_argument("--limit", type=int, help="score at most this many test samples")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the records to this file of JSON lines")
    parser.add_argument("--trust", action="store_true", help="build whatever the runs' recipes name")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipes, such as data.test=FOLDER"
    )
    args = parser.parse_intermixed_args()
    import torch

    from lavi import evaluation
    from lavi.checkpoint import load_run
    from lavi.efficiency import measure, record
    from lavi.efficiency.comparison import side_by_side
    from lavi.report import console, table

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    records, twins = [], []
    for run in args.checkpoint:
        recipe, model = load_run(run, overrides=args.overrides, trust=args.trust)
        model.to(device)
        samples = recipe.build("data", processor=model.processor).samples("test", limit=args.limit)
        scores = evaluation.evaluate(model, samples, device=device, name=run.name)
        scenario = evaluation.typical_prompt(model, samples)
        made = measure.count(recipe, model, scenario, scores["ways"])
        usual = max(scores["ways"], key=scores["ways"].get, default=None)
        measure.measure(made, model, scenario, device=device, way=usual)
        made.accuracy, made.controls = scores["accuracy"], scores["controls"]
        made.knobs |= {"run": run.name, "test_samples": len(samples)} | (
            {} if usual is None else {"timed way": str(usual)}
        )
        record.write([made], run / "evaluation.jsonl")
        records.append(made)
        twin = measure.concat_twin(recipe)
        twins.append(measure.count(twin, measure.build_on(twin, "meta"), scenario))
    if args.out:
        record.write(records, args.out)
    columns, rows = side_by_side(records, twins[0])
    seen = f"an image of {scenario}" if scenario.image else str(scenario)
    prompt = f"{scenario.text} text tokens and {seen}"
    title = f"{len(samples)} test samples; one prompt of {prompt}; 1 multiply-add = 2 FLOPs; {records[0].device}"
    console().print(table(title, columns, rows))


if __name__ == "__main__":
    main()

"""How well does each fusion answer, for what it costs? Trained to the end on scenes, with several seeds.

    make lab                                                            all of it; stopped, it goes on
    python benchmarks/lab.py --out benchmarks/results/lab.jsonl --methods concatenation LaVi --seeds 0

Each method trains with each seed from the same tower on the same scenes (recipes/lab), and is scored on held-out ones:
easy and hard question families apart, with its controls, beside the FLOPs of its prompts; last, all are timed in turns.
A record is written as each run ends, and one that is there is not trained again. The table gives means over seeds with
95 % intervals (Student's t); the picture is the frontier of accuracy against FLOPs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from own_records import parser_of

from datamodules.scenes import LEVELS
from lavi.checkpoints.run_folder import LAST, TRAINED, load_run
from lavi.cli.arguments import path
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.config.files import replacing
from lavi.efficiency.measure import Measurement, measure
from lavi.efficiency.record import Record, read_records, write_records
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError, nearest
from lavi.evaluation.compare_runs import score_run
from lavi.recipe import Recipe
from lavi.report import console, table, track
from lavi.training.run import train

RECIPES, RUNS = Path("recipes/lab"), Path("runs/lab")
PIXELS, FEATURES = Path("data/lab"), Path("data/lab-features")
HARD = [family for family, level in LEVELS.items() if level == "hard"]
GENERATOR = "model.fusion.generator={{_target_: lavi.nn.delta_generators.{}, bottleneck: {}}}"


@dataclass(frozen=True)
class Method:
    """A recipe of the lab with changes.

    Args:
        shares: of the recipe's steps, the budgets it is trained with.
        variants: what one trained model is scored as, with the changes of each; by default as it is.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()


METHODS: dict[str, Method] = {
    "concatenation": Method("concat", shares=(0.25, 0.5, 1.0)),
    "LaVi": Method("lavi", shares=(0.25, 0.5, 1.0)),
    "cross-attention": Method("cross_attention"),
    "VISOR": Method(
        "visor",
        variants=(
            ("VISOR, both refining", ()),
            ("VISOR, layer 2 refining", ("model.fusion.configuration=[2]",)),
            ("VISOR, none refining", ("model.fusion.configuration=none",)),
        ),
    ),
    "LaVi, MLP": Method("lavi", (GENERATOR.format("MLPDeltas", 96),)),
    "LaVi, convolutions": Method("lavi", (GENERATOR.format("ConvDeltas", 96),)),
    "LaVi, pooled": Method("lavi", (GENERATOR.format("PooledDeltas", 96),)),
    "LaVi, scale alone": Method("lavi", ("model.fusion.parameters=scale",)),
    "LaVi, shift alone": Method("lavi", ("model.fusion.parameters=shift",)),
    "LaVi, attention's norms": Method("lavi", ("model.fusion.targets=[attention]",)),
    "LaVi, feed-forward's norms": Method("lavi", ("model.fusion.targets=[ffn]",)),
    "LaVi, every second layer": Method("lavi", ("model.fusion.every=2",)),
    "LaVi, one layer": Method("lavi", ("model.fusion.every=4",)),
    "LaVi, bottleneck 32": Method("lavi", (GENERATOR.format("AttentionDeltas", 32),)),
    "LaVi, bottleneck 192": Method("lavi", (GENERATOR.format("AttentionDeltas", 192),)),
    "concatenation, pooled 2 x 2": Method(
        "concat", ("model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 2}",)
    ),
    "concatenation, pooled 4 x 4": Method(
        "concat", ("model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 4}",)
    ),
    "concatenation, random quarter": Method(
        "concat", ("model.reducer={_target_: lavi.reduction.controls.RandomTokens, keep: 16}",)
    ),
}


def slug(name: str) -> str:
    """A name as that of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-").replace("--", "-")


def variants_of(name: str) -> list[str]:
    """What a method is scored as."""
    return [variant for variant, _ in METHODS[name].variants] or [name]


def run_once(name: str, seed: int, share: float, device: torch.device) -> list[Record]:
    """Train and score one run; one that was stopped goes on."""
    method = METHODS[name]
    recipe = RECIPES / f"{method.recipe}.yaml"
    steps = max(1, round(share * Recipe.load(recipe).settings["trainer"]["max_steps"]))
    folder = RUNS / slug(name) / f"{steps}-steps" / f"seed-{seed}"
    features = [f"data.{split}={FEATURES / split}" for split in ("train", "validation", "test")]
    own = [f"seed={seed}", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    settings = Recipe.load(recipe, [*features, *own, *method.changes])
    last = folder / LAST
    if not (folder / TRAINED).is_file() or last.is_file():
        if not last.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        if train(settings, folder, resume_from=last if last.is_file() else None, save_every=1000):
            raise KeyboardInterrupt
        last.unlink(missing_ok=True)  # it is trained to the end: what is left is the run itself
    records = []
    for variant, own_changes in method.variants or ((name, ()),):
        record = score_run(folder, overrides=list(own_changes), trust=False, limit=None, device=device).record
        record.knobs |= {"method": variant, "seed": seed, "share": share, "steps": steps}
        record.knobs |= {"folder": str(folder), "changes": list(own_changes)}
        records.append(record)
    return records


def key_of(record: Record) -> tuple[str, int, float]:
    """What tells the lab's records apart."""
    return record.knobs["method"], record.knobs["seed"], record.knobs["share"]


# --- the table --------------------------------------------------------------------------------------------------------

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Of Student's distribution, by degrees of freedom from 1."""


def over_seeds(values: Sequence[float]) -> str:
    """The mean, with its 95 % interval where there are several."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = half_width(values)
    return f"{mean(values):.1f} ± {half:.1f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    return T_95[min(len(values) - 1, len(T_95)) - 1] * stdev(values) / sqrt(len(values))


def lab_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one row a method and budget."""
    columns = ["method", "steps", "easy %", "hard %", *(f"{family.replace('_', ' ')} %" for family in HARD)]
    columns += ["GFLOPs, no encoder", "saved %", "first token, times concatenation"]
    concat = next((r for r in records if r.knobs["method"] == "concatenation"), records[0])
    rows = []
    for name, share in dict.fromkeys((r.knobs["method"], r.knobs["share"]) for r in records):
        of = [r for r in records if (r.knobs["method"], r.knobs["share"]) == (name, share)]
        groups = ["level/easy", "level/hard", *(f"family/{family}" for family in HARD)]
        scores = [over_seeds([r.accuracy[group] for r in of]) for group in groups]
        cost = mean(without_encoder(r) for r in of)
        saved = 100 * (1 - cost / without_encoder(concat))
        times = next((r.ratios["concat"]["first_token"] for r in of if "concat" in r.ratios), None)
        clock = "-" if times is None else "{:.2f} ({:.2f}-{:.2f})".format(*times)
        rows.append([name, f"{of[0].knobs['steps']:,}", *scores, f"{cost:.4f}", f"{saved:.1f}", clock])
    return columns, rows


def without_encoder(record: Record) -> float:
    """GFLOPs of a prompt, the mean over the test samples."""
    parts = record.flops_of_samples
    return sum(value for part, value in parts.items() if part not in ("floor", "vision_encoder")) / 1e9


def draw(records: Sequence[Record], file: Path) -> None:
    """Accuracy against FLOPs, easy and hard apart; the cost of the floor and the accuracy of concatenation drawn."""
    from matplotlib.figure import Figure

    full = [r for r in records if r.knobs["share"] == 1.0]
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, level in zip(figure.subplots(1, 2), ("easy", "hard"), strict=True):
        for name in dict.fromkeys(r.knobs["method"] for r in full):
            of = [r for r in full if r.knobs["method"] == name]
            scores = [r.accuracy[f"level/{level}"] for r in of]
            cost = mean(map(without_encoder, of))
            axes.errorbar(cost, mean(scores), yerr=half_width(scores), fmt="o" if "," not in name else ".", capsize=2)
            axes.annotate(name, (cost, mean(scores)), fontsize=6, xytext=(3, 3), textcoords="offset points")
        floor = mean(r.flops_of_samples["floor"] for r in full) / 1e9
        axes.axvline(floor, color="grey", linestyle=":", label="language model on the text alone")
        ceiling = [r.accuracy[f"level/{level}"] for r in full if r.knobs["method"] == "concatenation"]
        if ceiling:
            axes.axhline(mean(ceiling), color="grey", linestyle="--", label="concatenation")
        axes.set_xscale("log")
        axes.set_title(f"{level} questions")
        axes.set_xlabel("GFLOPs of a prompt, without the vision encoder")
        axes.set_ylabel("right answers (%)")
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=120)


# --- the command ------------------------------------------------------------------------------------------------------


def time_methods(records: Sequence[Record], device: torch.device) -> None:
    """Add milliseconds to a record of each method, all in turns."""
    first = {r.knobs["method"]: r for r in records if r.knobs["share"] == 1.0 and r.knobs["seed"] == 0}
    measurements = []
    for record in first.values():
        scenario = Scenario(record.text_tokens, image=(64, 64))
        measurements.append(Measurement(record, scenario, partial(_model, record)))
    measure(measurements, device=device, track=partial(track, description="timing in turns"))


def _model(record: Record) -> Any:
    return load_run(Path(record.knobs["folder"]), overrides=record.knobs["changes"])[1]


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS), help="some of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of each method")
    parser.add_argument("--shares", nargs="+", type=float, help="of the steps; None: those of each method")
    parser.add_argument("--picture", type=path, metavar="FILE", help="draw the frontier")
    parser.add_argument("--time", action="store_true", help="time what is there, in turns, and train nothing")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise UserError(f"the lab has no method '{unknown[0]}': {nearest(unknown[0], METHODS)}")
    device = device_of(args.device)
    there = {key_of(r): r for r in read_records(args.out)} if args.out and args.out.is_file() else {}
    plan = [(n, seed, share) for seed in args.seeds for n in args.methods for share in args.shares or METHODS[n].shares]
    for name, seed, share in plan:
        if not args.time and any((variant, seed, share) not in there for variant in variants_of(name)):
            there |= {key_of(one): one for one in run_once(name, seed, share, device)}
            _write(there, args.out)
    if args.time:
        time_methods(list(there.values()), device)
        _write(there, args.out)
    keys = dict.fromkeys((variant, seed, share) for name, seed, share in plan for variant in variants_of(name))
    records = [there[key] for key in keys if key in there]
    console().print(table("scenes", *lab_table(records)))
    if args.picture:
        draw(records, args.picture)


def _write(records: dict[tuple[str, int, float], Record], out: Path | None) -> None:
    if out:
        with replacing(out) as part:
            part.unlink(missing_ok=True)  # of a run that was killed
            write_records(records.values(), part)


if __name__ == "__main__":
    main()

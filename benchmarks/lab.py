"""How well does each fusion answer, for what it costs? Trained on the built-in scenes and videos, with several seeds.

    make lab                                                            all of it; stopped, it goes on
    python benchmarks/lab.py --out benchmarks/results/lab.jsonl --methods concatenation LaVi --seeds 0

Each method trains from the same tower on the same data (recipes/lab), and is scored on held-out ones: easy and hard
question families apart, with its controls, beside the FLOPs of its prompts; last, all are timed in turns. A record is
written as each run ends, and one that is there is not trained again. The table gives means over seeds with 95 %
intervals (Student's t); the picture is the frontier of accuracy against FLOPs and, once timed, milliseconds.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from own_records import parser_of, read

from datamodules import moving, scenes
from lavi.checkpoints.model_folder import build
from lavi.checkpoints.run_folder import LAST, TRAINED, lock_run_folder
from lavi.cli.arguments import path
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.config.files import replacing
from lavi.efficiency.measure import Measurement, measure
from lavi.efficiency.record import Record, read_records, write_records
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError, nearest
from lavi.evaluation.compare_runs import score_run
from lavi.evaluation.controls import NO_IMAGE, SHUFFLED, noise_control
from lavi.recipe import Recipe
from lavi.report import console, table, track
from lavi.training.run import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPES, RUNS = Path("recipes/lab"), Path("runs/lab")
SEEDS = 3
"""Of the methods that the lab is about; what varies them is trained with one."""
SAVE_EVERY = 500
"""Steps of training that a kill loses at most."""
NOISE = (0.1, 0.3)
"""Deviations of the noise on test images, 1 from black to white."""
GENERATOR = "model.fusion.generator={{_target_: lavi.nn.delta_generators.{}, bottleneck: {}}}"


@dataclass(frozen=True)
class LabData:
    """What methods are trained on and scored with.

    Args:
        features: the folder of their cached features.
        levels: easy or hard, of each question family.
        baseline: the method that savings are against.
    """

    features: Path
    levels: dict[str, str]
    baseline: str

    @property
    def hard(self) -> list[str]:
        return [family for family, level in self.levels.items() if level == "hard"]


DATA = {
    "scenes": LabData(Path("data/lab-features"), scenes.LEVELS, "concatenation"),
    "videos": LabData(Path("data/lab-videos-features"), moving.LEVELS, "concatenation of frames"),
}


@dataclass(frozen=True)
class Method:
    """A recipe of the lab with changes.

    Args:
        shares: of the recipe's steps, the budgets it is trained with.
        seeds: how many it is trained with.
        variants: what one trained model is scored as, with the changes of each; by default as it is.
        data: what it is trained on, one of :data:`DATA`.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    seeds: int = SEEDS
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()
    data: str = "scenes"


def ablation(recipe: str, *changes: str) -> Method:
    """One key of a method changed: of half the steps, as the method itself is, too; one seed."""
    return Method(recipe, changes, shares=(0.5,), seeds=1)


METHODS: dict[str, Method] = {
    "concatenation": Method("concat", shares=(0.5, 1.0)),
    "LaVi": Method("lavi", shares=(0.5, 1.0)),
    "cross-attention": Method("cross_attention"),
    "VISOR": Method(
        "visor",
        variants=(
            ("VISOR, both refining", ()),
            ("VISOR, layer 2 refining", ("model.fusion.configuration=[2]",)),
            ("VISOR, none refining", ("model.fusion.configuration=none",)),
        ),
    ),
    "LaVi, MLP": ablation("lavi", GENERATOR.format("MLPDeltas", 96)),
    "LaVi, convolutions": ablation("lavi", GENERATOR.format("ConvDeltas", 96)),
    "LaVi, pooled": ablation("lavi", GENERATOR.format("PooledDeltas", 96)),
    "LaVi, scale alone": ablation("lavi", "model.fusion.parameters=scale"),
    "LaVi, shift alone": ablation("lavi", "model.fusion.parameters=shift"),
    "LaVi, attention's norms": ablation("lavi", "model.fusion.targets=[attention]"),
    "LaVi, feed-forward's norms": ablation("lavi", "model.fusion.targets=[ffn]"),
    "LaVi, every second layer": ablation("lavi", "model.fusion.every=2"),
    "LaVi, one layer": ablation("lavi", "model.fusion.every=4"),
    "LaVi, bottleneck 32": ablation("lavi", GENERATOR.format("AttentionDeltas", 32)),
    "LaVi, bottleneck 192": ablation("lavi", GENERATOR.format("AttentionDeltas", 192)),
    "LaVi, not from zero": ablation("lavi", "model.fusion.generator.initial_std=0.02"),
    "LaVi, no code of place": ablation("lavi", "model.fusion.grid_code=false"),
    "concatenation, pooled 2 x 2": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 2}"
    ),
    "concatenation, pooled 4 x 4": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.pooling.AveragePooling, factor: 4}"
    ),
    "concatenation, random quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.controls.RandomTokens, keep: 16}"
    ),
    "concatenation, DivPrune quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.diverse.DivPrune, keep: 16}"
    ),
    "concatenation, CDPruner quarter": ablation(
        "concat", "model.reducer={_target_: lavi.reduction.diverse.CDPruner, keep: 16}"
    ),
    "concatenation of frames": Method("video_concat", seeds=1, data="videos"),
    "LaVi of frames": Method("video_lavi", seeds=1, data="videos"),
}


def slug(name: str) -> str:
    """A name as that of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-").replace("--", "-")


def variants_of(name: str) -> list[str]:
    """What a method is scored as."""
    return [variant for variant, _ in METHODS[name].variants] or [name]


def method_of_variant() -> dict[str, str]:
    """The method that each variant is of."""
    return {variant: name for name in METHODS for variant in variants_of(name)}


def settings_of(name: str, seed: int, share: float, *changes: str) -> Recipe:
    """The recipe of one run: on cached features, of this share of the steps; ``changes`` are a variant's."""
    method = METHODS[name]
    file = RECIPES / f"{method.recipe}.yaml"
    steps = max(1, round(share * Recipe.load(file).settings["trainer"]["max_steps"]))
    features = [f"data.{split}={DATA[method.data].features / split}" for split in ("train", "validation", "test")]
    own = [f"seed={seed}", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    return Recipe.load(file, [*features, *own, *method.changes, *changes])


def digest_of(name: str, seed: int, share: float) -> str:
    """Tells runs and records of a method from those that it had before its recipe was changed."""
    return hashlib.sha256(settings_of(name, seed, share).yaml().encode()).hexdigest()[:12]


def run_once(name: str, seed: int, share: float, device: torch.device) -> list[Record]:
    """Train and score one run; one that was stopped goes on, one of another recipe begins anew.

    Raises:
        UserError: another process trains it at this moment.
    """
    method, settings, digest = METHODS[name], settings_of(name, seed, share), digest_of(name, seed, share)
    steps = settings.settings["trainer"]["max_steps"]
    folder = RUNS / slug(name) / f"{steps}-steps" / f"seed-{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_run_folder(folder):
        last = folder / LAST
        if not (folder / TRAINED).is_file() or last.is_file():
            if train(settings, folder, resume_from=last if last.is_file() else None, save_every=SAVE_EVERY):
                raise KeyboardInterrupt
            last.unlink(missing_ok=True)  # it is trained to the end: what is left is the run itself
        records = []
        for variant, changes in method.variants or ((name, ()),):
            overrides = list(changes)
            record = score_run(folder, overrides=overrides, trust=False, limit=None, device=device, noise=NOISE).record
            record.knobs |= {"method": variant, "seed": seed, "share": share, "steps": steps, "recipe": digest}
            record.knobs |= {"folder": str(folder), "changes": overrides, "data": method.data}
            records.append(record)
    return records


Key = tuple[str, int, float]
"""What tells the lab's records apart: method, seed and share of the steps."""


def key_of(record: Record) -> Key:
    """The key of a record."""
    return record.knobs["method"], record.knobs["seed"], record.knobs["share"]


def known(file: Path | None) -> dict[Key, Record]:
    """The records of a file, those left out whose method's recipe has been changed since."""
    if file is None or not file.is_file():
        return {}
    kept = {}
    for record in read_records(file):
        name = method_of_variant().get(record.knobs.get("method", ""))
        if name and record.knobs.get("recipe") == digest_of(name, record.knobs["seed"], record.knobs["share"]):
            kept[key_of(record)] = record
    return kept


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


def records_of(records: Sequence[Record], data: str) -> list[Record]:
    """The records of scenes, or of videos."""
    return [record for record in records if record.knobs["data"] == data]


def by_method(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each method and budget: one a seed. What had all its steps comes first."""
    keys = dict.fromkeys((r.knobs["method"], r.knobs["share"]) for r in sorted(records, key=_by_share))
    return [[r for r in records if (r.knobs["method"], r.knobs["share"]) == key] for key in keys]


def _by_share(record: Record) -> float:
    return -record.knobs["share"]


def lab_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: one row a method and budget."""
    data = DATA[records[0].knobs["data"]]
    hard = data.hard
    columns = ["method", "steps", "seeds", "easy %", "hard %", *(f"{family.replace('_', ' ')} %" for family in hard)]
    columns += ["GFLOPs, no encoder", "saved %", "first token, times concatenation"]
    baseline = next((without_encoder(r) for r in records if r.knobs["method"] == data.baseline), None)

    def saved(gflops: float) -> str:
        return "-" if baseline is None else f"{100 * (1 - gflops / baseline):.1f}"

    rows = []
    for of in by_method(records):
        groups = ["level/easy", "level/hard", *(f"family/{family}" for family in hard)]
        scores = [over_seeds([r.accuracy[group] for r in of]) for group in groups]
        cost = mean(without_encoder(r) for r in of)
        times = next((r.ratios["concat"]["first_token"] for r in of if "concat" in r.ratios), None)
        clock = "-" if times is None else "{:.2f} ({:.2f}-{:.2f})".format(*times)
        first = [of[0].knobs["method"], f"{of[0].knobs['steps']:,}", str(len(of))]
        rows.append([*first, *scores, f"{cost:.4f}", saved(cost), clock])
    floor = mean(r.flops_of_samples["floor"] for r in records) / 1e9
    nothing = ["-"] * (2 + 2 + len(hard))
    rows.append(["the language model on the text alone", *nothing, f"{floor:.4f}", saved(floor), "-"])
    return columns, rows


def controls_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Right answers to hard questions about the images, others, none, and noisy ones; of each method's longest runs."""
    controls = (SHUFFLED, NO_IMAGE, *map(noise_control, NOISE))
    columns = ["hard questions, right %", "their images", *controls]
    rows = []
    for of in longest(records):
        scores = [[r.accuracy for r in of], *([r.controls[name] for r in of] for name in controls)]
        cells = (over_seeds([score.get("level/hard", nan) for score in column]) for column in scores)
        rows.append([of[0].knobs["method"], *cells])
    return columns, rows


def longest(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each method with the most steps that it had."""
    first: dict[str, list[Record]] = {}
    for of in by_method(records):
        first.setdefault(of[0].knobs["method"], of)
    return list(first.values())


def without_encoder(record: Record) -> float:
    """GFLOPs of a prompt, the mean over the test samples."""
    parts = record.flops_of_samples
    return sum(value for part, value in parts.items() if part not in ("floor", "vision_encoder")) / 1e9


def milliseconds(record: Record) -> float | None:
    """To the first token, without the vision encoder; None: not timed."""
    times = record.milliseconds.get("prefill")
    return times[0] if times else None


def draw(records: Sequence[Record]) -> Figure:
    """The frontier: accuracy against FLOPs and milliseconds, easy and hard apart.

    The cost of the language model on the text alone and the accuracy of concatenation are drawn as lines; hollow: of
    half the steps.
    """
    from matplotlib.figure import Figure

    costs: dict[str, Callable[[Record], float | None]] = {"GFLOPs of a prompt": without_encoder}
    if any(milliseconds(r) for r in records):
        costs["milliseconds to the first token"] = milliseconds
    figure = Figure(figsize=(11, 4.5 * len(costs)), layout="constrained")
    grid = figure.subplots(len(costs), 2, squeeze=False)
    for row, (label, cost_of) in zip(grid, costs.items(), strict=True):
        for axes, level in zip(row, ("easy", "hard"), strict=True):
            for of in by_method(records):
                name, whole = of[0].knobs["method"], of[0].knobs["share"] == 1.0
                scores = [r.accuracy[f"level/{level}"] for r in of]
                told = [cost for cost in map(cost_of, of) if cost is not None]
                if not told:
                    continue
                at = (mean(told), mean(scores))
                fill = "full" if whole else "none"
                axes.errorbar(*at, yerr=half_width(scores), fmt="o", fillstyle=fill, markersize=5, capsize=2)
                axes.annotate(name, at, fontsize=8 if whole else 6, xytext=(4, 4), textcoords="offset points")
                if whole and name == "concatenation":
                    axes.axhline(mean(scores), color="grey", linestyle="--", label="concatenation")
            if cost_of is without_encoder:
                floor = mean(r.flops_of_samples["floor"] for r in records) / 1e9
                axes.axvline(floor, color="grey", linestyle=":", label="language model on the text alone")
            axes.set(xscale="log", title=f"{level} questions", ylabel="right answers (%)")
            axes.set_xlabel(f"{label}, without the vision encoder")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
    return figure


def write_tensorboard(records: Sequence[Record], folder: Path) -> None:
    """The picture, and each method's accuracy and cost, in the place of what was there."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        writer.add_figure("accuracy against cost", draw(records))
        for of in by_method(records):
            name, steps = of[0].knobs["method"], of[0].knobs["steps"]
            for level in ("easy", "hard"):
                writer.add_scalar(f"{level}/{name}", mean(r.accuracy[f"level/{level}"] for r in of), steps)
            writer.add_scalar(f"GFLOPs without vision encoder/{name}", mean(map(without_encoder, of)), steps)


# --- the command ------------------------------------------------------------------------------------------------------


def time_methods(records: Sequence[Record], device: torch.device) -> None:
    """Add milliseconds to a record of each method on scenes, all in turns; weights say nothing of time."""
    first = {of[0].knobs["method"]: of[0] for of in longest(records_of(records, "scenes"))}
    baseline = first.pop(DATA["scenes"].baseline, None)  # times are told in those of the first concatenation
    measurements = []
    for record in filter(None, [baseline, *first.values()]):
        scenario = Scenario(record.text_tokens, image=(scenes.SIDE, scenes.SIDE))
        measurements.append(Measurement(record, scenario, partial(_model, record)))
    measure(measurements, device=device, track=partial(track, description="timing in turns"))


def _model(record: Record) -> Any:
    name = method_of_variant()[record.knobs["method"]]
    return build(settings_of(name, 0, record.knobs["share"], *record.knobs["changes"])).eval()


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS), help="some of them")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="None: as many as each method has")
    parser.add_argument("--shares", nargs="+", type=float, help="of the steps; None: those of each method")
    parser.add_argument("--picture", type=path, metavar="FILE", help="draw the frontier")
    parser.add_argument("--time", action="store_true", help="time what is there, in turns, and train nothing")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    args = read(parser)
    if unknown := [name for name in args.methods if name not in METHODS]:
        raise UserError(f"the lab has no method '{unknown[0]}': {nearest(unknown[0], METHODS)}")
    device = device_of(args.device)
    there = known(args.out)
    for name, seed, share in plan(args.methods, args.seeds, args.shares):
        if not args.time and any((variant, seed, share) not in there for variant in variants_of(name)):
            there = written({key_of(one): one for one in run_once(name, seed, share, device)}, there, args.out)
    if args.time:
        time_methods(list(there.values()), device)
        there = written(there, there, args.out)
    for data in DATA:
        if records := records_of(list(there.values()), data):
            console().print(table(data, *lab_table(records)))
            console().print(table(f"{data}, controls", *controls_table(records)))
    if records := records_of(list(there.values()), "scenes"):
        write_tensorboard(records, RUNS / "frontier")
        if args.picture:
            draw(records).savefig(args.picture, dpi=110)


def plan(
    names: Sequence[str], seeds: Sequence[int] | None, shares: Sequence[float] | None
) -> list[tuple[str, int, float]]:
    """The runs: method, seed and share of the steps. Each method's first seed comes before the second of any."""
    runs = [
        (name, seed, share)
        for name in names
        for seed in (range(METHODS[name].seeds) if seeds is None else seeds)
        for share in shares or METHODS[name].shares
    ]
    return sorted(runs, key=lambda run: run[1])


def written(new: dict[Key, Record], there: dict[Key, Record], out: Path | None) -> dict[Key, Record]:
    """All records, with the new ones; they are in the file, beside those that other processes wrote meanwhile."""
    if out is None:
        return there | new
    with FileLock(f"{out}.lock"):
        there = there | known(out) | new
        with replacing(out) as part:
            part.unlink(missing_ok=True)  # of a run that was killed
            write_records(there.values(), part)
    return there


if __name__ == "__main__":
    main()

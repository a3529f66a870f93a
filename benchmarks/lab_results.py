"""What the lab found (:mod:`lab`): its tables, its picture, its page in TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from datamodules import moving, scenes
from lavi.efficiency.record import Record
from lavi.evaluation.controls import NO_IMAGE, SHUFFLED, noise_control

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = (0.1, 0.3)
"""Deviations of the noise on test images, 1 from black to white."""


@dataclass(frozen=True)
class LabData:
    """What methods are trained on and scored with.

    Args:
        features: the folder of their cached features; where the encoder is varied, of the pixels.
        levels: easy or hard, of each question family.
        baseline: the method that savings are against.
        varies: the method whose encoder is varied on them; None: methods are trained on them.
        beside: the data, in the same table, of what was trained with such an encoder.
    """

    features: Path
    levels: dict[str, str]
    baseline: str
    varies: str | None = None
    beside: str | None = None

    @property
    def large(self) -> bool:
        """Whether they are of large pictures."""
        return "large" in self.features.name

    @property
    def hard(self) -> list[str]:
        return [family for family, level in self.levels.items() if level == "hard"]


DATA = {
    "scenes": LabData(Path("data/lab-features"), scenes.LEVELS, "concatenation"),
    "encoder": LabData(Path("data/lab"), scenes.LEVELS, "concatenation", varies="LaVi", beside="merged"),
    "merged": LabData(Path("data/lab-merged-features"), scenes.LEVELS, "concatenation"),
    "large": LabData(Path("data/lab-large-features"), scenes.LEVELS, "concatenation of large pictures"),
    "tiles": LabData(Path("data/lab-large"), scenes.LEVELS, "LaVi of large pictures", varies="LaVi of large pictures"),
    "dropped": LabData(
        Path("data/lab-large"),
        scenes.LEVELS,
        "LaVi of large pictures",
        varies="LaVi of large pictures, tiles dropped",
    ),
    "levels": LabData(Path("data/lab-large-levels-features"), scenes.LEVELS, "concatenation of large pictures"),
    "levels tiles": LabData(
        Path("data/lab-large"),
        scenes.LEVELS,
        "LaVi of large pictures",
        varies="LaVi of large pictures, levels of the tower",
    ),
    "VISOR tiles": LabData(
        Path("data/lab-large"),
        scenes.LEVELS,
        "LaVi of large pictures",
        varies="VISOR of large pictures, layer 2 refining",
    ),
    "videos": LabData(Path("data/lab-videos-features"), moving.LEVELS, "concatenation of frames"),
}


T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Of Student's distribution, by degrees of freedom from 1."""


def over_seeds(values: Sequence[float]) -> str:
    """The mean, with its 95 % interval where there are three or more; the values of one or two."""
    if len(values) < 3:
        return " / ".join(f"{value:.1f}" for value in values)
    half = half_width(values)
    return f"{mean(values):.1f} ± {half:.1f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean; 0 of one or two values, of which there is none worth telling."""
    if len(values) < 3:
        return 0.0
    return T_95[min(len(values) - 1, len(T_95)) - 1] * stdev(values) / sqrt(len(values))


def records_of(records: Sequence[Record], *data: str) -> list[Record]:
    """The records of scenes, of videos, or of several of :data:`DATA`."""
    return [record for record in records if record.knobs["data"] in data]


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


def encoder_cost_table(records: Sequence[Record], data: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what a smaller encoder costs in accuracy, and saves with the encoder counted.

    Args:
        records: of all data; the first row is the method with its whole encoder.
    """
    about = DATA[data]
    hard = about.hard
    columns = ["encoder", "seeds", "easy %", "hard %", *(f"{family.replace('_', ' ')} %" for family in hard)]
    columns += ["encoder GFLOPs", "of the whole %", "saved, with encoder %"]
    trained = [of for of in longest(records) if of[0].knobs["method"] == about.varies]
    baseline = [r for r in records if r.knobs["method"] == about.baseline]
    rows = []
    varied = [r for r in records if r.knobs["data"] in (data, about.beside)]
    for of in [*trained, *longest(varied)]:
        groups = ["level/easy", "level/hard", *(f"family/{family}" for family in hard)]
        share = f"{100 * encoder_of(of) / encoder_of(trained[0]):.0f}" if trained else "-"
        total, other = (mean(map(without_encoder, some)) + encoder_of(some) if some else nan for some in (of, baseline))
        saved = f"{100 * (1 - total / other):.1f}" if baseline else "-"
        name = "whole" if of in trained else of[0].knobs["method"]
        scores = [over_seeds([r.accuracy[group] for r in of]) for group in groups]
        rows.append([name, str(len(of)), *scores, f"{encoder_of(of):.4f}", share, saved])
    return columns, rows


def encoder_of(records: Sequence[Record]) -> float:
    """GFLOPs of the vision encoder for a prompt, the mean over test samples and runs."""
    return mean(r.flops_of_samples["vision_encoder"] for r in records) / 1e9


def controls_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Right answers to hard questions about the images, others, none, and noisy ones; of what had all its steps."""
    controls = (SHUFFLED, NO_IMAGE, *map(noise_control, NOISE))
    columns = ["hard questions, right %", "their images", *controls]
    rows = []
    for of in longest([r for r in records if r.knobs["share"] >= 1]):
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


MARKERS = "osD^vP*X"
"""Of the methods in a picture: where two lie on each other, both are seen."""


def draw(records: Sequence[Record]) -> Figure:
    """The frontier: accuracy against FLOPs and milliseconds, easy and hard apart.

    The cost of the language model on the text alone and the accuracy of concatenation are drawn as lines. What had
    fewer or more steps than the others stands in the table alone: names of thirty methods cannot be read in a picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    records = [r for r in records if r.knobs["share"] == 1.0]
    costs: dict[str, Callable[[Record], float | None]] = {"GFLOPs of a prompt": without_encoder}
    if any(milliseconds(r) for r in records):
        costs["milliseconds to the first token"] = milliseconds
    figure = Figure(figsize=(12, 3.6 * len(costs)), layout="constrained")
    grid = figure.subplots(len(costs), 2, squeeze=False)
    points: dict[str, Any] = {}
    for row, (label, cost_of) in zip(grid, costs.items(), strict=True):
        for axes, level in zip(row, ("easy", "hard"), strict=True):
            for number, of in enumerate(by_method(records)):
                name = of[0].knobs["method"]
                scores = [r.accuracy[f"level/{level}"] for r in of]
                told = [cost for cost in map(cost_of, of) if cost is not None]
                if not told:
                    continue
                at = (mean(told), mean(scores))
                looks = {"fmt": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}", "alpha": 0.7}
                points[name] = axes.errorbar(*at, yerr=half_width(scores), markersize=7, capsize=2, **looks)
                if name == "concatenation":
                    axes.axhline(mean(scores), color="grey", linestyle="--", label="concatenation")
            if records and cost_of is without_encoder:
                floor = mean(r.flops_of_samples["floor"] for r in records) / 1e9
                axes.axvline(floor, color="grey", linestyle=":", label="language model on the text alone")
            lowest = min((r.accuracy[f"level/{level}"] for r in records), default=100.0)
            axes.set(xscale="log", title=f"{level} questions", ylabel="right answers (%)")
            axes.set_ylim(min(80.0, lowest - 10), 101)  # no part of a percent across the whole picture
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"{label}, without the vision encoder")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, loc="lower left")
    figure.legend(points.values(), points, loc="outside right upper", fontsize=8)
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

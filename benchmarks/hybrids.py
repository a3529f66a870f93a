"""Which hybrid of a fusion and a cheaper encoder is the best point of the frontier, with the encoder counted?

    make lab-large                     (its last part alone: python benchmarks/hybrids.py --picture docs/hybrids.png)

Accuracy is that of the lab on large pictures with small letters (benchmarks/results/lab.jsonl); FLOPs are those of the
same fusion and encoder at full size: SigLIP-so400m and Qwen2-0.5B, 1024 x 1024, counted on the meta device, against
LLaVA-OneVision-0.5B. The same means: half or a quarter of the tiles, and as large a share of a view's tokens merged
behind each block. A hybrid is on the frontier if none that costs as little answers as many hard questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

from compare import (
    BASE,
    BASELINE_NAME,
    LAB,
    LARGE,
    LAVI,
    REFINING_TWO,
    SEVERAL_LAYERS,
    TOWER,
    VISOR,
    times_fewer,
)
from own_records import parser_of, read
from verify_claims import recipe_at

from lavi.cli.arguments import path
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.measure import build_on, count
from lavi.efficiency.record import Record, read_records, write_records
from lavi.report import console, table, track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MERGED_A_BLOCK = 22
"""Of 729 tokens in 26 blocks: a block works on 62 % of them on average, as with 16 of 64 in the lab's four."""


@dataclass(frozen=True)
class FusionAtFullSize:
    """A fusion on large pictures: as the lab scored it, and as it is counted.

    Args:
        lab: what the lab calls it with its whole encoder.
        suffix: what the lab appends to the names of others.
        recipe: at full size, with ``changes`` to its model.
        layers: of the tower that it sees; None: the one that its recipe names.
    """

    lab: str
    suffix: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None


FUSIONS = {
    "LaVi": FusionAtFullSize("LaVi of large pictures", "", LAVI),
    "LaVi, levels of the tower": FusionAtFullSize(
        "LaVi of large pictures, levels of the tower",
        ", levels",
        LAVI,
        {"fusion.levels": SEVERAL_LAYERS["fusion.levels"]},
        SEVERAL_LAYERS["vision.layer"],
    ),
    "VISOR": FusionAtFullSize("VISOR of large pictures, layer 2 refining", ", VISOR", VISOR, REFINING_TWO),
}
WHOLE, ALONE = "whole", "none: the whole picture alone"
ENCODERS: dict[str, tuple[float, bool]] = {
    WHOLE: (1.0, False),
    "2 of 4, by the question": (0.5, False),
    "1 of 4, by the question": (0.25, False),
    "all, 16 of 64 tokens merged behind each block": (1.0, True),
    "1 of 4, by the question, 16 merged behind each block": (0.25, True),
    ALONE: (0.0, False),
}
"""The share of the tiles that is encoded, and whether tokens are merged, by the lab's names."""


def vision_of(fusion: FusionAtFullSize, keep: float, merging: bool) -> dict[str, Any]:
    """The vision backbone at full size, as a recipe names it."""
    tower = TOWER | ({} if fusion.layers is None else {"layer": fusion.layers})
    if merging:
        merged = {"_target_": "lavi.vision.token_merging.TokenMerging", "per_block": MERGED_A_BLOCK}
        tower = {"_target_": "lavi.vision.reduced.ReducedTower", "tower": tower, "reductions": [merged]}
    if 0 < keep < 1:
        return {"_target_": "lavi.vision.tiles_on_request.TilesOnRequest", "tower": tower, "keep": keep}
    return tower


def counted(name: str, encoder: str) -> Record:
    """FLOPs of a fusion with an encoder at full size; of the baseline with its own."""
    fusion = FUSIONS.get(name, FusionAtFullSize("", "", BASE))
    recipe = recipe_at(fusion.recipe)
    if name != BASELINE_NAME:
        keep, merging = ENCODERS[encoder]
        changes = fusion.changes | {"vision": vision_of(fusion, keep, merging)}
        for key, value in (changes if keep else changes | {"tiling": None}).items():
            recipe = recipe.replaced(f"model.{key}", value)
    record = count(recipe, build_on(recipe, "meta"), LARGE)
    record.knobs = {"name": name, "encoder": encoder, "scenario": str(LARGE)}
    return record


@dataclass(frozen=True)
class Hybrid:
    """A fusion with an encoder: right answers in the lab (%), and FLOPs at full size with the encoder."""

    fusion: str
    encoder: str
    easy: float
    hard: float
    reading: float
    teraflops: float
    times_fewer: float


def hybrids_of(records: Sequence[Record], lab: Sequence[Record]) -> list[Hybrid]:
    """What was both counted and scored, in the order of the records; the mean over seeds."""
    base = next(record for record in records if record.knobs["name"] == BASELINE_NAME)
    found = []
    for record in records:
        name, encoder = record.knobs["name"], record.knobs["encoder"]
        if name not in FUSIONS:
            continue
        fusion = FUSIONS[name]
        method = fusion.lab if encoder == WHOLE else encoder + fusion.suffix
        if not (runs := [one for one in lab if one.knobs["method"] == method]):
            continue
        scores = [mean(one.accuracy[key] for one in runs) for key in ("level/easy", "level/hard", "family/reading")]
        fewer = times_fewer(record, base, encoder=True)[0]
        found.append(Hybrid(name, encoder, *scores, record.gflops_total / 1e3, fewer))
    return found


def frontier(hybrids: Sequence[Hybrid]) -> list[Hybrid]:
    """Those that no other beats on hard questions at as few FLOPs, the cheapest first."""
    best: list[Hybrid] = []
    for one in sorted(hybrids, key=lambda hybrid: (hybrid.teraflops, -hybrid.hard)):
        if not best or one.hard > best[-1].hard:
            best.append(one)
    return best


def hybrids_table(records: Sequence[Record], lab: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy in the lab beside FLOPs at full size."""
    columns = ["fusion", "encoder", "easy %", "hard %", "reading %", "at full size: TFLOPs", "times fewer", "frontier"]
    hybrids = hybrids_of(records, lab)
    best = frontier(hybrids)
    rows = []
    for one in hybrids:
        scores = [f"{score:.1f}" for score in (one.easy, one.hard, one.reading)]
        cost = [f"{one.teraflops:.2f}", f"{one.times_fewer:.2f}"]
        rows.append([one.fusion, one.encoder, *scores, *cost, "yes" if one in best else ""])
    return columns, rows


def draw(hybrids: Sequence[Hybrid]) -> Figure:
    """Right answers against FLOPs with the encoder: a shape for each fusion, a colour for each encoder."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    shapes, colours = dict(zip(FUSIONS, "os^", strict=True)), {name: f"C{n}" for n, name in enumerate(ENCODERS)}
    best = frontier(hybrids)
    costs, scores = [one.teraflops for one in best], [one.hard for one in best]
    axes.step(costs, scores, where="post", color="grey", linestyle="--", linewidth=1, label="frontier")
    for one in hybrids:
        axes.plot(one.teraflops, one.hard, shapes[one.fusion], color=colours[one.encoder], markersize=8, alpha=0.8)
    for name, shape in shapes.items():
        axes.plot([], [], shape, color="black", label=name)
    for name, colour in colours.items():
        axes.plot([], [], "s", color=colour, label=name)
    axes.set(xscale="log", xlabel="TFLOPs of a prompt at full size, with the vision encoder")
    axes.set(ylabel="right answers to hard questions (%)", title="Large pictures with small letters")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=8, loc="lower right")
    return figure


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--picture", type=path, metavar="FILE", help="draw the frontier")
    args = read(parser)
    pairs = [(BASELINE_NAME, WHOLE), *((fusion, encoder) for fusion in FUSIONS for encoder in ENCODERS)]
    records = [counted(*pair) for pair in track(pairs, description="counting")]
    lab = read_records(LAB) if LAB.is_file() else []
    console().print(table(f"Hybrids at {LARGE}", *hybrids_table(records, lab)))
    if args.out:
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)
    if args.picture:
        draw(hybrids_of(records, lab)).savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()

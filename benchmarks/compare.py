"""All methods against LLaVA-OneVision-0.5B: FLOPs, ceilings, estimated and measured time, memory, accuracy in the lab.

    make compare      (or: python benchmarks/compare.py --out benchmarks/results/compare.jsonl)

FLOPs are counted on the meta device from the recipes, with and without the vision encoder, beside what the arithmetic
allows: the same without any visual work at all. Time and memory at full size are *estimated* for a GPU that is not
there. VISOR's claims (quoted from secondary notes on arXiv 2603.23495, which speak of the language part: 8.6x fewer
FLOPs, 18x with a reducer before it) are held against each configuration, named SA/CA: how many layers refine the visual
tokens, how many read them. The paper's own figure is a mean over what its router chose, which is not known: full and
none bound it. All methods are timed, too, in one run: at full size on a GPU, elsewhere as small models, which gives
ratios and no GPU figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from encoder import shows
from own_records import parser_of, read
from verify_claims import MERGED, ROOT, TEXT, build_for_timing, itself, milliseconds, recipe_at, shrunk, times_as_fast

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.estimated import note_estimates
from lavi.efficiency.hardware import DEVICES
from lavi.efficiency.latency import TURNS
from lavi.efficiency.measure import Measurement, count, measure
from lavi.efficiency.record import Record, read_records, write_records
from lavi.efficiency.scenario import Scenario
from lavi.recipe import Recipe
from lavi.report import console, table, track

BASELINE_NAME = "LLaVA-OneVision-0.5B"
BASE = "baselines/llava_onevision_0_5b"
VISOR = "visor/qwen2_0_5b_siglip_stage1"
LAVI = "lavi/qwen2_0.5b_siglip"
REDUCED = "baselines/visionzip_0_5b"
CLAIM, CLAIM_REDUCED = 8.6, 18.0
LAB = Path(__file__).parent / "results" / "lab.jsonl"


@dataclass(frozen=True)
class Entry:
    """One method: a recipe with changes to its model.

    Args:
        claim: how many times fewer FLOPs of the language part are claimed; None: nothing is.
        lab: what of the lab is most like it (:mod:`lab`); None: nothing.
    """

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    claim: float | None = None
    lab: str | None = None


def reducer(name: str, **arguments: Any) -> dict[str, Any]:
    """A reducer of visual tokens, by its path in :mod:`lavi.reduction`."""
    return {"reducer": {"_target_": f"lavi.reduction.{name}", **arguments}}


HALVED = reducer("visionzip.VisionZip", dominant=324, contextual=40)
POOLED = reducer("pooling.AveragePooling", factor=2)
THINNED = "concatenation,"
QUARTER = 182
"""Of a view's 729 tokens."""
MERGED_TOWER = Recipe.load(ROOT / "recipes" / f"{MERGED}.yaml").settings["model"]["vision"]
TOWER = MERGED_TOWER["tower"]
ON_REQUEST = {"_target_": "lavi.vision.tiles_on_request.TilesOnRequest", "tower": TOWER, "keep": 0.25}
SEVERAL_LAYERS = {"vision.layer": [9, 17, -2], "fusion.levels": 3}
REFINING_TWO = {"fusion.configuration": [4, 15]}

METHODS: dict[str, Entry] = {
    "VISOR 0/6": Entry(VISOR, {"fusion.self_attention": 0, "fusion.cross_attention": 6}, CLAIM),
    "VISOR 0/8": Entry(VISOR, {"fusion.configuration": "none"}, CLAIM, lab="VISOR, none refining"),
    "VISOR 2/8": Entry(VISOR, REFINING_TWO, CLAIM, lab="VISOR, layer 2 refining"),
    "VISOR 4/8": Entry(VISOR, {"fusion.configuration": [4, 9, 15, 19]}, CLAIM),
    "VISOR 8/8": Entry(VISOR, {}, CLAIM, lab="VISOR, both refining"),
    "VISOR-TR 2/8, half the tokens": Entry(VISOR, REFINING_TWO | HALVED, CLAIM_REDUCED),
    "VISOR-TR 2/8, 2 x 2 pooled": Entry(VISOR, REFINING_TWO | POOLED, CLAIM_REDUCED),
    "VISOR-TR 8/8, 2 x 2 pooled": Entry(VISOR, POOLED, CLAIM_REDUCED),
    "LaVi reads, 4 refine": Entry("visor/qwen2_0_5b_siglip_modulation", {}, CLAIM),
    "LaVi": Entry(LAVI, lab="LaVi"),
    "LaVi, levels of the tower": Entry(LAVI, SEVERAL_LAYERS),
    "cross-attention": Entry("baselines/cross_attention_0_5b", lab="cross-attention"),
    "CASA": Entry("baselines/casa_0_5b"),
    "ViCA": Entry("baselines/vica_0_5b", lab="ViCA, layers 0 and 2 reading"),
    "ShortV": Entry("baselines/shortv_0_5b", lab="ShortV, layers 0 and 3 reading"),
    "late injection": Entry("baselines/late_injection_0_5b", lab="late injection, from layer 2"),
    "HiDrop": Entry("baselines/hidrop_0_5b"),
    "DeepStack": Entry("baselines/deepstack_0_5b"),
    "FastV": Entry("baselines/fastv_0_5b"),
    "PyramidDrop": Entry("baselines/pyramid_drop_0_5b"),
    "VisionZip": Entry(REDUCED),
    "a quarter, at random": Entry(
        REDUCED, reducer("controls.RandomTokens", keep=QUARTER), lab=f"{THINNED} random quarter"
    ),
    "a quarter, DivPrune": Entry(REDUCED, reducer("diverse.DivPrune", keep=QUARTER), lab=f"{THINNED} DivPrune quarter"),
    "a quarter, CDPruner": Entry(REDUCED, reducer("diverse.CDPruner", keep=QUARTER), lab=f"{THINNED} CDPruner quarter"),
    "a quarter, DART": Entry(REDUCED, reducer("diverse.DART", keep=QUARTER), lab=f"{THINNED} DART quarter"),
    "LaVi, merging in the tower": Entry(LAVI, {"vision": MERGED_TOWER}, lab="16 merged behind each block"),
    "LaVi, tiles on request": Entry(LAVI, {"vision": ON_REQUEST}),
    "VISOR 2/8, merging in the tower": Entry("visor/qwen2_0_5b_siglip_merged"),
    "VISOR 2/8, tiles on request": Entry("visor/qwen2_0_5b_siglip_tiles_on_request"),
}
SCENARIOS = [Scenario(TEXT, image=(384, 384)), Scenario(TEXT, image=(1024, 1024)), Scenario(TEXT, frames=32)]
LARGE = SCENARIOS[1]
"""The input whose time and memory are estimated."""
TIMED = {"cuda": LARGE, "cpu": SCENARIOS[0]}
"""What is timed; at 1024 x 1024 the baseline's attention alone takes a CPU half a minute a run."""
ESTIMATED_ON = DEVICES["h100"]


def recipe_of(method: str) -> Recipe:
    """A method's recipe; ``LLaVA-OneVision-0.5B``, or one of :data:`METHODS`."""
    entry = METHODS.get(method, Entry(BASE))
    recipe = recipe_at(entry.recipe)
    for key, value in entry.changes.items():
        recipe = recipe.replaced(f"model.{key}", value)
    recipe.settings["name"] = method
    return recipe


def counts() -> list[Record]:
    """One record for each method and input."""
    records = []
    for method in track([BASELINE_NAME, *METHODS], description="counting"):
        recipe = recipe_of(method)
        model = build_for_timing(recipe, "meta")
        for scenario in SCENARIOS:
            record = count(recipe, model, scenario)
            record.knobs = {"name": method, "scenario": str(scenario)}
            if scenario is LARGE:
                note_estimates(record, model, scenario, [ESTIMATED_ON])
            records.append(record)
    return records


def by_input(records: Sequence[Record], method: str) -> dict[str, Record]:
    """The counted records of a method."""
    return {r.knobs["scenario"]: r for r in records if r.knobs["name"] == method and not r.milliseconds}


def claims_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how many times fewer FLOPs, the ceiling, and whether the claim holds, for each input."""
    base = by_input(records, BASELINE_NAME)
    columns = ["method", "input", "LM TFLOPs", "times fewer (ceiling)", "claim"]
    rows = []
    for name, entry in METHODS.items():
        for scenario, record in by_input(records, name).items() if entry.claim else ():
            other = base[scenario]
            times, ceiling = times_fewer(record, other, encoder=False)
            assert entry.claim is not None
            verdict = f"{'PASS' if times >= entry.claim else 'FAIL'} ({entry.claim:g}x)"
            rows.append(
                [name, scenario, f"{record.gflops_language / 1e3:.2f}", f"{times:.1f} ({ceiling:.0f})", verdict]
            )
    return columns, rows


def times_fewer(record: Record, other: Record, *, encoder: bool) -> tuple[float, float]:
    """How many times fewer FLOPs than another's, and than without any visual work but the encoder's."""
    floor = record.flops_floor / 1e9 + (other.flops["vision_encoder"] / 1e9 if encoder else 0.0)
    own, all_of_it = (r.gflops_total if encoder else r.gflops_language for r in (record, other))
    return all_of_it / own, all_of_it / floor


def compare_table(records: Sequence[Record], lab: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each method at a large image.

    Args:
        lab: the records of the lab.
    """
    base = by_input(records, BASELINE_NAME)[str(LARGE)]
    columns = ["method", "LM TFLOPs", "times fewer", "with encoder TFLOPs", "times fewer"]
    columns += [f"ms to the first token, {ESTIMATED_ON.name}, estimated", "times as fast"]
    columns += ["MiB above weights, estimated", "its like in the lab: hard %"]
    rows = []
    for name in [BASELINE_NAME, *METHODS]:
        if (record := by_input(records, name).get(str(LARGE))) is None:
            continue
        fewer, fewer_in_all = (times_fewer(record, base, encoder=encoder)[0] for encoder in (False, True))
        own, other = (one.estimated_milliseconds[ESTIMATED_ON.name]["first_token"] for one in (record, base))
        cells = [f"{record.gflops_language / 1e3:.2f}", f"{fewer:.1f}", f"{record.gflops_total / 1e3:.2f}"]
        cells += [f"{fewer_in_all:.2f}", f"{own:.0f}", f"{other / own:.2f}", f"{record.estimated_mib['peak']:,.0f}"]
        rows.append([name, *cells, in_the_lab(lab, METHODS[name].lab if name in METHODS else "concatenation")])
    floor, encoder = base.flops_floor / 1e12, base.flops["vision_encoder"] / 1e12
    ceiling, with_encoder = (times_fewer(base, base, encoder=encoder)[1] for encoder in (False, True))
    cells = [f"{floor:.2f}", f"{ceiling:.1f}", f"{floor + encoder:.2f}", f"{with_encoder:.2f}"]
    rows.append(["the language model on the text alone", *cells, "-", "-", "-", "-"])
    return columns, rows


def in_the_lab(lab: Sequence[Record], method: str | None) -> str:
    """Hard questions that a method of the lab answered (%): the mean over its longest runs."""
    runs = [record for record in lab if record.knobs["method"] == method]
    if not runs:
        return "-"
    most = max(record.knobs["share"] for record in runs)
    longest = [record for record in runs if record.knobs["share"] == most]
    hard = mean(record.accuracy["level/hard"] for record in longest)
    return f"{hard:.1f}" if most == 1 else f"{hard:.1f} (of {longest[0].knobs['steps']:,} steps)"


def timed(device: torch.device, runs: int) -> list[Record]:
    """Prefill and decoding of every method at one input, in turns: full size on a GPU, else small."""
    small, scenario, measurements = device.type != "cuda", TIMED[device.type], []
    # A small tower has too few blocks to merge in, and this input one tile: what encoders save is in encoder.py.
    methods = [name for name in METHODS if not small or "tower" not in recipe_of(name).settings["model"]["vision"]]
    for method in track([BASELINE_NAME, *methods], description="building"):
        recipe = shrunk(recipe_of(method), layers=24) if small else recipe_of(method)
        model = build_for_timing(recipe, device)
        record = count(recipe, model, scenario)
        record.knobs = {"name": method, "scenario": str(scenario), "timed": "small" if small else "full"}
        measurements.append(Measurement(record, scenario, partial(itself, model)))
    bar = partial(track, description="timing")
    measure(measurements, device=device, runs=runs, stages=("first_token", "prefill", "decode"), track=bar)
    return [one.record for one in measurements]


def speed_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: whether the FLOPs that are saved show on the clock."""
    measured = [record for record in records if record.milliseconds]
    base = next(record for record in measured if record.knobs["name"] == BASELINE_NAME)
    columns = ["method", "LM FLOPs: times fewer", "prefill ms", "times as fast", "with encoder FLOPs: times fewer"]
    columns += ["first token ms", "times as fast", "decode ms", "times as fast", "peak MiB", "shows on the clock"]
    rows = []
    for record in measured:
        fewer = f"{base.gflops_language / record.gflops_language:.1f}"
        in_flops = times_fewer(record, base, encoder=True)[0]
        ratio = record.ratio("concat", "first_token")
        verdict = "" if record is base else "-"
        if ratio is not None:
            verdict = "noisy" if ratio.noisy else shows(in_flops, 1 / ratio.high)
        cells = [fewer, milliseconds(record, "prefill"), times_as_fast(record, base, "prefill")[1], f"{in_flops:.2f}"]
        cells += [milliseconds(record, "first_token"), times_as_fast(record, base, "first_token")[1]]
        cells += [milliseconds(record, "decode"), times_as_fast(record, base, "decode")[1]]
        cells += [f"{record.mib['peak']:.0f}", verdict]
        rows.append([record.knobs["name"], *cells])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=whole_number(0), default=TURNS, help="timed turns of each stage; 0: count")
    args = read(parser)
    records = counts()
    counted = len(records)
    title = f"FLOPs of a prompt of {TEXT} text tokens against {BASELINE_NAME} (1 multiply-add = 2 FLOPs)"
    console().print(table(title, *claims_table(records)))
    lab = read_records(LAB) if LAB.is_file() else []
    console().print(table(f"All methods at {LARGE}", *compare_table(records, lab)))
    if args.out:  # what is counted is not lost when the timing is stopped
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)
    if args.runs == 0:
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    records += timed(device, args.runs)
    where = torch.cuda.get_device_name() if cuda else "small models on the CPU: ratios, no GPU figure exists"
    console().print(table(f"Time at {TIMED[device.type]}; {where}", *speed_table(records)))
    print(NOTE)
    if args.out:
        write_records(records[counted:], args.out)


if __name__ == "__main__":
    main()

"""Do VISOR's claims on FLOPs hold? LLaVA-OneVision-0.5B: 8.6x fewer with VISOR, 18x with a reducer before it.

    make verify-visor      (or: python benchmarks/verify_visor.py --out benchmarks/results/verify_visor.jsonl)

Counted on the meta device from the recipes. The claims (quoted from secondary notes on arXiv 2603.23495, which speak
of the language part) are held against each configuration, named SA/CA: how many layers refine the visual tokens, how
many read them. Beside them stands what the arithmetic allows: the same without any visual work at all. The paper's own
figure is a mean over what its router chose, which is not known: full and none bound it. All methods are timed, too, in
one run: at full size on a GPU, elsewhere as small models, which gives ratios and no GPU figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from own_records import parser_of, read
from verify_claims import TEXT, build_for_timing, itself, milliseconds, recipe_at, shrunk, times_as_fast

from lavi.cli.entry import cli_entry_point
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.latency import TURNS
from lavi.efficiency.measure import Measurement, build_on, count, measure
from lavi.efficiency.record import Record, write_records
from lavi.efficiency.scenario import Scenario
from lavi.recipe import Recipe
from lavi.report import console, table, track

BASELINE_NAME = "LLaVA-OneVision-0.5B"
BASE = "baselines/llava_onevision_0_5b"
VISOR = "visor/qwen2_0_5b_siglip_stage1"
CLAIM, CLAIM_REDUCED = 8.6, 18.0
HALVED = {"_target_": "lavi.reduction.visionzip.VisionZip", "dominant": 324, "contextual": 40}
POOLED = {"_target_": "lavi.reduction.pooling.AveragePooling", "factor": 2}

METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "VISOR 0/6": (VISOR, {"fusion.self_attention": 0, "fusion.cross_attention": 6}, CLAIM),
    "VISOR 0/8": (VISOR, {"fusion.configuration": "none"}, CLAIM),
    "VISOR 2/8": (VISOR, {"fusion.configuration": [4, 15]}, CLAIM),
    "VISOR 4/8": (VISOR, {"fusion.configuration": [4, 9, 15, 19]}, CLAIM),
    "VISOR 8/8": (VISOR, {}, CLAIM),
    "VISOR-TR 2/8, half the tokens": (VISOR, {"fusion.configuration": [4, 15], "reducer": HALVED}, CLAIM_REDUCED),
    "VISOR-TR 2/8, 2 x 2 pooled": (VISOR, {"fusion.configuration": [4, 15], "reducer": POOLED}, CLAIM_REDUCED),
    "VISOR-TR 8/8, 2 x 2 pooled": (VISOR, {"reducer": POOLED}, CLAIM_REDUCED),
    "LaVi reads, 4 refine": ("visor/qwen2_0_5b_siglip_modulation", {}, CLAIM),
    "cross-attention": ("baselines/cross_attention_0_5b", {}, CLAIM),
    "LaVi": ("lavi/qwen2_0.5b_siglip", {}, CLAIM),
    "FastV": ("baselines/fastv_0_5b", {}, CLAIM),
    "PyramidDrop": ("baselines/pyramid_drop_0_5b", {}, CLAIM),
    "late injection": ("baselines/late_injection_0_5b", {}, CLAIM),
    "ShortV": ("baselines/shortv_0_5b", {}, CLAIM),
    "ViCA": ("baselines/vica_0_5b", {}, CLAIM),
    "VisionZip": ("baselines/visionzip_0_5b", {}, CLAIM_REDUCED),
}
SCENARIOS = [Scenario(TEXT, image=(384, 384)), Scenario(TEXT, image=(1024, 1024)), Scenario(TEXT, frames=32)]
TIMED = {"cuda": SCENARIOS[1], "cpu": SCENARIOS[0]}
"""What is timed; at 1024 x 1024 the baseline's attention alone takes a CPU half a minute a run."""


def recipe_of(method: str) -> Recipe:
    """A method's recipe; ``LLaVA-OneVision-0.5B``, or one of :data:`METHODS`."""
    file, changes, _ = METHODS.get(method, (BASE, {}, 0.0))
    recipe = recipe_at(file)
    for key, value in changes.items():
        recipe = recipe.replaced(f"model.{key}", value)
    recipe.settings["name"] = method
    return recipe


def counts() -> list[Record]:
    """One record for each method and input."""
    records = []
    for method in track([BASELINE_NAME, *METHODS], description="counting"):
        recipe = recipe_of(method)
        model = build_on(recipe, "meta")
        for scenario in SCENARIOS:
            record = count(recipe, model, scenario)
            record.knobs = {"name": method, "scenario": str(scenario)}
            records.append(record)
    return records


def flops_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how many times fewer FLOPs, the ceiling, and whether the claim holds, for each input."""
    counted = [record for record in records if not record.milliseconds]
    base = {record.knobs["scenario"]: record for record in counted if record.knobs["name"] == BASELINE_NAME}
    columns = [
        "method",
        "input",
        "LM TFLOPs",
        "times fewer (ceiling)",
        "claim",
        "with encoder",
        "times fewer (ceiling)",
    ]
    rows = []
    for record in counted:
        if record.knobs["name"] == BASELINE_NAME:
            continue
        other = base[record.knobs["scenario"]]
        language, whole = other.gflops_language / record.gflops_language, other.gflops_total / record.gflops_total
        encoder = record.flops["vision_encoder"] / 1e9
        floor = record.flops_floor / 1e9
        threshold = METHODS[record.knobs["name"]][2]
        rows.append(
            [
                record.knobs["name"],
                record.knobs["scenario"],
                f"{record.gflops_language / 1e3:.2f}",
                f"{language:.1f} ({other.gflops_language / floor:.0f})",
                f"{'PASS' if language >= threshold else 'FAIL'} ({threshold:g}x)",
                f"{record.gflops_total / 1e3:.2f}",
                f"{whole:.2f} ({other.gflops_total / (floor + encoder):.2f})",
            ]
        )
    return columns, rows


def timed(device: torch.device, runs: int) -> list[Record]:
    """Prefill and decoding of every method at one input, in turns: full size on a GPU, else small."""
    small, scenario, measurements = device.type != "cuda", TIMED[device.type], []
    for method in track([BASELINE_NAME, *METHODS], description="building"):
        recipe = shrunk(recipe_of(method), layers=24) if small else recipe_of(method)
        model = build_for_timing(recipe, device)
        record = count(recipe, model, scenario)
        record.knobs = {"name": method, "scenario": str(scenario), "timed": "small" if small else "full"}
        measurements.append(Measurement(record, scenario, partial(itself, model)))
    bar = partial(track, description="timing")
    measure(measurements, device=device, runs=runs, stages=("prefill", "decode"), track=bar)
    return [one.record for one in measurements]


def speed_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: whether the FLOPs that are saved show on the clock."""
    measured = [record for record in records if record.milliseconds]
    base = next(record for record in measured if record.knobs["name"] == BASELINE_NAME)
    columns = ["method", "LM FLOPs: times fewer", "prefill ms", "times as fast", "decode ms", "times as fast"]
    columns += ["peak MiB", "shows on the clock"]
    rows = []
    for record in measured:
        fewer = base.gflops_language / record.gflops_language
        faster, shown = times_as_fast(record, base, "prefill")
        verdict = "" if record is base else "noisy" if faster is None else "yes" if faster >= 1.05 else "no"
        row = [
            record.knobs["name"],
            f"{fewer:.1f}",
            milliseconds(record, "prefill"),
            shown,
            milliseconds(record, "decode"),
        ]
        rows.append([*row, times_as_fast(record, base, "decode")[1], f"{record.mib['peak']:.0f}", verdict])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=TURNS, help="timed turns of each stage; 0: count")
    args = read(parser)
    records = counts()
    counted = len(records)
    title = f"FLOPs of a prompt of {TEXT} text tokens against {BASELINE_NAME} (1 multiply-add = 2 FLOPs)"
    console().print(table(title, *flops_table(records)))
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

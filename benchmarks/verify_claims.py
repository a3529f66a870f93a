"""Do the paper's claims hold? LaVi-7B against LLaVA-OneVision-7B: -94.0 % FLOPs, 3.1x faster, half the memory.

    make verify-claims      (or: python benchmarks/verify_claims.py --out benchmarks/results/verify_claims.jsonl)

FLOPs are counted on the meta device from the recipes (no weights, no GPU, no network). On a GPU time and memory are
measured too, with random weights in bf16 and the same attention kernel for all, beside the floor (the same tower and
the bare language model on the text alone) in the same run. Each claim is answered by PASS or FAIL, with the ceiling
that arithmetic sets: what fusion at no cost would reach. Without a GPU small models of the same kinds, with the same
crops, frames and tokens, are timed on the CPU: ratios, no GPU figures. Everywhere time and memory at full size are
*estimated* for GPUs that are not there (lavi/efficiency/estimated.py), and the claims are answered by that, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from own_records import parser_of, read
from sizes import SMALL_QWEN2, SMALL_SIGLIP

from lavi.checkpoints.published_vlm import written_out
from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.comparison import ratio_cell
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.estimated import note_estimates
from lavi.efficiency.hardware import device_named, fits_in
from lavi.efficiency.latency import TURNS
from lavi.efficiency.measure import Measurement, build_on, count, measure, saving
from lavi.efficiency.record import Record, write_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import name_of
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.report import console, table, track

ROOT = Path(__file__).parent.parent
BASELINE = "baselines/llava_onevision_7b"
LAVI = "lavi/qwen2_7b_siglip_stage2"
EFFICIENT = "lavi/qwen2_7b_mobileclip2"
MERGED = "lavi/qwen2_7b_siglip_merged"

TEXT = 50
SIZES = [(384, 384), (640, 480), (1024, 1024), (2304, 2304)]
FRAMES = [8, 32, 64]
SCENARIOS = [Scenario(TEXT, image=size) for size in SIZES] + [Scenario(TEXT, frames=frames) for frames in FRAMES]
OUTPUTS = (1, 4, 16, 64, 256)
TIMED: dict[str, tuple[int, ...]] = {"1024x1024": (), "32 frames": OUTPUTS}
"""The inputs that are timed, and the answers to them."""
SMALL_TIMED: dict[str, tuple[int, ...]] = {"384x384": (), "8 frames": OUTPUTS[:2]}

ESTIMATED_ON = ("a100", "h100", "h100-graph")
ANSWERS = (1, 16, 64, 256)
"""Tokens of the answers whose time is estimated."""
BATCHES = (1, 4, 16, 64)
"""Rows of the batches whose memory is estimated."""
MEMORY_SCENARIOS = [Scenario(TEXT, image=(1024, 1024)), *(Scenario(TEXT, frames=frames) for frames in (1, 8, 32, 64))]
"""The inputs whose memory is estimated."""

FLOPS, SPEED, MEMORY = 94.0, 3.1, 0.5
"""The claims: percent of FLOPs saved, times as fast, share of the memory."""


def recipe_at(file: str) -> Recipe:
    """A full-size recipe as it is deployed: its language model in bf16."""
    recipe = written_out(Recipe.load(ROOT / "recipes" / f"{file}.yaml"))
    recipe = recipe.replaced("model.language.dtype", "bfloat16")
    recipe.source = f"recipes/{file}.yaml"
    return recipe


def counts() -> list[Record]:
    """One record for each recipe and scenario."""
    records = []
    for file in track([BASELINE, LAVI, MERGED, EFFICIENT], description="counting"):
        recipe = recipe_at(file)
        model = build_on(recipe, "meta")
        for scenario in SCENARIOS:
            record = count(recipe, model, scenario)
            record.knobs = {"name": name_of(recipe), "scenario": str(scenario), "value": str(scenario)}
            records.append(record)
    return records


def of(records: Sequence[Record], file: str) -> dict[str, Record]:
    """A recipe's records by scenario."""
    name = name_of(recipe_at(file))
    return {record.knobs["scenario"]: record for record in records if record.knobs["name"] == name}


def flops_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what LaVi saves, the ceiling, and whether the claim holds."""
    base, lavi = of(records, BASELINE), of(records, LAVI)
    others = {"merging in the tower": of(records, MERGED), "efficient tower": of(records, EFFICIENT)}
    columns = ["input", "crops / tokens", "vision TFLOPs", "LM TFLOPs", "LaVi TFLOPs"]
    columns += ["saved, no encoder % (ceiling)", "-94.0 %", "saved % (ceiling)", "-94.0 %", "over the floor %"]
    columns += [f"{name}: saved %" for name in others]
    rows = []
    for scenario, record in lavi.items():
        other = base[scenario]
        row = [scenario, f"{other.views} / {other.visual_tokens_in_language:,}"]
        row += [f"{other.flops['vision_encoder'] / 1e12:.2f}", f"{other.gflops_language / 1e3:.2f}"]
        row += [f"{record.gflops_total / 1e3:.2f}"]
        for with_vision in (False, True):
            saved, ceiling = saving(record, other, with_vision=with_vision)
            row += [f"{saved:.1f} ({ceiling:.1f})", "PASS" if saved >= FLOPS else "FAIL"]
        floor = record.flops["vision_encoder"] + record.flops_floor
        row += [f"{100 * (record.gflops_total * 1e9 / floor - 1):.2f}"]
        row += [f"{saving(one[scenario], other, with_vision=True)[0]:.1f}" for one in others.values()]
        rows.append(row)
    return columns, rows


def estimates() -> list[Record]:
    """Time and memory of both at full size, of no device: a record for each input, and for batches of them."""
    devices, records = [device_named(name) for name in ESTIMATED_ON], []
    for file in track([BASELINE, LAVI], description="estimating"):
        recipe = recipe_at(file)
        model = build_for_timing(recipe, "meta")
        for scenario in MEMORY_SCENARIOS:
            for rows in BATCHES:
                at = replace(scenario, batch=rows)
                record = count(recipe, model, at)
                record.knobs = {"name": name_of(recipe), "scenario": str(scenario), "estimated": rows}
                note_estimates(record, model, at, devices if str(scenario) in TIMED else [])
                records.append(record)
    return records


def estimated_tables(records: Sequence[Record]) -> tuple[tuple[list[str], list[list[str]]], ...]:
    """Columns and rows of two tables: how much faster an answer comes, and how much less memory a batch needs."""
    found = {(r.knobs["name"], r.knobs["scenario"], r.knobs["estimated"]): r for r in records if "estimated" in r.knobs}
    base, lavi = (name_of(recipe_at(file)) for file in (BASELINE, LAVI))
    answers, memory = [], []
    for scenario in TIMED:
        other, ours = found[base, scenario, 1], found[lavi, scenario, 1]
        for device in ours.estimated_milliseconds:
            for tokens in ANSWERS:
                times = [_of_answer(record.estimated_milliseconds[device], tokens) for record in (other, ours)]
                faster = times[0] / times[1]
                row = [scenario, device, str(tokens), *(f"{one:.0f}" for one in times), f"{faster:.1f}"]
                answers.append([*row, _answer(faster >= SPEED, f"{SPEED}x")])
    for scenario, rows in product(map(str, MEMORY_SCENARIOS), BATCHES):
        if (base, scenario, rows) in found:
            mib = [found[name, scenario, rows].estimated_mib for name in (base, lavi)]
            whole = [one["weights"] + one["peak"] for one in mib]
            share = whole[1] / whole[0]
            row = [scenario, str(rows), *(f"{one['peak'] / 1024:.1f}" for one in mib)]
            row += [f"{one / 1024:.1f}" for one in whole]
            row += [fits_in(one) for one in whole] + [f"{share:.2f}"]
            memory.append([*row, _answer(share <= MEMORY, "half the memory")])
    columns = ["input", "GPU", "tokens of the answer", "LLaVA-OneVision ms", "LaVi ms", "times as fast", "claim"]
    of_memory = ["input", "batch", "LLaVA-OneVision GiB above weights", "LaVi GiB above weights"]
    of_memory += ["LLaVA-OneVision GiB", "LaVi GiB", "fits in", "LaVi fits in", "share", "claim"]
    return (columns, answers), (of_memory, memory)


def reasons(records: Sequence[Record]) -> list[str]:
    """Why estimated memory is what it is: what no fusion can save, and from which batch on half of it is saved."""
    _, (_, rows) = estimated_tables(records)
    alone = next(row for row in rows if row[1] == "1")
    weights = float(alone[4]) - float(alone[2])
    said = [
        f"At batch 1 ({alone[0]}) {weights:.1f} of LLaVA-OneVision's {alone[4]} GiB are weights, which both have "
        "alike: no fusion halves that."
    ]
    for scenario in dict.fromkeys(row[0] for row in rows):
        halved = next((row[1] for row in rows if row[0] == scenario and float(row[8]) <= MEMORY), None)
        said.append(
            f"{scenario}: {f'half of it from a batch of {halved} on' if halved else 'half of it at no batch here'}."
        )
    return said


def _of_answer(times: Mapping[str, float], tokens: int) -> float:
    """Milliseconds from pixels to so many tokens."""
    return times["first_token"] + (tokens - 1) * times["decode"]


def _answer(holds: bool, claim: str) -> str:
    return f"{'PASS' if holds else 'FAIL'} ({claim}, estimated)"


def timed(device: torch.device, runs: int, *, inputs: Mapping[str, tuple[int, ...]], longest: int) -> Iterator[Record]:
    """Time and memory of both, in turns, input by input: at full size on a GPU, elsewhere small.

    Args:
        inputs: those that are timed, and the lengths of the answers to them.
        longest: answers of at most so many tokens are timed.
    """
    small = device.type != "cuda"
    recipes = [shrunk(recipe_at(file)) if small else recipe_at(file) for file in (BASELINE, LAVI)]
    models = [build_for_timing(recipe, device) for recipe in recipes]
    for scenario in [s for s in SCENARIOS if str(s) in inputs]:
        outputs = [length for length in inputs[str(scenario)] if length <= longest]
        measurements = []
        for recipe, model in zip(recipes, models, strict=True):
            record = count(recipe, model, scenario)
            record.knobs = {"name": name_of(recipe), "scenario": str(scenario), "timed": "small" if small else "full"}
            measurements.append(Measurement(record, scenario, partial(itself, model)))
        bar = partial(track, description=f"timing at {scenario}")
        measure(measurements, device=device, runs=runs, outputs=outputs, track=bar)
        for one in measurements:
            console().print(f"{one.record.knobs['name']}, {scenario}: {one.record.error or 'measured'}")
            yield one.record


def build_for_timing(recipe: Recipe, device: torch.device | str) -> VisionLanguageModel:
    """A model whose tower has the weights of its decoder's kind."""
    model = build_on(recipe, device)
    model.vision.to(model.language.hf.dtype)
    return model


def itself(model: VisionLanguageModel) -> VisionLanguageModel:
    """What is measured, where it is built already."""
    return model


def shrunk(recipe: Recipe, *, layers: int = 4) -> Recipe:
    """The same recipe on a small tower and a small language model of so many layers."""
    vision = recipe.settings["model"]["vision"]
    part = "vision.tower" if "tower" in vision else "vision"
    own = vision.get("tower", vision)
    tower = own | {"source": None, "config": SMALL_SIGLIP}
    if isinstance(own.get("layer"), list):  # as many, of those that there are, and as deep as one layer's
        tower["layer"] = [*range(1, len(own["layer"])), own["layer"][-1]]
    language = {
        "source": None,
        "config": SMALL_QWEN2 | {"num_hidden_layers": layers},
        "tokenizer": "Qwen/Qwen2-7B-Instruct",
        "dtype": "float32",
    }
    recipe = recipe.replaced(f"model.{part}", tower)
    return recipe.replaced("model.language", recipe.settings["model"]["language"] | language)


def speed_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what was measured, and the ratios of that; the claims are held against a GPU's."""
    measured = [record for record in records if record.knobs.get("timed")]
    full = all(record.knobs["timed"] == "full" for record in measured)
    base, lavi = (of(measured, file) for file in (BASELINE, LAVI))
    columns = ["input", "stage", "LLaVA-OneVision", "LaVi", "floor", "LLaVA-OneVision / LaVi", "LaVi / floor", "claim"]
    rows = []
    for scenario, record in lavi.items():
        other = base[scenario]
        for stage in record.milliseconds:
            if f"floor_{stage}" not in record.milliseconds or stage not in other.milliseconds:
                continue
            times = [(other, stage), (record, stage), (record, f"floor_{stage}")]
            faster, shown = times_as_fast(record, other, stage)
            over_floor = ratio_cell(record, "floor", stage)
            if stage not in record.turns:
                over_floor = f"{record.milliseconds[stage][0] / record.milliseconds[f'floor_{stage}'][0]:.2f}"
            row = [scenario, f"ms {stage.replace('_', ' ')}", *(milliseconds(record, name) for record, name in times)]
            claimed = _verdict(faster, SPEED, f"{SPEED}x", full) if stage.startswith("end_to_end") else ""
            rows.append([*row, shown, over_floor, claimed])
        for kind, label in (("peak", "MiB above weights"), ("allocated", "MiB with weights")):
            if kind in record.mib and kind in other.mib:
                ratio = other.mib[kind] / record.mib[kind]
                row = [scenario, label, f"{other.mib[kind]:.0f}", f"{record.mib[kind]:.0f}", "", f"{ratio:.2f}", ""]
                rows.append([*row, _verdict(ratio, 1 / MEMORY, "half the memory", full)])
    return columns, rows


def times_as_fast(record: Record, concat: Record, stage: str) -> tuple[float | None, str]:
    """How many times as fast as concatenation a stage is: the number (None if there is none), and how it is shown.

    Of records of before timing in turns it is the ratio of the medians.
    """
    if record is concat or stage not in record.turns:
        value = concat.milliseconds[stage][0] / record.milliseconds[stage][0]
        return value, f"{value:.2f}"
    ratio = record.ratio("concat", stage)
    if ratio is None or ratio.noisy:
        return None, ratio_cell(record, "concat", stage)
    return 1 / ratio.median, f"{1 / ratio.median:.2f} ({1 / ratio.high:.2f}-{1 / ratio.low:.2f})"


def milliseconds(record: Record, stage: str) -> str:
    """The median, if it says something."""
    return "noisy" if record.time_is_noisy(stage) else f"{record.milliseconds[stage][0]:.1f}"


def _verdict(value: float | None, threshold: float, claim: str, full: bool) -> str:
    if not full:
        return f"no GPU figure ({claim})"
    return f"noisy ({claim})" if value is None else f"{'PASS' if value >= threshold else 'FAIL'} ({claim})"


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=whole_number(1), default=TURNS, help="timed turns of each stage")
    parser.add_argument("--small", action="store_true", help="time small inputs: a quick look, and none at the claims")
    parser.add_argument("--longest", type=whole_number(1), metavar="TOKENS", help="of the answers that are timed")
    args = read(parser)
    records = counts()
    title = f"FLOPs of a prompt of {TEXT} text tokens (1 multiply-add = 2 FLOPs, attention in full)"
    console().print(table(title, *flops_table(records)))
    print(EXPLANATION)
    cuda = torch.cuda.is_available()
    counted = len(records)
    if args.out:  # what is counted is not lost when the timing is stopped
        args.out.unlink(missing_ok=True)
        write_records(records, args.out)
    longest = args.longest or (OUTPUTS[-1] if cuda else 64)
    inputs = SMALL_TIMED if args.small else TIMED
    for record in timed(torch.device("cuda" if cuda else "cpu"), args.runs, inputs=inputs, longest=longest):
        records.append(record)
        if args.out:
            write_records([record], args.out)
    counted = len(records)
    where = torch.cuda.get_device_name() if cuda else "small models on the CPU: ratios, no GPU figure exists"
    console().print(table(f"Time and memory; {where}", *speed_table(records)))
    print(NOTE)
    records += estimates()
    for title, shown in zip(("Time", "Memory"), estimated_tables(records), strict=True):
        console().print(table(f"{title} at full size, estimated: nothing was measured", *shown))
    console().print("\n".join(reasons(records)))
    if args.out:
        write_records(records[counted:], args.out)


EXPLANATION = """\
Ceiling: what fusion at no cost would save, the same tower and the bare language model on the text being all that is
left. Where the ceiling is below 94.0 % no method with this tower can reach the claim; FAIL says so, it is not a fault
of the fusion. Merging in the tower: LaVi, the same SigLIP working on ever fewer tokens (and, of a video, frames).
Efficient tower: LaVi on MobileCLIP2-S4. Both against the same baseline, so no longer a comparison of fusions alone."""


if __name__ == "__main__":
    main()

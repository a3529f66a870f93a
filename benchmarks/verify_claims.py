"""Do the paper's claims hold? LaVi-7B against LLaVA-OneVision-7B: -94.0 % FLOPs, 3.1x faster, half the memory.

    make verify-claims      (or: python benchmarks/verify_claims.py --out benchmarks/results/verify_claims.jsonl)

FLOPs are counted on the meta device from the recipes (no weights, no GPU, no network). On a GPU time and memory are
measured too, with random weights in bf16 and the same attention kernel for all, beside the floor (the same tower and
the bare language model on the text alone) in the same run. Each claim is answered by PASS or FAIL, with the ceiling
that arithmetic sets: what fusion at no cost would reach. Without a GPU small models of the same kinds, with the same
crops, frames and tokens, are timed on the CPU: ratios, no GPU figures, and no verdict on the claims.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sizes import SMALL_QWEN2, SMALL_SIGLIP

from lavi.efficiency import record
from lavi.efficiency.measure import build_on, count, measure, saving
from lavi.efficiency.point import Scenario
from lavi.efficiency.record import Record
from lavi.efficiency.sweep import name_of
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.report import console, table, track

ROOT = Path(__file__).parent.parent
BASELINE = "baselines/llava_onevision_7b"
LAVI = "lavi/qwen2_7b_siglip_stage2"
EFFICIENT = "lavi/qwen2_7b_mobileclip2"

TEXT = 50
SIZES = [(384, 384), (640, 480), (1024, 1024), (2304, 2304)]
FRAMES = [8, 32, 64]
SCENARIOS = [Scenario(TEXT, image=size) for size in SIZES] + [Scenario(TEXT, frames=frames) for frames in FRAMES]
OUTPUTS = (1, 4, 16, 64, 256)
TIMED: dict[str, tuple[int, ...]] = {"1024x1024": (), "32 frames": OUTPUTS}

FLOPS, SPEED, MEMORY = 94.0, 3.1, 0.5
"""The claims: percent of FLOPs saved, times as fast, share of the memory."""


def recipe_at(file: str) -> Recipe:
    """A full-size recipe as it is deployed: its language model in bf16."""
    recipe = Recipe.load(ROOT / "recipes" / f"{file}.yaml", ["model.language.dtype=bfloat16"])
    recipe.source = f"recipes/{file}.yaml"
    return recipe


def counts() -> list[Record]:
    """One record for each recipe and scenario."""
    records = []
    for file in track([BASELINE, LAVI, EFFICIENT], description="counting"):
        recipe = recipe_at(file)
        model = build_on(recipe, "meta")
        for scenario in SCENARIOS:
            made = count(recipe, model, scenario)
            made.knobs = {"name": name_of(recipe), "scenario": str(scenario), "value": str(scenario)}
            records.append(made)
    return records


def of(records: Sequence[Record], file: str) -> dict[str, Record]:
    """A recipe's records by scenario."""
    name = name_of(recipe_at(file))
    return {made.knobs["scenario"]: made for made in records if made.knobs["name"] == name}


def flops_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what LaVi saves, the ceiling, and whether the claim holds."""
    base, lavi, efficient = (of(records, file) for file in (BASELINE, LAVI, EFFICIENT))
    columns = ["input", "crops / tokens", "vision TFLOPs", "LM TFLOPs", "LaVi TFLOPs"]
    columns += ["saved, no encoder % (ceiling)", "-94.0 %", "saved % (ceiling)", "-94.0 %", "over the floor %"]
    columns += ["efficient tower: saved %"]
    rows = []
    for scenario, own in lavi.items():
        other = base[scenario]
        row = [scenario, f"{other.views} / {other.visual_tokens_in_language:,}"]
        row += [f"{other.flops['vision_encoder'] / 1e12:.2f}", f"{other.gflops_language / 1e3:.2f}"]
        row += [f"{own.gflops_total / 1e3:.2f}"]
        for with_vision in (False, True):
            saved, ceiling = saving(own, other, with_vision=with_vision)
            row += [f"{saved:.1f} ({ceiling:.1f})", "PASS" if saved >= FLOPS else "FAIL"]
        floor = own.flops["vision_encoder"] + own.flops_floor
        row += [f"{100 * (own.gflops_total * 1e9 / floor - 1):.2f}"]
        row += [f"{saving(efficient[scenario], other, with_vision=True)[0]:.1f}"]
        rows.append(row)
    return columns, rows


def timed(device: torch.device, runs: int) -> list[Record]:
    """Time and memory of both, one model in memory at a time: at full size on a GPU, elsewhere small."""
    records = []
    small = device.type != "cuda"
    for file in (BASELINE, LAVI):
        recipe = shrunk(recipe_at(file)) if small else recipe_at(file)
        model: VisionLanguageModel = build_on(recipe, device)
        model.vision.to(model.language.hf.dtype)
        for scenario in track([s for s in SCENARIOS if str(s) in TIMED], description="timing"):
            made = count(recipe, model, scenario)
            made.knobs = {"name": name_of(recipe), "scenario": str(scenario), "timed": "small" if small else "full"}
            outputs = [length for length in TIMED[str(scenario)] if not small or length <= 64]
            measure(made, model, scenario, device=device, runs=runs, outputs=outputs)
            records.append(made)
            console().print(f"{made.knobs['name']}, {scenario}: {made.error or 'measured'}")
        del model
        if not small:
            torch.cuda.empty_cache()
    return records


def shrunk(recipe: Recipe, *, layers: int = 4) -> Recipe:
    """The same recipe on a small tower and a small language model of so many layers."""
    tower = {"source": None, "config": SMALL_SIGLIP}
    language = {
        "source": None,
        "config": SMALL_QWEN2 | {"num_hidden_layers": layers},
        "tokenizer": "Qwen/Qwen2-7B-Instruct",
        "dtype": "float32",
    }
    for part, changes in (("vision", tower), ("language", language)):
        recipe = recipe.replaced(f"model.{part}", recipe.settings["model"][part] | changes)
    return recipe


def speed_table(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what was measured, as ratios of medians of one run; the claims are held against a GPU's."""
    measured = [made for made in records if made.knobs.get("timed")]
    full = all(made.knobs["timed"] == "full" for made in measured)
    base, lavi = (of(measured, file) for file in (BASELINE, LAVI))
    columns = ["input", "stage", "LLaVA-OneVision", "LaVi", "floor", "LLaVA-OneVision / LaVi", "LaVi / floor", "claim"]
    rows = []
    for scenario, own in lavi.items():
        other = base[scenario]
        for stage, times in own.milliseconds.items():
            floor = own.milliseconds.get(f"floor_{stage}")
            if floor is None or stage not in other.milliseconds:
                continue
            ratio = other.milliseconds[stage][0] / times[0]
            row = [scenario, f"ms {stage.replace('_', ' ')}", f"{other.milliseconds[stage][0]:.1f}", f"{times[0]:.1f}"]
            claim = _verdict(ratio >= SPEED, f"{SPEED}x", full) if stage.startswith("end_to_end") else ""
            rows.append([*row, f"{floor[0]:.1f}", f"{ratio:.2f}", f"{times[0] / floor[0]:.2f}", claim])
        for kind, label in (("peak", "MiB above weights"), ("allocated", "MiB with weights")):
            if kind in own.mib and kind in other.mib:
                ratio = other.mib[kind] / own.mib[kind]
                row = [scenario, label, f"{other.mib[kind]:.0f}", f"{own.mib[kind]:.0f}", "", f"{ratio:.2f}", ""]
                rows.append([*row, _verdict(ratio >= 1 / MEMORY, "half the memory", full)])
    return columns, rows


def _verdict(holds: bool, claim: str, full: bool) -> str:
    return f"{'PASS' if holds else 'FAIL'} ({claim})" if full else f"no GPU figure ({claim})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the records to this file of JSON lines")
    parser.add_argument("--runs", type=int, help="timed runs of each stage (20 on a GPU, else 3)")
    args = parser.parse_args()
    records = counts()
    title = f"FLOPs of a prompt of {TEXT} text tokens (1 multiply-add = 2 FLOPs, attention in full)"
    console().print(table(title, *flops_table(records)))
    print(EXPLANATION)
    cuda = torch.cuda.is_available()
    records += timed(torch.device("cuda" if cuda else "cpu"), args.runs or (20 if cuda else 3))
    where = torch.cuda.get_device_name() if cuda else "small models on the CPU: ratios, no GPU figure exists"
    console().print(table(f"Time and memory, medians; {where}", *speed_table(records)))
    if args.out:
        args.out.unlink(missing_ok=True)
        record.write(records, args.out)


EXPLANATION = """\
Ceiling: what fusion at no cost would save, the same tower and the bare language model on the text being all that is
left. Where the ceiling is below 94.0 % no method with this tower can reach the claim; FAIL says so, it is not a fault
of the fusion. Efficient tower: LaVi on MobileCLIP2-S4 against the same baseline; another tower, so no longer a
comparison of fusions alone."""


if __name__ == "__main__":
    main()

"""One more token: how much longer does it take than that of the bare language model, eager and compiled?

    python benchmarks/decode.py --out benchmarks/results/decode.jsonl

A prompt of 50 text tokens and an image of 384 x 384; each way of fusion on one language model, and the language model
on the text alone, all in turns. Qwen2-7B on a GPU in bf16; elsewhere a small one and Qwen2-0.5B in fp32, which give
ratios and no GPU figure.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fusions_on_one import PUBLISHED, build, lavi, sizes_for
from own_records import ends, keep, parser_of, read, with_interval

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import (
    Contestant,
    clock_of,
    half_the_threads,
    model_and_floor,
    shortest_turn,
    time_in_turns,
)
from lavi.efficiency.measure import computing
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import PromptShape, Scenario
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.language.compiled import DecodeCompiler
from lavi.model import VisionLanguageModel
from lavi.report import console, table

FUSIONS: dict[str, Callable[[], Fusion]] = {
    "lavi": lavi,
    "cross-attention": CrossAttentionFusion,
    "concatenation": ConcatFusion,
}
BARE, TEXT, IMAGE = "bare language model", 50, (384, 384)
WAYS = ("eager", "compiled")


def steps_of(model: VisionLanguageModel, shape: PromptShape, device: torch.device) -> dict[str, list[Contestant]]:
    """By way, a step of a model and one of its bare language model."""
    steps = {}
    for way, compiler in zip(WAYS, (None, DecodeCompiler()), strict=True):
        model.language.compiled = compiler
        within = partial(computing, model, None, device)
        steps[way] = [one.only(["decode"]) for one in model_and_floor(model, shape, device=device, within=within)]
    return steps


def measure(sizes: dict[str, Any], device: torch.device, *, turns: int) -> list[dict[str, Any]]:
    """One record for each fusion and way."""
    with half_the_threads(device), torch.no_grad():
        models = build(sizes, FUSIONS, device)
        shape = Scenario(text=TEXT, image=IMAGE).shape_for(models["lavi"])
        steps = {name: steps_of(model, shape, device) for name, model in models.items()}
        named = {BARE: {way: floor for way, (_, floor) in steps["lavi"].items()}}
        named |= {name: {way: own for way, (own, _) in ways.items()} for name, ways in steps.items()}
        order = [(name, way) for name in named for way in WAYS]
        # Each with the bare model the same way, and with itself the other way.
        pairs = {(number, number % 2) for number in range(2, len(order))}
        pairs |= {(number, number - 1) for number in range(1, len(order), 2)}
        times = time_in_turns(
            [named[name][way] for name, way in order],
            clock_of(device),
            pairs=pairs,
            turns=turns,
            shortest=shortest_turn(device),
        )
        language = models["lavi"].language
        about = {"device": device_name(device), "torch": torch.__version__}
        about |= {"layers": len(language.layers), "width": language.width}
    records = []
    for number, (name, way) in enumerate(order):
        own = times[number]["decode"]
        bare, eager = (ratio(own, times[other]["decode"]) for other in (number % 2, number - number % 2))
        records.append(
            about
            | {"fusion": name, "way": way, "milliseconds": estimate(own).median}
            | {"of_bare": ends(bare), "of_eager": ends(eager)}
        )
    return records


def decode_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["language model", "", "way", "ms"]
    columns += ["times the bare language model, the same way (interval)", "times eager (interval)"]
    rows = []
    for record in records:
        ratios = [with_interval(record[of]) for of in ("of_bare", "of_eager")]
        size = f"{record['layers']} layers, {record['width']} wide"
        rows.append([size, record["fusion"], record["way"], f"{record['milliseconds']:.2f}", *ratios])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=25, help="timed turns")
    parser.add_argument("--small", action="store_true", help="tiny models")
    args = read(parser)
    device = device_of("auto")
    sizes = [sizes_for(device, small=args.small)]
    if device.type == "cpu" and not args.small:
        sizes.append(PUBLISHED)
    records = keep((record for one in sizes for record in measure(one, device, turns=args.turns)), args.out)
    console().print(table(f"One more token; {records[0]['device']}", *decode_table(records)))


if __name__ == "__main__":
    main()

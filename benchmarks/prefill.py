"""The first token: what does each fusion, and each of LaVi's generators, add to the tower and the bare language model?

    python benchmarks/prefill.py --out benchmarks/results/prefill.jsonl

50 text tokens and an image, of one view and of ten; all on one tower and one language model, in turns: the fusion's own
part of it, the prompt behind the features, and all from the pixels on. Qwen2-7B on a GPU in bf16; elsewhere at reduced
size, which gives ratios and no GPU figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fusions_on_one import build, lavi, sizes_for
from own_records import ends, keep, parser_of, read, with_interval

from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.data.tiling import AnyRes
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import clock_of, half_the_threads, model_and_floor, shortest_turn, time_in_turns
from lavi.efficiency.measure import computing
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import Scenario
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.nn.delta_generators import AttentionDeltas, ConvDeltas, MLPDeltas, PooledDeltas
from lavi.report import console, table

FUSIONS: dict[str, Callable[[], Fusion]] = {
    "lavi, attention": lambda: lavi(AttentionDeltas()),
    "lavi, mlp": lambda: lavi(MLPDeltas()),
    "lavi, conv": lambda: lavi(ConvDeltas()),
    "lavi, pooled": lambda: lavi(PooledDeltas()),
    "cross-attention": CrossAttentionFusion,
    "concatenation": ConcatFusion,
}
TEXT = 50
SIZES = {"384x384": (384, 384), "1024x1024": (1024, 1024)}
SMALL_SIZES = {"384x384": (384, 384)}
STAGES = ("prefill", "first_token")


def measure(
    sizes: dict[str, Any], images: dict[str, tuple[int, int]], device: torch.device, *, turns: int
) -> Iterator[dict[str, Any]]:
    """One record for each fusion and image."""
    with half_the_threads(device), torch.no_grad():
        models = build(sizes, FUSIONS, device, AnyRes())
        about = {"device": device_name(device), "torch": torch.__version__}
        for image, size in images.items():
            pairs = []
            for model in models.values():
                shape = Scenario(text=TEXT, image=size).shape_for(model)
                within = partial(computing, model, None, device)
                pairs.append(model_and_floor(model, shape, device=device, within=within))
            contestants = [pair[0].only(["fusion", *STAGES]) for pair in pairs] + [pairs[0][1].only(STAGES)]
            floor = len(pairs)
            times = time_in_turns(
                contestants,
                clock_of(device),
                pairs=[(number, floor) for number in range(floor)],
                turns=turns,
                shortest=shortest_turn(device),
            )
            for name, own in zip(models, times, strict=False):
                ratios = {stage: ratio(own[stage], times[floor][stage]) for stage in STAGES}
                yield (
                    about
                    | {"image": image, "fusion": name, "fusion_ms": estimate(own["fusion"]).median}
                    | {f"{stage}_ms": estimate(own[stage]).median for stage in STAGES}
                    | {stage: ends(of) for stage, of in ratios.items()}
                )


def prefill_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["image", "", "ms fusion", "ms prefill", "times the floor (interval)", "ms first token"]
    rows = []
    for record in records:
        of = {stage: with_interval(record[stage]) for stage in STAGES}
        ms = {part: f"{record[f'{part}_ms']:.1f}" for part in ("fusion", *STAGES)}
        cells = [ms["fusion"], ms["prefill"], of["prefill"], ms["first_token"], of["first_token"]]
        rows.append([record["image"], record["fusion"], *cells])
    return [*columns, "times the floor (interval)"], rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=9, help="timed turns")
    parser.add_argument("--small", action="store_true", help="tiny models, one view")
    args = read(parser)
    device = device_of("auto")
    images = SMALL_SIZES if args.small else SIZES
    records = keep(measure(sizes_for(device, small=args.small), images, device, turns=args.turns), args.out)
    console().print(table(f"The first token; {records[0]['device']}", *prefill_table(records)))


if __name__ == "__main__":
    main()

"""Do the FLOPs that a vision tower saves by working on fewer tokens show on the clock?

    python benchmarks/encoder.py --out benchmarks/results/encoder.jsonl

One tower, whole and with each reduction, in turns, on an image (noise: nothing repeats), on a page of text, most of
whose patches are empty, and on a video of eight frames. FLOPs are counted while it runs, since how many patches a page
repeats is not known before. SigLIP-so400m on a GPU in bf16; elsewhere a smaller tower of as many tokens, which gives
ratios and no GPU figure.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from own_records import ends, keep, parser_of, read, with_interval
from PIL import Image, ImageDraw
from sizes import SIGLIP_SO400M
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Layout
from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import Contestant, clock_of, half_the_threads, shortest_turn, time_in_turns
from lavi.efficiency.record import device_name
from lavi.report import console, table
from lavi.vision.frame_merging import FrameMerging
from lavi.vision.hf import HFVision
from lavi.vision.reduced import ReducedTower, TokenReduction
from lavi.vision.repeated_patches import RepeatedPatches
from lavi.vision.token_merging import TokenMerging

ON_CPU = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
SMALL = ON_CPU | {"num_hidden_layers": 4, "image_size": 112}
FRAMES = 8
WHOLE = "whole"
QUARTERED, HALVED = TokenMerging(per_block=[364, 182, 92], start=2), TokenMerging(per_block=[364], start=2)
WAYS: dict[str, dict[str, list[TokenReduction]]] = {
    "image": {
        "a fiftieth merged in each block": [TokenMerging(per_block=15)],
        "half merged behind the third block": [HALVED],
        "an eighth left behind the fifth": [QUARTERED],
    },
    "page": {"repeated patches dropped": [RepeatedPatches()], "and an eighth left": [RepeatedPatches(), QUARTERED]},
    "video": {
        "a quarter of the frames left behind the second block": [FrameMerging(keep=0.25, behind=1)],
        "and an eighth of the tokens": [FrameMerging(keep=0.25, behind=1), QUARTERED],
    },
}
"""For each input, by name: what reduces the tower's tokens. The numbers are those of 729 tokens."""


def tower(config: dict[str, Any], reductions: list[TokenReduction], device: torch.device) -> ReducedTower:
    """The same weights each time."""
    torch.manual_seed(0)
    vision = ReducedTower(tower=HFVision(config=config), reductions=reductions).eval().requires_grad_(False)
    return vision.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def inputs_of(vision: ReducedTower) -> dict[str, tuple[Tensor, list[Layout]]]:
    """Pixels (views, C, H, W) of each input, and its layout."""
    generator = torch.Generator().manual_seed(1)
    side = vision.pixel_shape[1]
    page = Image.new("RGB", (side, side), "white")
    for line in range(4):
        ImageDraw.Draw(page).text(
            (side // 8, side // 8 + line * side // 16), "fewer tokens, the same answer", fill="black"
        )
    noise = torch.randn(FRAMES, *vision.pixel_shape, generator=generator)
    return {
        "image": (noise[:1], [Layout()]),
        "page": (vision.preprocessing(page)[None], [Layout()]),
        "video": (noise, [Layout(views=FRAMES, video=True)]),
    }


def gflops_of(vision: ReducedTower, pixels: Tensor, layouts: list[Layout]) -> float:
    """Of this input, counted while it is encoded."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vision(pixels, layouts)
    return float(counter.get_total_flops()) / 1e9


def measure(config: dict[str, Any], device: torch.device, *, turns: int) -> list[dict[str, Any]]:
    """One record for each way of each input."""
    records = []
    for name, ways in WAYS.items():
        towers = {way: tower(config, reductions, device) for way, reductions in {WHOLE: [], **ways}.items()}
        whole = towers[WHOLE]
        pixels, layouts = inputs_of(whole)[name]
        pixels = pixels.to(device, next(whole.parameters()).dtype)
        with half_the_threads(device):
            times = time_in_turns(
                [Contestant({name: partial(one, pixels, layouts)}) for one in towers.values()],
                clock_of(device),
                pairs=[(number, 0) for number in range(1, len(towers))],
                turns=turns,
                shortest=shortest_turn(device),
            )
            name_of_device = device_name(device)  # with the threads that computed
        gflops = {way: gflops_of(one, pixels, layouts) for way, one in towers.items()}
        records += [
            {"device": name_of_device, "torch": torch.__version__, "input": name, "way": way}
            | {"gflops": gflops[way], "saved": 1 - gflops[way] / gflops[WHOLE]}
            | {"milliseconds": estimate(own[name]).median, "faster": ends(ratio(times[0][name], own[name]))}
            for way, own in zip(towers, times, strict=True)
        ]
    return records


def encoder_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["input", "tower", "GFLOPs", "times fewer", "ms", "times as fast (interval)", "shows on the clock"]
    rows = []
    for record in records:
        fewer, is_whole = 1 / (1 - record["saved"]), record["way"] == WHOLE
        compared = [f"{fewer:.2f}", with_interval(record["faster"]), shows(fewer, record["faster"][1])]
        of_flops, of_time, verdict = ["", "", ""] if is_whole else compared
        cells = [f"{record['gflops']:.1f}", of_flops, f"{record['milliseconds']:.1f}", of_time, verdict]
        rows.append([record["input"], record["way"], *cells])
    return columns, rows


def shows(fewer: float, faster: float) -> str:
    """Whether so many times fewer FLOPs are seen in a run so many times as fast: by half at least, or less.

    Of what saves no FLOPs, nothing is to be seen.
    """
    if fewer < 1.02:
        return "-"
    return "yes" if faster >= 1 + (fewer - 1) / 2 else "in part" if faster > 1.02 else "no"


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=9, help="timed turns")
    parser.add_argument("--small", action="store_true", help="a tiny tower")
    args = read(parser)
    device = device_of("auto")
    config = SIGLIP_SO400M if device.type == "cuda" else SIGLIP_SO400M | ON_CPU
    records = keep(measure(config | SMALL if args.small else config, device, turns=args.turns), args.out)
    console().print(table(f"The encoder; {records[0]['device']}", *encoder_table(records)))


if __name__ == "__main__":
    main()

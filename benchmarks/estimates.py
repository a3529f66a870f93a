"""How far are estimates to be believed? Predictions for this machine beside what was measured on it.

    python benchmarks/estimates.py --out benchmarks/results/estimates.jsonl

Memory: the peak of a prompt and of a training step, for three fusions and three sizes, against torch's profiler. Time:
a prefill at four sizes and one more token, by this CPU's own rates, against the clock. ``--small`` is for a quick look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from own_records import keep, parser_of, read

from lavi.batch import IGNORE
from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.efficiency.estimate import estimate
from lavi.efficiency.estimated import milliseconds, traces, training_batch, training_memory
from lavi.efficiency.hardware import this_cpu
from lavi.efficiency.latency import (
    SHORTEST,
    TURNS,
    HostClock,
    half_the_threads,
    model_and_floor,
    time_in_turns,
)
from lavi.efficiency.memory import MIB, peak_of, prefill_memory
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import Scenario
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.loading.without_weights import without_weights
from lavi.model import VisionLanguageModel
from lavi.report import console, table, track
from lavi.vision.hf import HFVision

TOWER = {"model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4}
TOWER |= {"num_attention_heads": 3, "image_size": 224, "patch_size": 14}
WIDTHS = (256, 512, 896)
FUSIONS: dict[str, type[Fusion]] = {"concat": ConcatFusion, "lavi": LaViFusion, "cross-attention": CrossAttentionFusion}
PROMPTS = (50, 200, 500, 1000)
"""Text tokens of the prompts that are timed; beside them an image of 256 tokens."""
CPU = torch.device("cpu")


def build(fusion: str, width: int, device: str) -> VisionLanguageModel:
    """A model of random weights; what trains is the fusion and the decoder."""
    decoder = {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "vocab_size": 8000,
    }
    torch.manual_seed(0)
    with without_weights(), torch.device(device):
        model = VisionLanguageModel(
            vision=HFVision(config=TOWER),
            language=LanguageModel(config=decoder, tokenizer="none"),
            fusion=FUSIONS[fusion](),
        )
    model.vision.requires_grad_(False)
    return model.eval()


def of_memory(widths: Sequence[int], *, rows: int, text: int) -> Iterator[dict[str, Any]]:
    """One record for each fusion, size and kind: MiB above what stands before it, estimated and by the profiler."""
    for width in widths:
        for fusion in FUSIONS:
            scenario = Scenario(text, batch=rows, image=(224, 224))
            real, shapes = build(fusion, width, "cpu"), build(fusion, width, "meta")
            shape = scenario.shape_for(real)
            told = {"inference": prefill_memory(shapes, shape, device=torch.device("meta"))["peak"]}
            seen = {"inference": prefill_memory(real, shape, device=CPU)["peak"]}
            batch, _ = shape.inputs(real, "cpu")
            batch.pixels = shape.pixels(real, "cpu")
            labels = batch.input_ids.clone()
            labels[:, : text // 2] = IGNORE
            batch.labels = labels
            trained = int((labels[:, 1:] != IGNORE).sum())
            memory = training_memory(shapes, training_batch(shape, shapes), trained_tokens=trained)
            told["training"] = memory.activations / MIB
            real.token_scores(batch).loss.backward()  # gradients, weights and moments stand besides
            seen["training"] = peak_of(lambda: real.token_scores(batch).loss.backward(), CPU) / MIB  # noqa: B023
            for kind in told:
                yield {"what": f"MiB, {kind}", "of": f"{fusion}, width {width}", "told": told[kind], "seen": seen[kind]}


def of_time(prompts: Sequence[int], *, width: int, turns: int) -> Iterator[dict[str, Any]]:
    """One record for each prompt and fusion: milliseconds of a prefill and of one more token."""
    with half_the_threads(CPU):
        for text in prompts:
            scenario = Scenario(text, image=(224, 224))
            for fusion in ("concat", "lavi"):
                device = this_cpu()  # now: a shared machine is not as fast a minute later
                real, shapes = build(fusion, width, "cpu"), build(fusion, width, "meta")
                shape = scenario.shape_for(real)
                ours = model_and_floor(real, shape, device=CPU)[0].only(["prefill", "decode"])
                times = time_in_turns([ours], HostClock(), turns=turns, shortest=SHORTEST)[0]
                told = milliseconds(traces(shapes, shape), device)
                for stage, seen in times.items():
                    about = {"what": f"ms, {stage}", "of": f"{fusion}, {text} text tokens", "device": device_name(CPU)}
                    yield about | {"told": told[stage], "seen": estimate(seen).median}


def estimates_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["figure", "of", "estimated", "measured", "estimated / measured"]
    rows = [
        [r["what"], r["of"], f"{r['told']:.1f}", f"{r['seen']:.1f}", f"{r['told'] / r['seen']:.2f}"] for r in records
    ]
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=TURNS, help="timed turns")
    parser.add_argument("--small", action="store_true", help="one size of each")
    args = read(parser)
    memory = of_memory(WIDTHS[:1] if args.small else WIDTHS, rows=2, text=100)
    timed = of_time(PROMPTS[:1] if args.small else PROMPTS, width=WIDTHS[1], turns=args.turns)
    about = {"device": device_name(CPU), "torch": torch.__version__}
    measured = (about | record for part in (memory, timed) for record in track(part, "measuring"))
    records = keep(measured, args.out)
    console().print(table(f"Estimates beside measurements; {records[-1]['device']}", *estimates_table(records)))


if __name__ == "__main__":
    main()

"""One more token: how much longer does it take than that of the bare language model, eager and compiled?

    python benchmarks/decode.py --out benchmarks/results/decode.jsonl

One language model and one tower, random weights, a prompt of 50 text tokens and an image of 384 x 384; each way of
fusion on it, and the language model on the text alone, all in turns. Qwen2-7B on a GPU in bf16; elsewhere at reduced
size, which gives ratios and no GPU figure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from own_records import keep, parser_of, read
from sizes import QWEN2_7B, SIGLIP_SO400M, SMALL_QWEN2, SMALL_SIGLIP, recipe_of
from transformers import Cache

from datamodules.tokenizer import train_tokenizer
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import SHORTEST, Contestant, clock_of, half_the_threads, time_in_turns
from lavi.efficiency.measure import build_on
from lavi.efficiency.record import device_name
from lavi.efficiency.scenario import PromptShape, Scenario
from lavi.efficiency.steps import Steps
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.model import VisionLanguageModel
from lavi.report import console, table

FULL: dict[str, Any] = {"vision": SIGLIP_SO400M, "language": QWEN2_7B, "dtype": "bfloat16"}
REDUCED: dict[str, Any] = {"vision": SMALL_SIGLIP, "language": SMALL_QWEN2, "dtype": "float32"}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
FUSIONS: dict[str, Callable[[], Fusion]] = {
    "lavi": lambda: LaViFusion(fused_norm=True),  # on a CPU there is no kernel, and the norm is as ever
    "cross-attention": CrossAttentionFusion,
    "concatenation": ConcatFusion,
}
BARE, TEXT, IMAGE = "bare language model", 50, (384, 384)
WAYS = ("eager", "compiled")


def models(sizes: dict[str, Any], device: torch.device) -> dict[str, VisionLanguageModel]:
    """One for each fusion, on one tower and one language model: a fusion acts where its own context comes by."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a prompt of no meaning"], Path(folder))
        given = {**sizes, "tokenizer": Path(folder), "source": "benchmarks/decode.py"}
        first = build_on(recipe_of(given.pop("vision"), given.pop("language"), given.pop("tokenizer"), **given), device)
        first.vision.to(first.language.hf.dtype)
        made = {name: _with(first, fusion().to(device), device) for name, fusion in FUSIONS.items()}
    return made


def _with(model: VisionLanguageModel, fusion: Fusion, device: torch.device) -> VisionLanguageModel:
    with torch.device(device):
        other = VisionLanguageModel(vision=model.vision, language=model.language, fusion=fusion)
    # As after training: what starts at zero would make each delta 0, and nothing slower or faster.
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return other.eval()


def contestants(
    model: VisionLanguageModel | None, base: VisionLanguageModel, shape: PromptShape, device: torch.device
) -> dict[str, Contestant]:
    """A step of each way; of no model, the bare language model's."""
    batch, features = shape.inputs(base if model is None else model, device)
    hf, token = base.language.hf, torch.ones(shape.batch, 1, dtype=torch.long, device=device)

    def prefill(cache: Cache | None) -> tuple[Any, Any]:
        if model is not None:
            return model.prefill(batch, features, cache)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return hf(**given, past_key_values=cache, use_cache=True, logits_to_keep=1), None

    def stage(length: int | None) -> Callable[[], None]:
        steps = Steps(hf, prefill, rows=shape.batch, length=length)
        steps.begin()

        def step() -> None:
            steps.step(token)
            steps.back()

        return step

    inside = 0 if model is None else shape.visual_tokens_in_language(model)
    lengths = {"eager": None, "compiled": shape.text + inside + 2}
    return {way: Contestant({"decode": stage(lengths[way])}) for way in WAYS}


def measure(sizes: dict[str, Any], device: torch.device, *, turns: int) -> list[dict[str, Any]]:
    """One record for each fusion and way."""
    with half_the_threads(device), torch.no_grad():
        made = models(sizes, device)
        base = made["lavi"]
        shape = Scenario(text=TEXT, image=IMAGE).shape_for(base)
        named = {BARE: contestants(None, base, shape, device)}
        named |= {name: contestants(model, base, shape, device) for name, model in made.items()}
        order = [(name, way) for name in named for way in WAYS]
        # Each with the bare model the same way, and with itself the other way.
        pairs = {(number, number % 2) for number in range(2, len(order))}
        pairs |= {(number, number - 1) for number in range(1, len(order), 2)}
        times = time_in_turns(
            [named[name][way] for name, way in order],
            clock_of(device),
            pairs=pairs,
            turns=turns,
            shortest=SHORTEST if device.type == "cpu" else 0.0,
        )
    about = {"device": device_name(device), "torch": torch.__version__, "size": sizes["language"]["hidden_size"]}
    records = []
    for number, (name, way) in enumerate(order):
        own = times[number]["decode"]
        bare, eager = (ratio(own, times[other]["decode"]) for other in (number % 2, number - number % 2))
        records.append(
            about
            | {"fusion": name, "way": way, "milliseconds": estimate(own).median}
            | {"of_bare": [bare.median, bare.low, bare.high], "of_eager": [eager.median, eager.low, eager.high]}
        )
    return records


def decode_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["", "way", "ms", "times the bare language model, the same way (interval)", "times eager (interval)"]
    rows = []
    for record in records:
        ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*record[of]) for of in ("of_bare", "of_eager")]
        rows.append([record["fusion"], record["way"], f"{record['milliseconds']:.2f}", *ratios])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=25, help="timed turns")
    parser.add_argument("--small", action="store_true", help="a tiny language model")
    args = read(parser)
    device = device_of("auto")
    sizes = FULL if device.type == "cuda" else REDUCED
    if args.small:
        sizes = REDUCED | {"language": SMALL_QWEN2 | TINY}
    records = keep(measure(sizes, device, turns=args.turns), args.out)
    console().print(table(f"One more token; {records[0]['device']}", *decode_table(records)))


if __name__ == "__main__":
    main()

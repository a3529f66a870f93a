"""What does a training step cost whose images come as features: against the same step on pixels?

    python benchmarks/cached_features.py --out benchmarks/results/cached_features.jsonl

A step of stage 1, reading included: LaVi is trained, a frozen SigLIP-so400m (384 x 384) and a frozen decoder of
Qwen2-0.5B's shape are not; all weights are random. Both ways in turns, on the same samples. ``--small`` is for a quick
look.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from own_records import ends, keep, parser_of, read

from datamodules.image_text import ImageTextData
from datamodules.scenes import write_dataset
from lavi.checkpoints.feature_cache import check_feature_caches, feature_request
from lavi.cli.arguments import whole_number
from lavi.cli.entry import cli_entry_point
from lavi.config.devices import device_of
from lavi.efficiency.estimate import estimate, ratio
from lavi.efficiency.latency import Contestant, clock_of, time_in_turns
from lavi.efficiency.record import device_name
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.loading.without_weights import without_weights
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import AttentionDeltas
from lavi.report import console, table
from lavi.vision.hf import HFVision

TOWER = "google/siglip-so400m-patch14-384"
DECODER = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMALL_TOWER = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 64}
SMALL_TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
SMALL_DECODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_DECODER |= {"num_key_value_heads": 2}
PIXELS, FEATURES = "pixels", "features"


def build(tokenizer: str, *, small: bool) -> VisionLanguageModel:
    """The model, of which the fusion alone trains."""
    torch.manual_seed(0)
    decoder = {"model_type": "qwen2", **(SMALL_DECODER if small else DECODER)}
    language = LanguageModel(config=decoder, tokenizer=tokenizer)
    with without_weights():
        vision = HFVision(config=SMALL_TOWER) if small else HFVision(TOWER, layer=-2)
    fusion = LaViFusion(every=4 if not small else 1, generator=AttentionDeltas(bottleneck=32 if small else 128))
    model = VisionLanguageModel(vision=vision, language=language, fusion=fusion).requires_grad_(False)
    model.fusion.requires_grad_(True)
    return model.eval()


def step(model: VisionLanguageModel, batches: Iterator[Any], device: torch.device) -> None:
    """Read a batch, forward, backward."""
    with torch.enable_grad():
        model.token_scores(next(batches).batch.to(device)).loss.backward()


def measure(device: torch.device, *, small: bool, batch_size: int, turns: int) -> list[dict[str, Any]]:
    """One record for each way."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scenes"
        write_dataset(data, seed=0, counts={"train": 4 * batch_size}, turns=3, workers=2)
        model = build(str(data / "tokenizer"), small=small).to(device)
        load = partial(ImageTextData, model.processor, batch_size=batch_size, shuffle=0)
        settings = {"precision": "32-true", "dtype": "bfloat16", "batch_size": batch_size, "threads": 2}
        request = feature_request(model, device=device, **settings)  # type: ignore[arg-type]
        load(train=str(data / "train")).write_features("train", Path(folder) / FEATURES, request)
        ways: dict[str, Callable[[], None]] = {}
        for way, source in ((PIXELS, data / "train"), (FEATURES, Path(folder) / FEATURES)):
            of_way = load(train=str(source))
            check_feature_caches(model, of_way, ["train"])
            ways[way] = partial(step, model, iter(of_way.train_dataloader()), device)
        contestants = [Contestant({"step": run}) for run in ways.values()]
        times = [t["step"] for t in time_in_turns(contestants, clock_of(device), pairs=[(1, 0)], turns=turns)]
    about = {"device": device_name(device), "torch": torch.__version__, "batch_size": batch_size, "small": small}
    return [
        about
        | {
            "way": way,
            "milliseconds": estimate(own).median,
            "samples_per_second": 1e3 * batch_size / estimate(own).median,
        }
        | {"speed_ratio": ends(ratio(times[0], own))}
        for way, own in zip(ways, times, strict=True)
    ]


def cached_features_table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["images as", "ms a step", "samples a second", "times those of pixels (interval)"]
    rows = []
    for record in records:
        median, low, high = record["speed_ratio"]
        figures = [f"{record['milliseconds']:.0f}", f"{record['samples_per_second']:.2f}"]
        rows.append([record["way"], *figures, f"{median:.1f} ({low:.1f}-{high:.1f})"])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=7, help="timed turns")
    parser.add_argument("--batch-size", type=whole_number(1), default=2, help="samples of a step")
    parser.add_argument("--small", action="store_true", help="a small tower and decoder")
    args = read(parser)
    records = keep(measure(device_of("auto"), small=args.small, batch_size=args.batch_size, turns=args.turns), args.out)
    title = f"a training step of {args.batch_size} samples; {records[0]['device']}"
    console().print(table(title, *cached_features_table(records)))


if __name__ == "__main__":
    main()

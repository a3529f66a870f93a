"""Several fusions on one tower and one language model, random weights: what differs between their times is theirs.

A fusion acts where its own context comes by, so they do not meet; the language model without any is the floor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sizes import QWEN2_05B, QWEN2_7B, SIGLIP_SO400M, SMALL_QWEN2, SMALL_SIGLIP, recipe_of

from datamodules.tokenizer import train_tokenizer
from lavi.data.tiling import Tiling
from lavi.efficiency.measure import build_on
from lavi.fusion.base import Fusion
from lavi.fusion.lavi import LaViFusion
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import DeltaGenerator

FULL: dict[str, Any] = {"vision": SIGLIP_SO400M, "language": QWEN2_7B, "dtype": "bfloat16"}
REDUCED: dict[str, Any] = {"vision": SMALL_SIGLIP, "language": SMALL_QWEN2, "dtype": "float32"}
PUBLISHED: dict[str, Any] = REDUCED | {"language": QWEN2_05B}
"""A language model of a published size, which a CPU can still time where only it works: when one more token is made."""
TINY: dict[str, Any] = {
    "vision": SMALL_SIGLIP | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "language": SMALL_QWEN2 | {"hidden_size": 32, "intermediate_size": 64},
    "dtype": "float32",
}


def sizes_for(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Of a 7B model on a GPU; elsewhere such as give ratios and no GPU figure."""
    return TINY if small else FULL if device.type == "cuda" else REDUCED


def lavi(generator: DeltaGenerator | None = None) -> LaViFusion:
    """With the norm and its deltas in one kernel, where there is one: not on a CPU."""
    return LaViFusion(generator=generator, fused_norm=True)


def build(
    sizes: Mapping[str, Any],
    fusions: Mapping[str, Callable[[], Fusion]],
    device: torch.device,
    tiling: Tiling | None = None,
) -> dict[str, VisionLanguageModel]:
    """A model for each fusion, by name."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a prompt of no meaning"], Path(folder))
        recipe = recipe_of(
            sizes["vision"],
            sizes["language"],
            Path(folder),
            dtype=sizes["dtype"],
            source="benchmarks/fusions_on_one.py",
        )
        first = build_on(recipe, device)
        first.vision.to(first.language.hf.dtype)
        return {name: _with(first, make(), device, tiling) for name, make in fusions.items()}


def _with(
    model: VisionLanguageModel, fusion: Fusion, device: torch.device, tiling: Tiling | None
) -> VisionLanguageModel:
    with torch.device(device):
        other = VisionLanguageModel(vision=model.vision, language=model.language, fusion=fusion, tiling=tiling)
    # As after training: with a last projection of zeros no delta would be a number that takes time to work with.
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return other.eval()

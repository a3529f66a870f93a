"""Published sizes, as bare configurations: what benchmarks build on the meta device, or with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavi.loading.published import CONFIGURATIONS
from lavi.recipe import Recipe


def published(name: str) -> dict[str, Any]:
    """The configuration of a published checkpoint."""
    config: dict[str, Any] = json.loads((CONFIGURATIONS / name / "config.json").read_text())
    return config


SIGLIP_SO400M = published("google/siglip-so400m-patch14-384")
CLIP_L_336 = published("openai/clip-vit-large-patch14-336")
VICUNA_7B = published("lmsys/vicuna-7b-v1.5")
QWEN2_05B = published("Qwen/Qwen2-0.5B-Instruct")
QWEN2_7B = published("Qwen/Qwen2-7B-Instruct")

SMALL_SIGLIP = SIGLIP_SO400M | {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
SMALL_QWEN2 = QWEN2_7B | {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
"""The same shapes of input at a size that a CPU can time: tokens, crops and frames are those of the full size."""


def recipe_of(
    vision: dict[str, Any],
    language: dict[str, Any],
    tokenizer: Path,
    *,
    dtype: str = "bfloat16",
    source: str,
    **fusion: Any,
) -> Recipe:
    """A LaVi recipe of bare configurations; ``fusion`` are LaVi's own arguments."""
    model = {
        "_target_": "lavi.model.VisionLanguageModel",
        "vision": {"_target_": "lavi.vision.hf.HFVision", "config": vision, "layer": -2},
        "language": {
            "_target_": "lavi.language.load.LanguageModel",
            "config": language,
            "tokenizer": str(tokenizer),
            "dtype": dtype,
        },
        "fusion": {"_target_": "lavi.fusion.lavi.LaViFusion", **fusion},
    }
    return Recipe({"seed": 0, "model": model}, source=source)

"""Published sizes, as bare configurations: what benchmarks build on the meta device, or with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavi.recipe import Recipe

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


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

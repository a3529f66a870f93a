"""A hub on the disk: published configurations under their hub names, without weights, where transformers looks.

So recipes that name real checkpoints are built by the very code that would fetch them, on the meta device.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sizes import CLIP_L_336, QWEN2_05B, QWEN2_7B, SIGLIP_SO400M, VICUNA_7B

from lavi.chat import TEMPLATES

LANGUAGE = {
    "Qwen/Qwen2-7B-Instruct": (QWEN2_7B, "chatml"),
    "Qwen/Qwen2-0.5B-Instruct": (QWEN2_05B, "chatml"),
    "lmsys/vicuna-7b-v1.5": (VICUNA_7B, None),
}
VISION = {
    "google/siglip-so400m-patch14-384": ("siglip", SIGLIP_SO400M, "SiglipImageProcessor", [0.5] * 3),
    "openai/clip-vit-large-patch14-336": (
        "clip",
        CLIP_L_336,
        "CLIPImageProcessor",
        [0.48145466, 0.4578275, 0.40821073],
    ),
}


def fill(home: Path, tokenizer: Path) -> None:
    """Write every model's files under ``home`` (HF_HOME); all share one small ``tokenizer``."""
    for name, (config, template) in LANGUAGE.items():
        folder = _snapshot(home, name)
        _json(folder / "config.json", config)
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        _json(folder / "tokenizer_config.json", settings | ({"chat_template": TEMPLATES[template]} if template else {}))
    for name, (kind, config, processor, mean) in VISION.items():
        folder = _snapshot(home, name)
        _json(folder / "config.json", {"model_type": kind, "vision_config": config})
        side = config["image_size"]
        size = {"shortest_edge": side} if kind == "clip" else {"height": side, "width": side}
        crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}} if kind == "clip" else {}
        settings = {
            "image_processor_type": processor,
            "size": size,
            "resample": 3,
            "image_mean": mean,
            "image_std": mean,
        }
        _json(folder / "preprocessor_config.json", settings | crop)


def _snapshot(home: Path, name: str) -> Path:
    """The folder in which the hub's cache keeps one revision of a repository."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "0"
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0")
    return folder


def _json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))

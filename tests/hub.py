"""A hub on the disk: tokenizers under the names of published checkpoints, where transformers looks for them.

Their configurations are in ``lavi/loading/configurations``; so recipes that name real checkpoints are built whole, on
meta.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlms import IMAGES_FIRST, IN_ORDER, with_media

from lavi.data.chat import TEMPLATES
from lavi.loading.published import CONFIGURATIONS

TEMPLATE_OF = {"Qwen/Qwen2-7B-Instruct": "chatml", "Qwen/Qwen2-0.5B-Instruct": "chatml", "lmsys/vicuna-7b-v1.5": None}

VISION_LANGUAGE = {
    "llava-hf/llava-1.5-7b-hf": IMAGES_FIRST,
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": IMAGES_FIRST,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": IMAGES_FIRST,
    "HuggingFaceTB/SmolVLM-256M-Instruct": IN_ORDER,
}
"""Published vision-language models, and a template of the kind that is theirs."""


def fill(home: Path, tokenizer: Path) -> None:
    """Write one small ``tokenizer`` under every name into ``home`` (HF_HOME), with the template that is theirs."""
    for name, template in TEMPLATE_OF.items():
        folder = _snapshot(home, name)
        for file in (CONFIGURATIONS / name / "config.json", *tokenizer.iterdir()):
            shutil.copy(file, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        settings |= {"chat_template": TEMPLATES[template]} if template else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, template in VISION_LANGUAGE.items():
        folder = _snapshot(home, name)
        words = with_media(str(tokenizer))
        words.chat_template = template
        words.save_pretrained(folder)
        for file in (CONFIGURATIONS / name).iterdir():
            shutil.copy(file, folder)


def _snapshot(home: Path, name: str) -> Path:
    """The folder in which the hub's cache keeps one revision of a repository."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / "0"
    folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0")
    return folder

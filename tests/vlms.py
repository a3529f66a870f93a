"""Small checkpoints of published vision-language models, written by transformers' own ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import QWEN2, TOWER
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase

SIDE, PATCH = 24, 8
SIGLIP = TOWER | {"image_size": SIDE, "patch_size": PATCH, "vision_use_head": False}
CLIP = {key: value for key, value in SIGLIP.items() if key != "vision_use_head"} | {"model_type": "clip_vision_model"}
LLAMA = QWEN2 | {"model_type": "llama", "max_position_embeddings": 1024, "tie_word_embeddings": False}
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
ONEVISION_PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]

IMAGES_FIRST = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}"
    "{% for part in m['content'] if part['type'] != 'text' %}<{{ part['type'] }}>\n{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IN_ORDER = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize }}{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MARKERS = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def write_vlm(kind: str, folder: Path, tokenizer: str, seed: int = 0) -> Path:
    """A checkpoint of a class, weights at random, with its processor; a known chat template."""
    words = with_media(tokenizer)
    words.chat_template = IN_ORDER if kind in ("idefics3", "smolvlm") else IMAGES_FIRST
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **_keys(kind, words))
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases at random, too: a wrong one shows
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _processor(kind, words).save_pretrained(folder)
    return folder


def with_media(tokenizer: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the tokens that stand for images, videos and tiles."""
    words: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"bos_token": "<s>"})
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<video>", *MARKERS, *TILES]})
    return words


def _keys(kind: str, words: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {"image_token_id": words.convert_tokens_to_ids("<image>")}
    text = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text |= {"pad_token_id": words.pad_token_id}
    if kind in ("idefics3", "smolvlm"):
        keys = {key: value for key, value in SIGLIP.items() if key not in ("model_type", "vision_use_head")}
        return ids | {"scale_factor": 3, "vision_config": keys, "text_config": LLAMA | text}
    if kind == "llava_onevision":
        qwen2 = QWEN2 | text | {"max_position_embeddings": 1024}
        video = {"video_token_id": words.convert_tokens_to_ids("<video>")}
        return (
            ids | video | {"vision_config": SIGLIP, "text_config": qwen2, "image_grid_pinpoints": ONEVISION_PINPOINTS}
        )
    pinpoints = {"image_grid_pinpoints": PINPOINTS} if kind == "llava_next" else {}
    return ids | pinpoints | {"vision_config": CLIP, "text_config": LLAMA | text, "vision_feature_layer": -2}


def _processor(kind: str, words: PreTrainedTokenizerBase) -> Any:
    def own(name: str, **keys: Any) -> Any:
        return getattr(transformers, f"{name}ImageProcessorPil")(**keys)

    square, sized = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    if kind in ("idefics3", "smolvlm"):
        name = "Idefics3" if kind == "idefics3" else "SmolVLM"
        images = own(name, size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE})
        # SmolVLM's own writes the same; it wants another package, to write out numbers of frames.
        return transformers.Idefics3Processor(images, words, image_seq_len=1, chat_template=words.chat_template)
    keys: dict[str, Any] = {"chat_template": words.chat_template, "tokenizer": words}
    if kind == "llava_onevision":
        images = own("LlavaOnevision", size=square, image_grid_pinpoints=ONEVISION_PINPOINTS)
        videos = transformers.LlavaOnevisionVideoProcessor(size=square)
        tokens = (SIDE // PATCH) ** 2
        return transformers.LlavaOnevisionProcessor(images, video_processor=videos, num_image_tokens=tokens, **keys)
    keys |= {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if kind == "llava_next":
        images = own("LlavaNext", size=sized, crop_size=square, image_grid_pinpoints=PINPOINTS)
        return transformers.LlavaNextProcessor(images, **keys)
    return transformers.LlavaProcessor(own("CLIP", size=sized, crop_size=square), **keys)

"""Whether a language model keeps its language: its perplexity on text without images, before and after training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavi.batch import Batch
from lavi.checkpoints.published_vlm import written_out
from lavi.errors import UserError, reason
from lavi.language.load import LanguageModel
from lavi.language.token_scores import scores_of
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe


@dataclass(frozen=True)
class Perplexity:
    """Of a language model alone, as its checkpoint has it, and of the same model inside what was trained.

    Args:
        before, after: exp of the mean cross-entropy of a token (nats) behind those before it in its text.
        tokens: that were predicted.
    """

    before: float
    after: float
    tokens: int


def read_texts(file: Path) -> list[str]:
    """The texts of a file; an empty line ends one.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        texts = [text.strip().replace("\n", " ") for text in file.read_text(encoding="utf-8").split("\n\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"the texts {file} cannot be read ({reason(error)}): name a file of UTF-8 text.") from None
    if not any(texts):
        raise UserError(f"{file} holds no text: write some into it, with an empty line behind each.")
    return [text for text in texts if text]


@torch.no_grad()
def compare_perplexity(recipe: Recipe, model: VisionLanguageModel, texts: list[str]) -> Perplexity:
    """Perplexity on texts without images, of a recipe's language model before training and of the trained model."""
    device, tokenizer = model.language.hf.device, model.language.tokenizer
    batches = [_text_batch(text, tokenizer, model).to(device) for text in texts]
    after, tokens = _mean_loss(model, batches)
    recipe = written_out(recipe)
    if recipe.settings["model"]["language"].get("lora") is not None:
        recipe = recipe.replaced("model.language.lora", None)
    alone: LanguageModel = recipe.build("model.language").to(device).eval()
    before, _ = _mean_loss(lambda batch: alone.hf(input_ids=batch.input_ids, use_cache=False).logits, batches)
    return Perplexity(math.exp(before), math.exp(after), tokens)


def _mean_loss(forward: Callable[[Batch], Tensor], batches: list[Batch]) -> tuple[float, int]:
    """Mean cross-entropy of a token, and the number of tokens, one text at a time."""
    scores = [scores_of(forward(batch), batch.labels) for batch in batches]
    count = sum(len(of_text.positions) for of_text in scores)
    return float(sum(of_text.loss.double() for of_text in scores)) / max(1, count), count


def _text_batch(text: str, tokenizer: PreTrainedTokenizerBase, model: VisionLanguageModel) -> Batch:
    """A text alone as one row; all of its tokens but the first are predicted."""
    ids = torch.tensor([tokenizer(text).input_ids[: model.context_length]])  # (1, T)
    return Batch(
        input_ids=ids,
        labels=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        pixels=torch.zeros(0, *model.vision.pixel_shape),
        spans=[(0, ids.shape[1])],
        image_slots=[],
    )

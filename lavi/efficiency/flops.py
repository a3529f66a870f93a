"""FLOPs by component, twice: counted on the meta device, and in closed form. 1 multiply-add = 2 FLOPs.

Norms, softmax, rotary embeddings and gates count as 0 in both. What a method adds and no operator counter sees (LaVi's
``dgamma * xhat + dbeta``) is added by formula, in a component of its own. Attention is counted in full (as every
counter does); ``causal`` says how much of it a causal kernel leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Batch, ImagePlace, Layout
from lavi.language.load import LanguageModel
from lavi.language.surgery import takes_attention_mask
from lavi.model import VisionLanguageModel
from lavi.nn.flops import linear_flops


@dataclass(frozen=True)
class Flops:
    """FLOPs of one prefill: the prompt with its visual tokens, up to the logits of the first answer token."""

    components: dict[str, float]
    causal_discount: float
    """What a causal attention kernel leaves out of the text and visual attention."""
    floor: float
    """The bare language model on the text tokens alone: what fusion that costs nothing would leave."""

    @property
    def language(self) -> float:
        """All but the vision encoder."""
        return self.total - self.components["vision_encoder"]

    @property
    def total(self) -> float:
        return sum(self.components.values())


def closed_form(model: VisionLanguageModel, *, text: int, visual: int, views: int) -> Flops:
    """One row of ``text`` tokens and ``visual`` visual tokens out of ``views`` encoded views."""
    inside = tokens_inside(model, visual)
    language = language_flops(model.language, tokens=text + inside)
    alone = language_flops(model.language, tokens=text)
    own = {name: cost.flops for name, cost in model.fusion.costs(text, visual).items()}
    components = {
        "vision_encoder": model.vision.flops(views),
        **own,
        "text_attention": alone["attention"],
        "text_ffn": alone["ffn"],
        "visual_attention": language["attention"] - alone["attention"],
        "visual_ffn": language["ffn"] - alone["ffn"],
        "head": alone["head"],
    }
    return Flops(
        components, causal_discount=language["scores"] / 2, floor=alone["attention"] + alone["ffn"] + alone["head"]
    )


def language_flops(language: LanguageModel, *, tokens: int) -> dict[str, float]:
    """The language model's prefill of ``tokens`` tokens: ``attention`` (with its ``scores``), ``ffn``, ``head`` (once).

    From the shapes of the weights, so that it holds for any family: every matrix of a layer meets every token once.
    """
    config = language.hf.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 4.0 * tokens * tokens * config.num_attention_heads * head_width * len(language.layers)
    attention = ffn = 0.0
    for layer in language.layers:
        for child in layer.children():
            matrices = sum(2.0 * tokens * p.numel() for p in child.parameters() if p.ndim == 2)
            attention, ffn = (attention + matrices, ffn) if takes_attention_mask(child) else (attention, ffn + matrices)
    head = linear_flops(1, config.hidden_size, config.vocab_size)
    return {"attention": attention + scores, "scores": scores, "ffn": ffn, "head": head}


def counted(model: VisionLanguageModel, *, text: int, visual: int, views: int) -> dict[str, float]:
    """The same as :func:`closed_form` counts, by torch's operator counter on a model built on the meta device.

    Returns:
        ``vision_encoder``; ``language``, the bare model on the same sequence; ``fusion``, what the method adds to it
        (less its ``uncounted`` part).
    """
    batch, features = probe_inputs(model, text=text, visual=visual, device="meta")
    sequence, _ = probe_inputs(model, text=text + tokens_inside(model, visual), visual=0, device="meta")
    pixels = torch.zeros(views, *model.vision.pixel_shape, device="meta")
    bare = {"input_ids": sequence.input_ids, "use_cache": True, "logits_to_keep": 1}
    vision = _count(lambda: model.vision(pixels)) if views else 0.0
    language = _count(lambda: model.language.hf(**bare))
    return {
        "vision_encoder": vision,
        "language": language,
        "fusion": _count(lambda: model.prefill(batch, features)) - language,
    }


def _count(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def probe_inputs(
    model: VisionLanguageModel, *, text: int, visual: int, device: torch.device | str, batch_size: int = 1
) -> tuple[Batch, Tensor]:
    """Rows of ``text`` tokens with one image of ``visual`` tokens before the second, and the image's features."""
    ids = torch.ones(batch_size, text, dtype=torch.long, device=device)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        attention_mask=torch.ones(batch_size, text, dtype=torch.bool, device=device),
        pixels=torch.zeros(0, *model.vision.pixel_shape, device=device),
        spans=[(0, text)] * batch_size,
        places=[ImagePlace(row, min(1, text - 1)) for row in range(batch_size)] if visual else [],
    )
    views = batch_size if visual else 0
    return batch, torch.zeros(views, max(visual, 1), model.vision.width, device=device)


def tokens_inside(model: VisionLanguageModel, visual: int) -> int:
    """Visual tokens that stand in the language model's sequence, for one image of ``visual`` tokens."""
    return model.fusion.tokens_in_language(Layout(), visual) if visual else 0


def views_for(model: VisionLanguageModel, visual: int) -> int:
    """Views the tower encodes for so many visual tokens."""
    return math.ceil(visual / model.vision.tokens)

"""FLOPs by component, twice: counted on the meta device, and in closed form. 1 multiply-add = 2 FLOPs.

Norms, softmax, rotary embeddings and gates count as 0 in both. What a method adds and no operator counter sees (LaVi's
``dgamma * xhat + dbeta``) is added by formula, in a component of its own. Attention is counted in full (as every
counter does); ``causal`` says how much of it a causal kernel leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from lavi.efficiency.scenario import PromptShape
from lavi.fusion.base import Cost
from lavi.language.load import LanguageModel
from lavi.language.surgery import takes_attention_mask
from lavi.model import VisionLanguageModel
from lavi.nn.formulas import linear_flops


@dataclass(frozen=True)
class Flops:
    """FLOPs by component, of all rows: of the prompt up to the first answer token's logits, and of one token more."""

    prefill: dict[str, float]
    decode: dict[str, float]
    causal_discount: float
    """What a causal attention kernel leaves out of the prompt's text and visual attention."""
    floor: float
    """The bare language model on the text tokens alone: what fusion that costs nothing would leave of the prompt."""

    @property
    def language(self) -> float:
        """The prompt, all but the vision encoder."""
        return self.total - self.prefill["vision_encoder"]

    @property
    def total(self) -> float:
        """The prompt."""
        return sum(self.prefill.values())


def closed_form(model: VisionLanguageModel, shape: PromptShape) -> Flops:
    """By formula, from the shapes of the weights."""
    inside, layout, per_view = shape.visual_tokens_in_language(model), shape.layout, shape.per_view
    layers = len(model.language.layers)
    visual = model.fusion.visual_by_layer(inside, layers)
    text = [shape.text] * layers
    with_visual = [shape.text + count for count in visual]
    language, alone = (language_flops(model.language, tokens=tokens) for tokens in (with_visual, text))
    prefill = {
        "vision_encoder": model.vision.flops(shape.encoded, layout.grid if layout else None),
        **({"reducer": shape.encoded * model.reducer.flops()} if model.reducer is not None else {}),
        **_flops(model.fusion.costs(shape.text, layout, per_view)),
        "text_attention": alone["attention"],
        "text_ffn": alone["ffn"],
        "visual_attention": language["attention"] - alone["attention"],
        "visual_ffn": language["ffn"] - alone["ffn"],
        "head": alone["head"],
    }
    after_visual = language_flops(model.language, tokens=[1] * layers, past=with_visual)
    after_text = language_flops(model.language, tokens=[1] * layers, past=text)
    decode = {
        **_flops(model.fusion.costs(1, layout, per_view, decoding=True)),
        "text_attention": after_text["attention"],
        "text_ffn": after_text["ffn"],
        "visual_attention": after_visual["attention"] - after_text["attention"],
        "head": after_text["head"],
    }
    rows = shape.batch
    return Flops(
        prefill={name: rows * flops for name, flops in prefill.items()},
        decode={name: rows * flops for name, flops in decode.items()},
        causal_discount=rows * language["scores"] / 2,
        floor=rows * (alone["attention"] + alone["ffn"] + alone["head"]),
    )


def _flops(costs: dict[str, Cost]) -> dict[str, float]:
    return {name: cost.flops for name, cost in costs.items()}


def language_flops(
    language: LanguageModel, *, tokens: Sequence[int], past: Sequence[int] | None = None
) -> dict[str, float]:
    """The language model on so many tokens in each of its layers, behind so many cached ones in each.

    From the shapes of the weights, so that it holds for any family: every matrix of a layer meets every token once.

    Returns:
        ``attention`` (``scores`` are its part), ``ffn``, and the ``head`` for the last token.
    """
    config = language.hf.config
    before = past or [0] * len(tokens)
    caches = DynamicCache(config=config).layers
    scores = sum(
        4.0 * new * _keys(cache, old, new) * language.attention_width
        for cache, new, old in zip(caches, tokens, before, strict=True)
    )
    attention = ffn = 0.0
    for layer, new in zip(language.layers, tokens, strict=True):
        for child in layer.children():
            matrices = sum(2.0 * new * p.numel() for p in child.parameters() if p.ndim == 2)
            attention, ffn = (attention + matrices, ffn) if takes_attention_mask(child) else (attention, ffn + matrices)
    head = linear_flops(1, config.hidden_size, config.vocab_size)
    return {"attention": attention + scores, "scores": scores, "ffn": ffn, "head": head}


def _keys(cache: Any, past: int, tokens: int) -> int:
    """Keys that each token meets in one layer; of the past no more than a sliding window keeps."""
    window = getattr(cache, "sliding_window", None)
    return past + tokens if not past or window is None else min(past, window - 1) + tokens


def counted(model: VisionLanguageModel, shape: PromptShape) -> dict[str, float]:
    """The same by torch's operator counter, on a model built on the meta device.

    Returns:
        ``vision_encoder``; ``reducer``; ``language``, the bare model with as many tokens in each layer; ``fusion``,
        what the method adds to it (less its ``uncounted`` part); ``decode``, one token more.
    """
    batch, features = shape.inputs(model, "meta")
    pixels, token = shape.pixels(model, "meta"), torch.ones(shape.batch, 1, dtype=torch.long, device="meta")
    with torch.no_grad():
        encoder = _count(lambda: model.encode(pixels, shape.grids())) if len(pixels) else 0.0
        out, vision = model.prefill(batch, features)
        language = _bare(model, shape)
        follow = {"past_key_values": out.past_key_values, "use_cache": True, "vision": vision}
        return {
            "vision_encoder": encoder,
            "reducer": _count(lambda: model.features(pixels, shape.grids())) - encoder if len(pixels) else 0.0,
            "language": language,
            "fusion": _count(lambda: model.prefill(batch, features)) - language,
            "decode": _count(lambda: model.language.hf(input_ids=token, **follow)),
        }


def _bare(model: VisionLanguageModel, shape: PromptShape) -> float:
    """The bare language model; where layers differ in their tokens, each costs its share of a run with as many."""
    layers = len(model.language.layers)
    visual = model.fusion.visual_by_layer(shape.visual_tokens_in_language(model), layers)
    lengths = Counter(shape.text + count for count in visual)

    def run(length: int) -> float:
        ids = torch.ones(shape.batch, length, dtype=torch.long, device="meta")
        return _count(lambda: model.language.hf(input_ids=ids, use_cache=True, logits_to_keep=1))

    config = model.language.hf.config
    head = shape.batch * linear_flops(1, config.hidden_size, config.vocab_size)
    return head + sum(share * (run(length) - head) / layers for length, share in lengths.items())


def _count(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())

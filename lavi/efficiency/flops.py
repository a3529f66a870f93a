"""FLOPs by component, twice: counted operator by operator, and in closed form. 1 multiply-add = 2 FLOPs.

Norms, softmax, rotary embeddings and gates count as 0 in both. What a method adds and no operator counter sees (LaVi's
``dgamma * xhat + dbeta``) is added by formula, in a component of its own. Attention is counted in full (as every
counter does); ``causal`` says how much of it a causal kernel leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PretrainedConfig

import lavi.efficiency.operators  # noqa: F401  (formulas that torch 2.11 lacks)
from lavi.efficiency.scenario import PromptShape
from lavi.errors import UserError
from lavi.fusion.base import Cost
from lavi.language.load import LanguageModel
from lavi.language.sequence import experts_by_operators, looks_up_by_id, recurrent_layers
from lavi.language.surgery import takes_attention_mask
from lavi.model import VisionLanguageModel
from lavi.nn.formulas import linear_flops

Result = TypeVar("Result")


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
        "vision_encoder": model.vision.flops(shape.encoded, shape.encoded_layout or layout),
        **({"reducer": shape.encoded * model.reducer.flops()} if model.reducer is not None else {}),
        **_flops(model.fusion.costs(shape.text, layout, per_view)),
        "text_attention": alone["attention"],
        "text_ffn": alone["ffn"],
        "visual_attention": language["attention"] - alone["attention"],
        "visual_ffn": language["ffn"] - alone["ffn"],
        "head": alone["head"],
    }
    cached = [shape.text + count for count in model.fusion.cached_by_layer(inside, layers)]
    after_visual = language_flops(model.language, tokens=[1] * layers, past=cached)
    after_text = language_flops(model.language, tokens=[1] * layers, past=text)
    decode = {
        **_flops(model.fusion.costs(1, layout, per_view, past=shape.text)),
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

    Raises:
        UserError: layers keep a recurrent state or get inputs by the tokens' ids, which have no formula here.
    """
    if looks_up_by_id(language.hf):
        raise UserError(
            f"FLOPs of inputs that {type(language.hf).__name__} looks up for each layer have no formula here: such a "
            "model can be trained and timed, and not counted."
        )
    if recurrent := recurrent_layers(language.hf):
        raise UserError(
            f"FLOPs of recurrent layers ({recurrent} of {type(language.hf).__name__}) have no formula here: such a "
            "model can be trained and timed, and not counted."
        )
    config = language.hf.config
    before = past or [0] * len(tokens)
    attention = ffn = scores = 0.0
    together = zip(language.layers, DynamicCache(config=config).layers, tokens, before, strict=True)
    for index, (layer, cache, new, past_of_layer) in enumerate(together):
        keys = _keys(cache, past_of_layer, new)
        scores += language.attention_widths(index).score_flops(new * keys)
        for child in layer.children():
            matrices = _matrix_flops(child, config, tokens=new, keys=keys)
            attention, ffn = (attention + matrices, ffn) if takes_attention_mask(child) else (attention, ffn + matrices)
    head = linear_flops(1, config.hidden_size, config.vocab_size)
    return {"attention": attention + scores, "scores": scores, "ffn": ffn, "head": head}


def _matrix_flops(module: nn.Module, config: PretrainedConfig, *, tokens: int, keys: int) -> float:
    """Each matrix meets every token once; of experts, as many as a token is sent to.

    Args:
        keys: that the tokens meet; a matrix that reads keys out of cached latents (DeepSeek) meets each of them anew.
    """
    flops = 0.0
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if "bias" in name or parameter.ndim not in (2, 3):
                continue
            met = keys if "kv_b_proj" in path else tokens
            of_experts = min(1.0, _experts_of_a_token(config) / len(parameter)) if parameter.ndim == 3 else 1.0
            # A quantized weight may be packed: its linear layer still knows its size.
            size = part.in_features * part.out_features if isinstance(part, nn.Linear) else parameter.numel()
            flops += 2.0 * met * size * of_experts
    return flops


def _experts_of_a_token(config: PretrainedConfig) -> int:
    names = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
    return next((count for name in names if (count := getattr(config, name, None))), 1)


def _keys(cache: Any, past: int, tokens: int) -> int:
    """Keys that each token meets in one layer; of the past no more than a sliding window keeps."""
    window = getattr(cache, "sliding_window", None)
    return past + tokens if not past or window is None else min(past, window - 1) + tokens


def counted(model: VisionLanguageModel, shape: PromptShape) -> dict[str, float]:
    """The same by torch's operator counter, on the model's device.

    On the meta device nothing is computed, and nothing is chosen by what is seen: a router takes the configuration of
    its fusion, and no patch repeats another. Elsewhere they choose, of pixels that are 0 and tokens that are 1.

    Returns:
        ``vision_encoder``; ``reducer``; ``language``, the bare model with as many tokens in each layer; ``fusion``,
        what the method adds to it (less its ``uncounted`` part); ``decode``, one token more.
    """
    device = model.language.hf.device
    batch, features = shape.inputs(model, device)
    pixels, token = shape.pixels(model, device), torch.ones(shape.batch, 1, dtype=torch.long, device=device)
    with torch.no_grad(), experts_by_operators(model.language.hf.config):
        encoder, encoded = _count(lambda: model.encode(pixels, shape.layouts)) if len(pixels) else (0.0, None)
        prefill, (out, vision) = _count(lambda: model.prefill(batch, features))
        language = _bare(model, shape)
        follow = {"past_key_values": out.past_key_values, "use_cache": True, "vision": vision}
        return {
            "vision_encoder": encoder,
            "reducer": _count(partial(model.reducer, encoded))[0] if model.reducer is not None and len(pixels) else 0.0,
            "language": language,
            "fusion": prefill - language,
            "decode": _count(lambda: model.language.hf(input_ids=token, **follow))[0],
        }


def _bare(model: VisionLanguageModel, shape: PromptShape) -> float:
    """The bare language model; where layers differ in their tokens, each is counted in a run with as many in all."""
    hf, layers = model.language.hf, model.language.layers
    visual = model.fusion.visual_by_layer(shape.visual_tokens_in_language(model), len(layers))
    lengths = [shape.text + count for count in visual]
    name = {id(module): name for name, module in hf.named_modules()}

    def run(length: int) -> FlopCounterMode:
        ids = torch.ones(shape.batch, length, dtype=torch.long, device=hf.device)
        with FlopCounterMode(display=False) as counter:
            hf(input_ids=ids, use_cache=True, logits_to_keep=1)
        return counter

    runs = {length: run(length) for length in set(lengths)}
    if len(runs) == 1:
        return float(runs[lengths[0]].get_total_flops())
    head = shape.batch * linear_flops(1, hf.config.hidden_size, hf.config.vocab_size)
    counts = [
        runs[length].get_flop_counts()[f"{type(hf).__name__}.{name[id(layer)]}"]
        for layer, length in zip(layers, lengths, strict=True)
    ]
    return head + sum(float(sum(of_layer.values())) for of_layer in counts)


def _count(run: Callable[[], Result]) -> tuple[float, Result]:
    """FLOPs of what runs, and what it gives."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return float(counter.get_total_flops()), result

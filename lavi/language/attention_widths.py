"""How wide queries and values are: what the scores of an attention cost, and what reading values by them costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PretrainedConfig

PAIRED_HEADS = frozenset({"diffllama"})
"""Families whose heads go in pairs, each head reading the values of both (Differential Transformer, 2410.05258)."""


@dataclass(frozen=True)
class AttentionWidths:
    """Of one layer, all query heads together.

    Attributes:
        query: numbers of a query, and of the keys it meets.
        value: numbers of the values that a query reads.
    """

    query: int
    value: int

    @classmethod
    def of(cls, config: PretrainedConfig, layer: int) -> Self:
        """Of a language model with this configuration."""
        own = config.per_layer_config[layer]
        heads = own.num_attention_heads
        width = getattr(own, "head_dim", None) or own.hidden_size // heads
        query = getattr(own, "qk_head_dim", None) or width  # keys and values that are read out of a latent may differ
        value = getattr(own, "v_head_dim", None) or width
        if config.model_type not in PAIRED_HEADS:
            return cls(heads * query, heads * value)
        # A fused kernel takes values as wide as keys, so it runs twice; the other one scores once.
        return cls(heads * query * (1 if config._attn_implementation == "eager" else 2), 2 * heads * value)

    def score_flops(self, pairs: float) -> float:
        """For so many pairs of a query and a key: the score, and the value weighted by it."""
        return 2.0 * pairs * (self.query + self.value)

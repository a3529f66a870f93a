"""Decoders that read the text's own sequence alone, or none with padding.

What enters a recurrent state, no mask takes out again; what a layer looks up by a token's id, a visual token lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from lavi.errors import UserError

PADDING_STAYS_OUT = frozenset(
    {"bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "olmo_hybrid", "qwen3_5_text", "qwen3_next"}
)
"""Families with recurrent layers in which padding stays outside the state and cached decoding is the full forward."""

SHARES_KEYS_AND_VALUES = "DummyLayer"
"""What newer versions of transformers put in the cache for a layer that reads another layer's keys and values."""


def recurrent_layers(model: PreTrainedModel) -> list[int]:
    """The layers that keep a recurrent state, instead of keys and values or beside them."""
    layers = DynamicCache(config=model.config).layers
    return [
        index
        for index, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        or not (isinstance(layer, CacheLayerMixin) or type(layer).__name__ == SHARES_KEYS_AND_VALUES)
    ]


@contextmanager
def experts_by_operators(config: PretrainedConfig) -> Iterator[None]:
    """Experts are run by an operator that meta and counters know, and not by one of transformers' own."""
    before = config._experts_implementation
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = before


def looks_up_by_id(model: PreTrainedModel) -> bool:
    """Whether its layers get inputs that are looked up by the tokens' ids, beside their embeddings."""
    return bool(getattr(model.config, "hidden_size_per_layer_input", None))


def refuse_other_sequence(model: PreTrainedModel, method: str) -> None:
    """Refuse a ``method`` that works on another sequence than the text's where the decoder needs that.

    Raises:
        UserError: some layers keep a recurrent state, or get inputs by the tokens' ids (Gemma 3n, Gemma 4).
    """
    if looks_up_by_id(model):
        raise UserError(
            f"the layers of {type(model).__name__} get inputs that are looked up by a token's id, and {method} puts "
            "tokens into the sequence that have none: take LaVi or cross-attention, or a family such as qwen2 or llama."
        )
    if recurrent := recurrent_layers(model):
        raise UserError(
            f"layers {recurrent} of {type(model).__name__} keep a recurrent state, and {method} works on another "
            "sequence than the text's: take LaVi or cross-attention, or a family such as qwen2 or llama."
        )


def refuse_own_cache(model: PreTrainedModel, method: str) -> None:
    """Refuse a ``method`` that keeps a cache of its own where layers keep a recurrent state, which it cannot hold.

    Raises:
        UserError: some layers do.
    """
    if recurrent := recurrent_layers(model):
        raise UserError(
            f"layers {recurrent} of {type(model).__name__} keep a recurrent state, which {method}'s own cache cannot "
            "hold: take LaVi or cross-attention, or a family such as qwen2 or llama."
        )


def refuse_recurrent(model: PreTrainedModel) -> None:
    """Refuse a family that lets padding into a recurrent state.

    Raises:
        UserError: ``model`` is of one.
    """
    if (recurrent := recurrent_layers(model)) and model.config.model_type not in PADDING_STAYS_OUT:
        raise UserError(
            f"layers {recurrent} of {type(model).__name__} keep a recurrent state, in which padding was not shown to "
            f"leave no trace: choose a family such as qwen2 or llama, or one of {', '.join(sorted(PADDING_STAYS_OUT))}."
        )

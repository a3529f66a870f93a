"""Small configurations of the families of language models that every method is tried on."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_SIZES = {key: value for key, value in QWEN2.items() if key not in ("model_type", "tie_word_embeddings")}
_SMALL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
_WINDOWED = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2 = {"num_key_value_heads": None, "intermediate_size": None} | _NO_DROPOUT
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_LATENT_MOE = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
# Each family's own keys. Together: both kinds of norm, with and without weight, bias and (1 + w), before and after
# the branch, one norm for both branches, local and global layers, rotary and learned positions; experts behind a
# softmax or a sigmoid, with and without shared ones, in all layers or behind dense ones; attention over latent keys.
_OWN: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 24},
    "smollm3": {},
    "gemma": {"head_dim": 8},
    "gemma2": _WINDOWED,
    "gemma3_text": _WINDOWED,
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3},
    "cohere": {},
    "stablelm": {},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": _GPT2,
    "starcoder2": {},
    "ernie4_5": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "apertus": {},
    "arcee": {"head_dim": 8},
    "biogpt": {"num_key_value_heads": None, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "bitnet": {},
    "cohere2": {"head_dim": 8, "sliding_window": 24},
    "cwm": {"head_dim": 8, "sliding_window": 24},
    "deepseek_v2": _LATENT | _LATENT_MOE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v3": _LATENT | _LATENT_MOE | {"topk_group": 1, "first_k_dense_replace": 1},
    "diffllama": {"head_dim": 8},
    "dots1": {
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "sliding_window": 24,
    },
    "ernie4_5_moe": {"moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
    "exaone4": {"sliding_window": 24},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
    },
    "gpt_bigcode": _GPT2,
    "gpt_oss": {"head_dim": 8, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "attention_multiplier": 0.3},
    "granitemoeshared": {"num_local_experts": 4, "attention_multiplier": 0.3, "shared_intermediate_size": 16},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hyperclovax": {"head_dim": 8},
    "internlm3": {"head_dim": 8},
    "jais2": {"head_dim": 8},
    "mellum": {
        "sliding_window": 24,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "head_dim": 8,
    },
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 8, "sliding_window": 24},
    "ministral3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {"initializer_range": 0.2},
    "nemotron": {"head_dim": 8},
    "olmo3": {"sliding_window": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "persimmon": {"num_key_value_heads": None},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "solar_open": {
        "intermediate_size": None,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "head_dim": 8,
    },
    "vaultgemma": _WINDOWED,
    "youtu": _LATENT,
}
OF_THE_NEWEST = tuple(_OWN)
"""Those of the newest transformers."""
FAMILIES = {
    family: {k: v for k, v in (_SIZES | _SMALL_IDS | own).items() if v is not None} | {"model_type": family}
    for family, own in _OWN.items()
    if family in CONFIG_MAPPING  # InternLM 3 came with transformers 5.18
}
EAGER = ("gemma2", "gpt_oss", "vaultgemma")
"""Families whose attention no fused kernel computes: scores are capped, or share themselves with a sink."""

VARIED = (
    *("qwen2", "mistral", "smollm3", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "cohere", "stablelm"),
    *(
        "gpt_neox",
        "gpt2",
        "glm4",
        "cohere2",
        "deepseek_v2",
        "diffllama",
        "exaone4",
        "gpt_bigcode",
        "gpt_oss",
        "nanochat",
    ),
    *("persimmon", "qwen3_moe"),
)
"""One or two of each kind, for what would take too long on all."""

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": _MAMBA
    | {"num_local_experts": 0, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "olmo_hybrid": _DELTA | {"layer_types": None},
    "qwen3_5_text": _DELTA | {"head_dim": 8},
    "qwen3_next": _DELTA
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    | {"head_dim": 8},
}
HYBRIDS = {
    family: {k: v for k, v in (_SIZES | _SMALL_IDS | own).items() if v is not None} | {"model_type": family}
    for family, own in _HYBRIDS.items()
}
"""Families some of whose layers keep a recurrent state."""

LOOKING_UP: dict[str, dict[str, Any]] = {
    "gemma4_text": _SIZES
    | _SMALL_IDS
    | {"model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2}
    | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "sliding_window": 24}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
}
"""Families whose layers get inputs that are looked up by the tokens' ids."""

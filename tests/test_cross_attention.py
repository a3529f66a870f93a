"""Gated cross-attention against transformers' own (mllama), with its weights."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from lavi.errors import UserError
from lavi.nn.cross_attention import GatedCrossAttention
from lavi.nn.visibility import Visibility

NAMES = {  # ours: theirs
    "norm.weight": "input_layernorm.weight",
    "query.weight": "cross_attn.q_proj.weight",
    "key.weight": "cross_attn.k_proj.weight",
    "value.weight": "cross_attn.v_proj.weight",
    "out.weight": "cross_attn.o_proj.weight",
    "query_norm.weight": "cross_attn.q_norm.weight",
    "key_norm.weight": "cross_attn.k_norm.weight",
    "gate": "cross_attn_attn_gate",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "gate_of_ffn": "cross_attn_mlp_gate",
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_it_is_the_layer_of_mllama(kernel: str) -> None:
    config = MllamaTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        cross_attention_layers=[1],
        pad_token_id=0,
    )
    config._attn_implementation = kernel
    torch.manual_seed(0)
    theirs = MllamaCrossAttentionDecoderLayer(config, layer_idx=1).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    ours = GatedCrossAttention(width=32, vision_width=32, heads=4, kv_heads=2, ffn=48)
    state = theirs.state_dict()
    assert set(NAMES.values()) == set(state)
    ours.load_state_dict({own: state[other] for own, other in NAMES.items()})
    hidden, visual = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = torch.rand(2, 5, 7) > 0.4
    mask[..., 0] = True  # every token sees something: what mllama does with one that does not is its own affair
    added = torch.zeros(2, 1, 5, 7).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(
            hidden,
            cross_attention_states=visual,
            cross_attention_mask=added,
            attention_mask=None,
            full_text_row_masked_out_mask=torch.ones(2, 1, 5, 1),
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        seen = ours(hidden, ours.keys_values(visual), Visibility.by(mask))
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="must divide"):
        GatedCrossAttention(width=32, vision_width=8, heads=5)

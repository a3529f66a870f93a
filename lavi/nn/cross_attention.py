"""Text reads vision: gated cross-attention, and the gated feed-forward part that may follow it.

    h (T, D) -> norm -> query -----------------+
                                               attention -> out -> tanh(gate) * -> + h
    V (M, E) -> key, value (once an image) ----+

The gates start at zero: until they are trained the block hands on what it got, bit for bit. A token that sees no image
gets exactly nothing. With a feed-forward part this is the layer of mllama (Llama 3.2 Vision), whose weights fit; with
none it is what VISOR adds to a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavi.errors import UserError
from lavi.nn.formulas import linear_flops
from lavi.nn.visibility import Visibility

KeysValues = tuple[Tensor, Tensor]
"""(B, kv heads, M, d) each."""


class GatedCrossAttention(nn.Module):
    """What is added to text hidden states.

    Args:
        width: D.
        vision_width: E of the visual tokens.
        heads: query heads; they divide D.
        kv_heads: key and value heads; they divide ``heads``. None: as many.
        ffn: width of the gated feed-forward part; 0: none.
        eps: of the norms.
    """

    def __init__(
        self,
        *,
        width: int,
        vision_width: int,
        heads: int,
        kv_heads: int | None = None,
        ffn: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if width % heads or heads % kv_heads:
            raise UserError(
                f"cross-attention: {heads} heads must divide the width {width}, and {kv_heads} key-value heads must "
                "divide the heads."
            )
        self.width, self.vision_width, self.heads, self.kv_heads, self.ffn_width = (
            width,
            vision_width,
            heads,
            kv_heads,
            ffn,
        )
        self.head_width = width // heads
        self.norm = nn.RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(vision_width, kv_heads * self.head_width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm, self.key_norm = (nn.RMSNorm(self.head_width, eps=eps) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(1))
        if ffn:
            self.ffn_norm = nn.RMSNorm(width, eps=eps)
            self.ffn_gate, self.ffn_up = (nn.Linear(width, ffn, bias=False) for _ in range(2))
            self.ffn_down = nn.Linear(ffn, width, bias=False)
            self.gate_of_ffn = nn.Parameter(torch.zeros(1))

    def keys_values(self, visual: Tensor) -> KeysValues:
        """(B, M, E) to keys and values, computed once an image."""
        visual = visual.to(self.key.weight.dtype)
        key, value = (self._split(part(visual)) for part in (self.key, self.value))
        return self.key_norm(key.to(self.key_norm.weight.dtype)), value

    def forward(self, hidden: Tensor, keys_values: KeysValues, seen: Visibility) -> Tensor:
        """``hidden`` (B, T, D) after reading what each token sees of M visual ones."""
        x = hidden.to(self.query.weight.dtype)
        key, value = keys_values
        query = self.query_norm(self._split(self.query(self.norm(x))).to(self.query_norm.weight.dtype))
        read = nn.functional.scaled_dot_product_attention(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            attn_mask=seen.allowed,
            enable_gqa=self.heads != self.kv_heads,
        )
        added = seen.only(self.gate.tanh() * self.out(read.transpose(1, 2).flatten(2)))
        hidden = hidden + added.to(hidden.dtype)
        if self.ffn_width:
            x = self.ffn_norm(hidden.to(self.query.weight.dtype))
            wide = self.ffn_down(nn.functional.silu(self.ffn_gate(x)) * self.ffn_up(x))
            hidden = hidden + seen.only(self.gate_of_ffn.tanh() * wide).to(hidden.dtype)
        return hidden

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, heads, tokens, d)

    def keys_values_flops(self, visual: int) -> float:
        """FLOPs of the keys and values of ``visual`` tokens."""
        return 2 * linear_flops(visual, self.vision_width, self.kv_heads * self.head_width)

    def flops(self, text: int, visual: int) -> float:
        """FLOPs of ``text`` tokens that read ``visual`` tokens, whose keys and values are there."""
        attention = 2 * linear_flops(text, self.width, self.width) + 4.0 * text * visual * self.width
        return attention + 3 * linear_flops(text, self.width, self.ffn_width)

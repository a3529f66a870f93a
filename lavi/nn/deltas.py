"""Delta generators (LaVi's conditioning module): text hidden states and visual tokens to the deltas of norms."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lavi.nn.flops import linear_flops


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the tensor's device; meta has none to switch off."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class AttentionDeltas(nn.Module):
    """Text hidden states query the visual tokens; SiLU; a zero-initialised projection to the deltas (LaVi, Table 4).

    A token's deltas depend on its own hidden state and on the visual tokens it may see, on nothing else of the text.
    Chosen here: the bottleneck, the norms on both inputs, and fp32 throughout (a delta of 2^-9 on a weight of 1 is
    lost in bf16).

    Args:
        width: D of the hidden states.
        vision_width: Dv of the visual tokens.
        outputs: how many deltas of width D a token gets.
        bottleneck: width of the attention, far below D.
        heads: of the attention.
    """

    def __init__(self, *, width: int, vision_width: int, outputs: int, bottleneck: int, heads: int) -> None:
        super().__init__()
        self.width, self.vision_width, self.outputs = width, vision_width, outputs
        self.bottleneck, self.heads = bottleneck, heads
        self.text_norm = nn.RMSNorm(width)
        self.vision_norm = nn.LayerNorm(vision_width)
        self.query = nn.Linear(width, bottleneck, bias=False)
        self.key_value = nn.Linear(vision_width, 2 * bottleneck, bias=False)
        self.deltas = nn.Linear(bottleneck, outputs * width)
        nn.init.zeros_(self.deltas.weight)
        nn.init.zeros_(self.deltas.bias)

    def visual(self, tokens: Tensor) -> Tensor:
        """The image's part, computed once: ``tokens`` (B, N, Dv) to keys and values (2, B, heads, N, r / heads)."""
        with without_autocast(tokens):
            pair = self.key_value(self.vision_norm(tokens.float()))  # (B, N, 2 r)
        return pair.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, hidden: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        """Deltas (B, T, outputs, D) in fp32, exactly 0 where ``mask`` (B, T, N) lets a token see nothing."""
        with without_autocast(hidden):
            query = self.query(self.text_norm(hidden.float())).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            sees = mask.any(-1, keepdim=True)  # (B, T, 1)
            # A row that may see nothing attends to everything and is multiplied by 0: no softmax over an empty set,
            # and its parameters stay in the graph, so that a rank without images does not hang the others.
            allowed = (mask | ~sees)[:, None]  # (B, 1, T, N)
            key, value = visual
            seen = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed
            )  # (B, heads, T, r/heads)
            seen = nn.functional.silu(seen.transpose(1, 2).flatten(2))  # (B, T, r)
            return (self.deltas(seen) * sees).unflatten(-1, (self.outputs, self.width))

    def flops(self, text: int, visual: int) -> float:
        """FLOPs for ``text`` tokens that look at ``visual`` ones."""
        r = self.bottleneck
        attention = 4 * text * visual * r
        image = linear_flops(visual, self.vision_width, 2 * r)
        return image + linear_flops(text, self.width, r) + attention + linear_flops(text, r, self.outputs * self.width)

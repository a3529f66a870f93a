"""Text attends to an image and to itself in one softmax (CASA, arXiv 2512.19535).

    h (T, D) -> norm -> query ----------------------------+
                     -> key, value --+                    attention -> out -> + h
    V (M, D) -> norm -> key, value --+- one after other --+

The text among the keys is the gate: a token that needs nothing of the image attends to text. The paper's windows are a
mask over these keys. Chosen here: the norms of queries and keys, and that ``out`` starts at zero, so that the language
model is untouched until it is trained; the text's keys know their order by the causal mask alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lavi.errors import UserError
from lavi.nn.cross_attention import KeysValues
from lavi.nn.formulas import linear_flops
from lavi.nn.visibility import Visibility


class WindowAttention(nn.Module):
    """What is added to text hidden states.

    Args:
        width: D.
        heads: they divide D.
        eps: of the norms.

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(self, *, width: int, heads: int, eps: float = 1e-5) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"attention within windows: {heads} heads must divide the width {width}.")
        self.width, self.head_width = width, width // heads
        self.norm = nn.RMSNorm(width, eps=eps)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (nn.RMSNorm(self.head_width, eps=eps) for _ in range(2))
        nn.init.zeros_(self.out.weight)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Of tokens (B, n, D) as they come."""
        return self._keys_values(self.norm(tokens.to(self.query.weight.dtype)))

    def forward(
        self,
        hidden: Tensor,
        visual: KeysValues | None,
        seen: Visibility,
        *,
        cache: Callable[[Tensor, Tensor], KeysValues] | None = None,
    ) -> Tensor:
        """``hidden`` (B, T, D) after reading what each token sees of the M visual tokens and of the text.

        Args:
            visual: of the M visual tokens; None: they are cached.
            seen: (B, T, M + past + T).
            cache: takes these keys and values, and gives them behind those that it had.
        """
        x = self.norm(hidden.to(self.query.weight.dtype))
        query = self.query_norm(self._split(self.query(x)).to(self.query_norm.weight.dtype))
        key, value = self._keys_values(x)
        if visual is not None:
            key, value = (torch.cat([one.to(own), own], dim=2) for one, own in zip(visual, (key, value), strict=True))
        if cache is not None:
            key, value = cache(key, value)
        read = nn.functional.scaled_dot_product_attention(query.to(key), key, value, attn_mask=seen.allowed)
        return hidden + seen.only(self.out(read.transpose(1, 2).flatten(2))).to(hidden.dtype)

    def _keys_values(self, x: Tensor) -> KeysValues:
        key, value = (self._split(part(x)) for part in (self.key, self.value))
        return self.key_norm(key.to(self.key_norm.weight.dtype)).to(value), value

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, heads, tokens, d)

    def keys_values_flops(self, tokens: int) -> float:
        """FLOPs of the keys and values of ``tokens`` tokens."""
        return 2 * linear_flops(tokens, self.width, self.width)

    def flops(self, text: int, others: int) -> float:
        """FLOPs of ``text`` tokens, whose keys are made, and ``others``, whose keys are there."""
        linear = 2 * linear_flops(text, self.width, self.width) + self.keys_values_flops(text)
        return linear + 4.0 * text * (others + text) * self.width

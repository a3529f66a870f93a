"""What one token attends to in one layer, read while the layer's own attention kernel runs.

No other layer computes scores, and this one computes those of a single query: fused kernels stay in use everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavi.language.surgery import takes_attention_mask

NAME = "lavi_ranking"


@dataclass
class Ranking:
    """Collects the scores of one call of one layer.

    Args:
        at: (B,) index of the query among the tokens of the call.
        columns: (B, K) of the arranged sequence that the tokens have: what a sliding window is counted in.
        valid: (B, K) which keys are tokens; None: all.
    """

    kernel: str
    at: Tensor
    columns: Tensor
    valid: Tensor | None
    scores: Tensor | None = None
    """(B, K): share of the attention that each key got, the mean over heads."""

    def record_scores(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> None:
        """``query`` (B, heads, Q, d), ``key`` (B, kv heads, K, d) and the rest as the kernel gets them."""
        with torch.no_grad():
            index = self.at.view(-1, 1, 1, 1).expand(-1, query.shape[1], 1, query.shape[3])
            asking = query.gather(2, index).float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, kv, group, d)
            scores = asking @ key.float().transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)  # (B, kv, group, K)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            seen = torch.arange(key.shape[2], device=key.device) <= self.at[:, None]  # (B, K)
            if sliding_window is not None:
                seen &= self.columns.gather(1, self.at[:, None]) - self.columns < sliding_window
            seen = seen if self.valid is None else seen & self.valid
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
            self.scores = scores.softmax(-1).mean((1, 2))


_active: list[Ranking] = []


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    ranking = _active[-1]
    ranking.record_scores(query, key, **kwargs)
    config: Any = module.config
    config._attn_implementation = ranking.kernel  # flash attention looks at it
    try:
        return _kernel(module, ranking.kernel)(module, query, key, value, mask, **kwargs)
    finally:
        config._attn_implementation = NAME


def _kernel(module: nn.Module, name: str) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # each family keeps its own


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


@contextmanager
def ranking_in(layer: nn.Module, ranking: Ranking) -> Iterator[None]:
    """While it holds, the attention of ``layer`` tells ``ranking`` what it sees."""
    attention: Any = next(child for child in layer.children() if takes_attention_mask(child))
    config = attention.config
    _active.append(ranking)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = ranking.kernel
        _active.pop()

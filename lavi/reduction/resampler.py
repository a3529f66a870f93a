"""Perceiver resampler (Flamingo, arXiv 2204.14198): a few learned queries attend to the tokens of a view.

q (n, Dv) --+--> attention over [ V ; q ] -> + -> feed-forward -> + -> ...  n tokens, whatever N is
V (N, Dv) --+
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavi.config.types import Count
from lavi.errors import UserError
from lavi.nn.formulas import linear_flops
from lavi.reduction.base import Reducer
from lavi.vision.base import FeatureSpec, VisionBackbone


class PerceiverResampler(Reducer):
    """``tokens`` learned queries; keys and values are the visual tokens and the queries themselves.

    Args:
        tokens: n, of each view.
        depth: layers.
        heads: of each attention; they divide Dv.
    """

    def __init__(self, *, tokens: Count = 64, depth: Count = 2, heads: Count = 8) -> None:
        super().__init__()
        if min(tokens, depth, heads) < 1:
            raise UserError("a resampler has at least one token, one layer and one head.")
        self.tokens, self.depth, self.heads = tokens, depth, heads

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        if vision.width % self.heads:
            raise UserError(f"the resampler's {self.heads} heads do not divide the backbone's width, {vision.width}.")
        self.queries = nn.Parameter(0.02 * torch.randn(self.tokens, vision.width))
        self.layers = nn.ModuleList(_Layer(vision.width, self.heads) for _ in range(self.depth))
        self.norm = nn.LayerNorm(vision.width)
        return FeatureSpec(vision.width, self.tokens, None)

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()
        queries = self.queries.repeat(len(features), 1, 1)  # (views, n, Dv)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.norm(queries)

    def flops(self) -> float:
        width, n, keys = self.before.width, self.tokens, self.before.tokens + self.tokens
        attention = linear_flops(n, width, 2 * width) + linear_flops(keys, width, 2 * width) + 4.0 * n * keys * width
        return self.depth * (attention + linear_flops(n, width, 8 * width))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.visual_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (views, heads, tokens, Dv / heads)

        normed = self.query_norm(queries)
        key, value = self.key_value(torch.cat([self.visual_norm(features), normed], dim=1)).chunk(2, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(split(self.query(normed)), split(key), split(value))
        queries = queries + self.out(attended.transpose(1, 2).flatten(2))
        return queries + self.ffn(self.ffn_norm(queries))

"""VisionZip (arXiv 2412.04467): keep the tokens that the tower itself attends to, merge the rest by similarity.

    attention of the last layer that is run --> dominant: the most attended tokens, as they are
    keys of that layer ----------------------> contextual: the rest, merged around evenly spread ones by their mean

A tower with a class token ranks by what that token attends to, another one by what all tokens attend to on average.
Queries and keys are the tower's own, read as it computes them. Chosen here: the order of the grid is kept, and a merged
token is the plain mean of its group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lavi.config.types import CountOrZero
from lavi.errors import UserError
from lavi.reduction.base import Reducer, tokens_at
from lavi.vision.base import FeatureSpec, VisionBackbone
from lavi.vision.reduced import REFUSED

PLACED_IN_ATTENTION = ("dinov3", *REFUSED)
"""Towers of transformers whose attention turns queries and keys by their place, or adds a bias of it."""


class VisionZip(Reducer):
    """In each view, the ``dominant`` tokens as they are, and ``contextual`` means of the rest.

    Raises:
        UserError: more tokens than there are, or a tower whose queries and keys cannot be read.
    """

    reads_backbone = True

    def __init__(self, *, dominant: CountOrZero, contextual: CountOrZero = 0) -> None:
        super().__init__()
        self.dominant, self.contextual = dominant, contextual

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        count = self.dominant + self.contextual
        if not 1 <= count <= vision.tokens or min(self.dominant, self.contextual) < 0:
            raise UserError(
                f"VisionZip cannot keep {self.dominant} dominant and {self.contextual} contextual of {vision.tokens} "
                "tokens."
            )
        self.read: dict[str, Tensor] = {}
        self.heads = _heads(vision)
        self.extra = getattr(vision, "standing_before", 0)
        projections = _queries_and_keys(vision)
        self.key_width = projections["key"].out_features
        for part, module in projections.items():
            module.register_forward_hook(_Reader(self.read, part))
        return FeatureSpec(vision.width, count, self.before.grid if count == vision.tokens else None)

    def forward(self, features: Tensor) -> Tensor:
        views, tokens, _ = features.shape
        if not views or tokens == self.dominant:
            return features[:, : self.after.tokens]
        if len(self.read.get("key", ())) != views:
            raise RuntimeError(
                "VisionZip ranks features by the attention of the tower that gave them: run the tower first."
            )
        with torch.no_grad():
            rank, keys = self._rank(tokens)  # (views, N), (views, N, d)
            best = rank.topk(self.dominant, dim=-1).indices
            dominant = torch.zeros_like(rank, dtype=torch.bool).scatter(1, best, True)  # (views, N)
            order = (~dominant).long().argsort(dim=1, stable=True)  # dominant first, each part in the order of the grid
        first, rest = order.split([self.dominant, tokens - self.dominant], dim=1)
        return torch.cat(
            [tokens_at(features, first), self._merged(tokens_at(features, rest), tokens_at(keys, rest))], dim=1
        )

    def _rank(self, tokens: int) -> tuple[Tensor, Tensor]:
        """How much each token of the grid is attended to, and its key (the mean over heads)."""
        query, key = (
            self.read.pop(part).float().unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in ("query", "key")
        )  # (views, heads, prefix + N, d)
        before = key.shape[2] - tokens
        asking = query[:, :, :1] if before else query
        rank = torch.stack(
            [
                (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1).mean((0, 1))
                for q, k in zip(asking, key, strict=True)
            ]
        )  # view by view: all scores at once would be large
        return rank[:, before:], key[:, :, before:].mean(1)

    def _merged(self, rest: Tensor, keys: Tensor) -> Tensor:
        """(views, N - dominant, Dv) to (views, contextual, Dv): each joins the likest of a few spread evenly."""
        count = rest.shape[1]
        if not self.contextual:
            return rest[:, :0]
        indices = [(2 * i + 1) * count // (2 * self.contextual) for i in range(self.contextual)]
        keys = nn.functional.normalize(keys, dim=-1)
        nearest = (keys @ keys[:, indices].transpose(1, 2)).argmax(-1)  # (views, N - dominant)
        nearest[:, indices] = torch.arange(self.contextual, device=nearest.device)
        share = nn.functional.one_hot(nearest, self.contextual).to(rest)  # (views, N - dominant, contextual)
        return share.transpose(1, 2) @ rest / share.sum(1)[..., None]

    def flops(self) -> float:
        tokens, width = self.before.tokens, self.before.width
        rest = tokens - self.dominant
        if not rest:
            return 0.0
        scores = 2.0 * (1 if self.extra else tokens) * (tokens + self.extra) * self.key_width
        similar = 2.0 * rest * self.contextual * self.key_width / self.heads
        return scores + similar + 2.0 * rest * self.contextual * width


class _Reader:
    """Keeps the last output of a module; no closure, so that the model can be copied."""

    def __init__(self, into: dict[str, Tensor], part: str) -> None:
        self.into, self.part = into, part

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.into[self.part] = output.detach()


def _heads(vision: VisionBackbone) -> int:
    config = getattr(getattr(vision, "tower", None), "config", None)
    if (kind := getattr(config, "model_type", "")).startswith(PLACED_IN_ATTENTION):
        raise UserError(
            f"VisionZip reads queries and keys before a '{kind}' tower gives them their position: take another tower."
        )
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise UserError(
            f"VisionZip reads the attention of a transformers vision transformer, not {type(vision).__name__}."
        )
    return int(heads)


def _queries_and_keys(vision: VisionBackbone) -> dict[str, nn.Linear]:
    """The projections of the last layer that the tower runs."""
    projections: dict[str, nn.Linear] = {}
    for name, module in vision.named_modules():  # later layers overwrite earlier ones
        for part, names in (("query", ("q_proj", "query")), ("key", ("k_proj", "key"))):
            if name.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                projections[part] = module
    if len(projections) < 2:
        raise UserError(
            "VisionZip finds no query and key projections in this tower: take a ViT such as CLIP or SigLIP."
        )
    return projections

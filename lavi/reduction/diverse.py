"""Tokens unlike each other: DivPrune (arXiv 2503.02175), CDPruner (2506.10967), DART (2502.11494). No weights.

    DivPrune   greedy: always the token whose nearest chosen one is farthest, by cosine distance
    CDPruner   greedy: always the token that adds most volume (a determinantal point process, arXiv 1709.05135)
    DART       a few pivots, and the tokens least like them, by cosine

Chosen here: tokens are compared as the tower gives them, before any projector, so that all fusions are served; the
order of the grid is kept; CDPruner's relevance to the question is 1 for all tokens, as of a tower that reads no text,
so that it begins with the first. DART's paper works behind a layer of the language model: its pivots are the tokens
whose keys have the largest L1 norm there, some of the text's among them. Here they are visual tokens alone, and it is
the norm of the features.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lavi.config.types import Count
from lavi.errors import UserError
from lavi.nn.autocast import without_autocast
from lavi.reduction.base import Reducer, tokens_at
from lavi.reduction.controls import check_count
from lavi.vision.base import FeatureSpec, VisionBackbone


class _ChosenTokens(Reducer):
    """``keep`` tokens of each view, chosen by their features, in the order of the grid.

    Args:
        keep: of each view.
    """

    def __init__(self, *, keep: Count) -> None:
        super().__init__()
        self.keep = keep

    def make(self, vision: VisionBackbone) -> FeatureSpec:
        count = check_count(self.keep, vision)
        return FeatureSpec(vision.width, count, self.before.grid if count == vision.tokens else None)

    def forward(self, features: Tensor) -> Tensor:
        views, tokens, _ = features.shape
        if not views or self.keep >= tokens:
            return features[:, : self.keep]
        with torch.no_grad(), without_autocast(features):  # the same tokens in any precision
            chosen = self.choose_by_features(features.float()).sort(dim=1).values  # (views, n)
        return tokens_at(features, chosen)

    @abstractmethod
    def choose_by_features(self, features: Tensor) -> Tensor:
        """(views, N, Dv) to the indices of the kept tokens (views, n), in any order."""


class _UnlikeTokens(_ChosenTokens):
    """They are chosen by how similar they are to each other."""

    def choose_by_features(self, features: Tensor) -> Tensor:
        unit = nn.functional.normalize(features, dim=-1)  # (views, N, Dv)
        return self.choose(unit @ unit.transpose(1, 2))

    @abstractmethod
    def choose(self, similarity: Tensor) -> Tensor:
        """Cosines (views, N, N) to the indices of the kept tokens (views, n)."""

    def flops(self) -> float:
        """Of comparing all tokens; the search itself, some percent of that, is not counted."""
        tokens, width = self.before.tokens, self.before.width
        return 2.0 * tokens**2 * width if self.keep < tokens else 0.0


class DivPrune(_UnlikeTokens):
    """Each token is as far from those chosen before as any can be; the first is the one farthest from its nearest."""

    def choose(self, similarity: Tensor) -> Tensor:
        tokens = similarity.shape[1]
        own = torch.eye(tokens, dtype=torch.bool, device=similarity.device)
        distance = (1 - similarity).masked_fill(own, float("inf"))  # (views, N, N)
        chosen = [distance.amin(2).argmax(1)]  # (views,)
        nearest = torch.full_like(distance[:, 0], float("inf"))  # (views, N): to those chosen
        for _ in range(self.keep - 1):
            row = distance.gather(1, chosen[-1][:, None, None].expand(-1, 1, tokens))[:, 0]
            nearest = nearest.minimum(row).scatter(1, chosen[-1][:, None], -float("inf"))
            chosen.append(nearest.argmax(1))
        return torch.stack(chosen, dim=1)


class CDPruner(_UnlikeTokens):
    """Each token adds most to the volume that the chosen ones span.

    The greedy search for the likeliest set of a determinantal point process of that kernel, by one row of its Cholesky
    factor a step. Once nothing adds volume, all directions being taken, the first tokens that are left follow.
    """

    NOTHING = 1e-4
    """A token that adds less, of 1 that it would add alone, adds nothing but rounding errors."""

    def choose(self, similarity: Tensor) -> Tensor:
        views, tokens, _ = similarity.shape
        factor = similarity.new_zeros(views, self.keep, tokens)  # rows of the Cholesky factor
        volume = similarity.new_ones(views, tokens)  # what each token would add, squared
        taken = torch.zeros_like(volume, dtype=torch.bool)
        chosen = [volume.argmax(1)]
        for step in range(self.keep - 1):
            last = chosen[-1][:, None]  # (views, 1)
            row = similarity.gather(1, last[..., None].expand(-1, 1, tokens))[:, 0]  # (views, N)
            before = factor[:, :step]  # (views, step, N)
            of_last = before.gather(2, last[:, None].expand(-1, step, 1))  # (views, step, 1)
            added = volume.gather(1, last)  # (views, 1)
            row = (row - (of_last * before).sum(1)) / added.clamp(min=self.NOTHING).sqrt()
            factor[:, step] = row * (added >= self.NOTHING)
            volume = volume - factor[:, step].square()
            volume = volume.masked_fill(volume < self.NOTHING, 0.0)
            taken = taken.scatter(1, last, value=True)
            chosen.append(volume.masked_fill(taken, -1.0).argmax(1))
        return torch.stack(chosen, dim=1)


class DART(_ChosenTokens):
    """``pivots`` tokens of the largest L1 norm; then each takes its share of the rest, those least like itself.

    Pivots take one after the other, the strongest first, of what is left; of tokens that are equal, the first.

    Args:
        keep: of each view, pivots among them.
        pivots: how many (the authors' code: 4 of the image, beside 4 of the text).

    Raises:
        UserError: no pivot, or more than are kept.
    """

    def __init__(self, *, keep: Count, pivots: Count = 4) -> None:
        super().__init__(keep=keep)
        if not 1 <= pivots <= keep:
            raise UserError(f"DART keeps its pivots: take 1 to keep={keep} of them, not {pivots}.")
        self.pivots = pivots

    def choose_by_features(self, features: Tensor) -> Tensor:
        strength = features.abs().sum(-1)  # (views, N)
        pivots = strength.argsort(dim=1, descending=True, stable=True)[:, : self.pivots]
        unit = nn.functional.normalize(features, dim=-1)  # (views, N, Dv)
        similarity = tokens_at(unit, pivots) @ unit.transpose(1, 2)  # (views, pivots, N)
        chosen, taken = [pivots], torch.zeros_like(strength, dtype=torch.bool).scatter(1, pivots, value=True)
        share, rest = divmod(self.keep - self.pivots, self.pivots)
        for number in range(self.pivots):
            left = similarity[:, number].masked_fill(taken, float("inf"))
            least = left.argsort(dim=1, stable=True)[:, : share + (number < rest)]
            taken = taken.scatter(1, least, value=True)
            chosen.append(least)
        return torch.cat(chosen, dim=1)

    def flops(self) -> float:
        """Of comparing all tokens with the pivots."""
        tokens, width = self.before.tokens, self.before.width
        return 2.0 * self.pivots * tokens * width if self.keep < tokens else 0.0

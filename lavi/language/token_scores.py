"""How likely a language model finds the tokens that are trained: logits are computed for those alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavi.batch import IGNORE
from lavi.language import fused_cross_entropy
from lavi.nn.take_rows import take_rows

MOST_LOGITS = 2**26
"""Logits of a chunk: 256 MiB of float32, 441 tokens of a vocabulary of 152,000. Softmax and gradient are as large."""


class TokenScores(NamedTuple):
    """Of the n trained tokens of a batch, each after the true ones before it (teacher forcing)."""

    log_probability: Tensor
    """(n,) float32, natural logarithm."""
    is_likeliest: Tensor
    """(n,) bool: no other token is likelier."""
    positions: Tensor
    """(n, 2): row and column of each among the labels, row by row, ascending."""

    @property
    def loss(self) -> Tensor:
        """The cross-entropy, summed over the tokens."""
        return -self.log_probability.sum()

    @property
    def tokens(self) -> Tensor:
        """n, where the scores are."""
        return torch.tensor(len(self.positions), device=self.positions.device)


def score_tokens(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, chunk: int) -> TokenScores:
    """The scores of all tokens that have labels.

    Args:
        head: hidden states (n, D) to logits (n, vocabulary).
        hidden: (B, T, D).
        labels: (B, T), ``IGNORE`` where nothing is trained; a row's first token is never scored.
        chunk: logits of at most so many tokens stand in memory; where there are more of them, they are computed anew
            in the backward pass, by a kernel where ``head`` is a plain linear layer and one is installed.
    """
    positions = (labels[:, 1:] != IGNORE).nonzero() + torch.tensor([0, 1], device=labels.device)  # (n, 2)
    row, column = positions.unbind(1)
    before = take_rows(hidden.flatten(0, 1), row * hidden.shape[1] + column - 1)  # (n, D)
    truth = labels[row, column]  # (n,)
    return TokenScores(*score_parts(head, before, truth, chunk=chunk), positions)


def score_parts(
    head: Callable[[Tensor], Tensor], before: Tensor, truth: Tensor, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """``log_probability`` and ``is_likeliest`` of :class:`TokenScores`, chunk by chunk.

    Args:
        before: (n, D), the hidden states that the tokens are told from.
        truth: (n,), the tokens.
    """
    recompute = len(before) > chunk and torch.is_grad_enabled()
    if recompute and fused_cross_entropy.is_plain_linear(head) and fused_cross_entropy.runs_kernel(before):
        return fused_cross_entropy.fused_scores(head, before, truth)
    parts = [
        checkpoint(_score, head, *part, use_reentrant=False) if recompute else _score(head, *part)
        for part in zip(before.split(chunk), truth.split(chunk), strict=True)
    ]
    log_probability, is_likeliest = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_probability, is_likeliest


def _score(head: Callable[[Tensor], Tensor], before: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(before).float()  # (n, vocabulary)
    return -nn.functional.cross_entropy(logits, truth, reduction="none"), logits.argmax(-1) == truth


def scores_of(logits: Tensor, labels: Tensor) -> TokenScores:
    """The scores by logits (B, T, vocabulary) that are there already; ``labels`` (B, T)."""
    return score_tokens(lambda given: given, logits, labels, chunk=labels.numel())

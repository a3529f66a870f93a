"""Which answers a model gives by itself, without generating: under teacher forcing."""

from __future__ import annotations

import torch

from lavi.batch import Batch
from lavi.language.token_scores import TokenScores


def correct_under_teacher_forcing(scores: TokenScores, batch: Batch) -> list[bool]:
    """Whether each answer's tokens, its end token among them, are all the likeliest ones."""
    correct = torch.ones(batch.labels.shape, dtype=torch.bool, device=scores.likeliest.device)  # (B, T)
    correct[*scores.positions.unbind(1)] = scores.likeliest
    correct = correct.cpu()
    return [bool(correct[a.row, a.start : a.stop].all()) for a in batch.answers]


def answer_probabilities(scores: TokenScores, batch: Batch) -> list[float]:
    """The probability of each answer, its end token with it, as the model would say it after the true ones."""
    log_probability = torch.zeros(batch.labels.shape, device=scores.log_probability.device)  # (B, T)
    log_probability[*scores.positions.unbind(1)] = scores.log_probability
    log_probability = log_probability.cpu()
    return [float(log_probability[a.row, a.start : a.stop].sum().exp()) for a in batch.answers]

"""Which answers a model gives by itself, without generating: under teacher forcing."""

from __future__ import annotations

import torch
from torch import Tensor

from lavi.batch import Batch
from lavi.language.token_scores import TokenScores


def correct_under_teacher_forcing(scores: TokenScores, batch: Batch) -> list[bool]:
    """Whether each answer's tokens, its end token among them, are all the likeliest ones."""
    return [bool(tokens.all()) for tokens in _by_answer(scores.is_likeliest, scores, batch)]


def answer_probabilities(scores: TokenScores, batch: Batch) -> list[float]:
    """The probability of each answer, its end token with it, as the model would say it after the true ones."""
    return [float(tokens.sum().exp()) for tokens in _by_answer(scores.log_probability, scores, batch)]


def token_probabilities(scores: TokenScores, batch: Batch) -> list[float]:
    """The same by token, the geometric mean: of long answers, too, a number that can be compared."""
    return [float(tokens.mean().exp()) for tokens in _by_answer(scores.log_probability, scores, batch)]


def _by_answer(values: Tensor, scores: TokenScores, batch: Batch) -> list[Tensor]:
    """Of values (n,) of the trained tokens those of each answer, on the host."""
    if not batch.answers:
        return []
    width = batch.labels.shape[1] + 1
    row, column = scores.positions.cpu().unbind(1)  # row by row, so that an answer's tokens are a slice of all
    bounds = torch.tensor([[a.row * width + a.start, a.row * width + a.stop] for a in batch.answers], device="cpu")
    slices = torch.searchsorted(row * width + column, bounds).tolist()
    values = values.cpu()
    return [values[first:after] for first, after in slices]

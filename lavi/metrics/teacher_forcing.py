"""Which answers a model gives by itself, without generating: under teacher forcing."""

from __future__ import annotations

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
    row, column = scores.positions.cpu().unbind(1)
    values = values.cpu()
    return [values[(row == a.row) & (a.start <= column) & (column < a.stop)] for a in batch.answers]

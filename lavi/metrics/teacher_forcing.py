"""Which answers a model gives by itself, without generating: under teacher forcing."""

from __future__ import annotations

from torch import Tensor

from lavi.batch import IGNORE, Batch


def correct_under_teacher_forcing(logits: Tensor, batch: Batch) -> list[bool]:
    """Whether each answer's tokens, its end token among them, are all the likeliest ones; logits (B, T, vocabulary)."""
    labels = batch.labels[:, 1:]
    correct = ((logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE)).cpu()  # (B, T - 1)
    return [bool(correct[a.row, a.start - 1 : a.stop - 1].all()) for a in batch.answers]

"""Metrics of whole answers."""

from __future__ import annotations

from lavi.metrics.base import AnswerMetric


class ExactMatch(AnswerMetric):
    """1 for the true answer, whatever the case and the blanks around it; 0 for any other."""

    label = "right"
    wants_whole_answers = False

    def score(self, answer: str, truth: str) -> float:
        return float(answer.strip().lower() == truth.strip().lower())

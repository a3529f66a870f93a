"""Answers that are read in documents and charts: DocVQA, InfoVQA, ChartQA."""

from __future__ import annotations

from collections.abc import Sequence

from torchmetrics.functional.text import edit_distance

from lavi.metrics.base import AnswerMetric


class ANLS(AnswerMetric):
    """1 - the least normalised edit distance to a true answer, 0 below 0.5 (DocVQA, arXiv 2007.00398).

    Case and repeated blanks do not count. The distance is divided by the longer of the two as they were given, as the
    scripts in use do.
    """

    label = "ANLS"
    LEAST = 0.5

    def score(self, answer: str, references: Sequence[str]) -> float:
        similarity = 1 - min(_distance(answer, reference) for reference in references)
        return 0.0 if similarity < self.LEAST else similarity


def _distance(answer: str, reference: str) -> float:
    longer = max(len(answer.upper()), len(reference.upper()))
    said, true = (" ".join(text.strip().lower().split()) for text in (answer, reference))
    return float(edit_distance([said], [true], reduction="sum")) / longer if longer else 0.0


class RelaxedAccuracy(AnswerMetric):
    """1 for a number within 5 % of the true one, or for the same text whatever its case (ChartQA, arXiv 2203.10244).

    Nothing is within 5 % of 0 but 0 as it is written.
    """

    label = "right"
    TOLERANCE = 0.05

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(any(self._right(answer, reference) for reference in references))

    def _right(self, answer: str, reference: str) -> bool:
        said, true = _number(answer), _number(reference)
        if said is not None and true:
            return abs(said - true) / abs(true) <= self.TOLERANCE
        return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    """A number, or a percentage as a share; None if it is neither."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None

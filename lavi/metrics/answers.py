"""Answers that are right or wrong by their text alone."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace

from lavi.metrics.base import AnswerMetric, Prediction


class ExactMatch(AnswerMetric):
    """1 for one of the true answers, whatever the case and the blanks around it; 0 for any other.

    Args:
        punctuation: whether it counts; GQA's score leaves it out.
    """

    label = "right"
    wants_whole_answers = False

    def __init__(self, *, punctuation: bool = True) -> None:
        super().__init__()
        self.punctuation = punctuation

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(self._plain(answer) in map(self._plain, references))

    def _plain(self, text: str) -> str:
        text = text.strip().lower()
        return text if self.punctuation else text.translate(_NO_PUNCTUATION).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ContainsAnswer(AnswerMetric):
    """1 where a true answer stands somewhere in what was said (OCRBench, arXiv 2305.07895), whatever the case.

    Of 1000 questions, ten times the percent is OCRBench's own figure.

    Args:
        formulas: families whose blanks do not count and whose case does: handwritten formulas.
    """

    label = "right"

    def __init__(self, *, formulas: Sequence[str] = ()) -> None:
        super().__init__()
        self.formulas = tuple(formulas)

    def score(self, answer: str, references: Sequence[str]) -> float:
        said = _folded(answer)
        return float(any(_folded(reference) in said for reference in references))

    def scored(self, prediction: Prediction) -> Prediction:
        if prediction.family not in self.formulas:
            return super().scored(prediction)
        said = _without_blanks(prediction.answer)
        return replace(prediction, score=float(any(_without_blanks(one) in said for one in prediction.references)))


def _folded(text: str) -> str:
    """In lower case, on one line, East Asian full-width forms of ASCII as ASCII."""
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def _without_blanks(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")

"""Open answers that a language model judges: MSVD-QA, MSRVTT-QA, ActivityNet-QA (Video-ChatGPT, arXiv 2306.05424)."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lavi.metrics.base import AnswerMetric, Figures, Prediction

log = logging.getLogger("lavi")


class Verdict(NamedTuple):
    """What a judge says of an answer."""

    right: bool
    grade: float
    """From 0 to 5."""


class Judge(ABC):
    """Says whether an answer means the same as the true one. A recipe names it as the metric's ``judge``.

    An answer that is empty is wrong, and asked of no judge.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The model and its prompt: scores of different judges cannot be compared."""

    @abstractmethod
    def judge(self, question: str, truth: str, answer: str) -> Verdict:
        """The verdict on one answer; where the judge said nothing that is one: wrong, graded 0."""


# Chosen here, shorter than Video-ChatGPT's; its checksum is a part of the judge's name.
PROMPT = """Question: {question}
Correct answer: {truth}
Predicted answer: {answer}
Does the predicted answer mean the same as the correct one? Reply with yes or no, and with a score from 0 to 5 for how
well they match, in the form: yes, 4"""

_RIGHT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_GRADE = re.compile(r"(?<![\d.])(?:[0-4](?:\.\d+)?|5(?:\.0+)?)(?!\.?\d)")
_OUT_OF = re.compile(r"(?:/|\bout of)\s*5\b", re.IGNORECASE)


@cache
def _text_generation(source: str, device: int) -> Any:
    """A judge's model on a device: one for all tasks and all copies of a metric that name it."""
    from transformers import pipeline

    return pipeline("text-generation", model=source, device=device)


class LanguageModelJudge(Judge):
    """A language model on this machine.

    Args:
        source: a transformers checkpoint: a folder or a hub name.
    """

    def __init__(self, *, source: str) -> None:
        self.source = source

    @property
    def name(self) -> str:
        return f"{self.source}, prompt {hashlib.sha256(PROMPT.encode()).hexdigest()[:8]}"

    def judge(self, question: str, truth: str, answer: str) -> Verdict:
        said = self._say(PROMPT.format(question=question, truth=truth, answer=answer))
        right, grades = _RIGHT.search(said), _GRADE.findall(_OUT_OF.sub("", said))
        if right is None:
            log.warning(
                "the judge %s said %r, which is no verdict such as 'yes, 4': counted as wrong.", self.name, said
            )
            return Verdict(False, 0.0)
        if not grades:
            log.warning("the judge %s said %r, which has no score from 0 to 5: graded 0.", self.name, said)
        return Verdict(right[1].lower() == "yes", float(grades[-1]) if grades else 0.0)

    def _say(self, prompt: str) -> str:
        # Where this process works: of several each has a GPU of its own.
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        (said,) = _text_generation(self.source, device)(
            [{"role": "user", "content": prompt}], max_new_tokens=16, do_sample=False, return_full_text=False
        )
        return str(said["generated_text"])


class Judged(AnswerMetric):
    """Share of answers that a judge takes for right, and the mean of its grades (``grade``, from 0 to 5).

    Args:
        judge: its name is kept with the scores.
    """

    label = "judged right"

    def __init__(self, *, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    @property
    def name(self) -> str:
        return f"{super().name} by {self.judge.name}"

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(self.judge.judge("", references[0], answer).right)

    def scored(self, prediction: Prediction) -> Prediction:
        if not math.isnan(prediction.score):
            return prediction  # a verdict that was given is kept: another may cost as much as the answer
        if not prediction.answer.strip():
            return replace(prediction, score=0.0, grade=0.0)
        verdict = self.judge.judge(prediction.question, prediction.references[0], prediction.answer)
        return replace(prediction, score=float(verdict.right), grade=float(verdict.grade))

    def figures(self, predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> Figures:
        return {"grade": float(np.average([one.grade for one in predictions], weights=weights))}

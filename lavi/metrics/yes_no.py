"""Questions to be answered with yes or no: POPE and MME."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lavi.metrics.base import AnswerMetric, Figures, Prediction


class YesNo(AnswerMetric):
    """Share of right answers, and precision, recall and F1 of *yes* (POPE, arXiv 2305.10355).

    A question whose answer is yes and that got neither yes nor no was missed: it counts against the recall. lmms-eval
    leaves it out of the recall; its figures are ``recall, answered`` and ``f1, answered``.

    Every figure is given over all answers, for each family (POPE's random, popular and adversarial questions), and as
    the mean of the families: papers report either. An answer that is neither yes nor no is wrong, *yes.* and *yes, a
    dog* too, as lmms-eval compares them; the prompt asks for a single word. ``says neither`` is the share of those.
    """

    label = "right"

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(_said(answer) == _said(references[0]))

    def figures(self, predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> Figures:
        said = np.array([_said(one.answer) for one in predictions])
        true = np.array([_said(one.references[0]) for one in predictions])
        families = np.array([one.family for one in predictions])
        figures = _of_yes(said, true, weights)
        names = sorted(set(families.tolist()))
        if len(names) > 1:
            each = {name: _of_yes(said, true, weights * (families == name)) for name in names}
            figures |= {f"{figure}/{name}": of[figure] for name, of in each.items() for figure in of}
            figures |= {f"{figure}, mean": float(np.mean([of[figure] for of in each.values()])) for figure in figures
                        if "/" not in figure}  # fmt: skip
        return figures


def _of_yes(said: NDArray[np.str_], true: NDArray[np.str_], weights: NDArray[np.float64]) -> Figures:
    """In percent; 0 where there is nothing to divide by."""

    def count(which: NDArray[np.bool_]) -> float:
        return float(weights @ which)

    hits, says_yes = count((said == "yes") & (true == "yes")), count(said == "yes")
    precision, recall = _share(hits, says_yes), _share(hits, count(true == "yes"))
    answered = _share(hits, hits + count((said == "no") & (true == "yes")))
    return {
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _f1(precision, recall),
        "recall, answered": 100 * answered,
        "f1, answered": 100 * _f1(precision, answered),
        "says yes": 100 * _share(says_yes, float(weights.sum())),
        "says neither": 100 * _share(count((said != "yes") & (said != "no")), float(weights.sum())),
    }


def _f1(precision: float, recall: float) -> float:
    return _share(2 * (precision * recall), precision + recall)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _said(answer: str) -> str:
    return answer.lower().strip()


PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class MME(AnswerMetric):
    """Accuracy and accuracy+ by subtask (MME, arXiv 2306.13394): each image is asked two questions.

    A subtask's figure is the share of right answers plus the share of images with both right, in percent each: 200 at
    most. ``perception`` (2000 at most) and ``cognition`` (800) are sums over their subtasks, ``total`` of both. An
    image whose second answer is missing has not both right. Families name the subtasks.
    """

    label = "right"
    headline = "perception"

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(_begins(answer) == references[0].lower().strip().replace(".", ""))

    def figures(self, predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> Figures:
        images: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, one in enumerate(predictions):
            images[one.family][one.sample].append(index)
        subtasks = {name: _subtask(list(of.values()), predictions, weights) for name, of in sorted(images.items())}
        perception = sum(score for name, score in subtasks.items() if name not in COGNITION)
        cognition = sum(score for name, score in subtasks.items() if name in COGNITION)
        sums = {"perception": perception, "cognition": cognition, "total": perception + cognition}
        return {f"subtask/{name}": score for name, score in subtasks.items()} | sums


def _subtask(images: Sequence[list[int]], predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> float:
    total, count = 0.0, 0.0
    for answers in images:
        right = sum(predictions[index].score for index in answers)
        weight = weights[answers[0]]  # an image is drawn with all of its answers
        total += weight * (right / 2 * 100.0 + (right == 2) * 100.0)
        count += weight
    return _share(total, count)


def _begins(answer: str) -> str:
    """Yes or no among an answer's first four characters, as MME's script looks for it; else the answer."""
    plain = answer.lower().strip().replace(".", "")
    if len(plain) == 1:
        return {"y": "yes", "n": "no"}.get(plain, plain)
    return next((word for word in ("yes", "no") if word in plain[:4]), plain)

"""Questions with lettered options: ScienceQA, MMBench, SEED, MMMU, MVBench, Video-MME, EgoSchema, NExT-QA."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lavi.metrics.base import AnswerMetric, Figures, Prediction

_AND = r"\W*(?:,|/|&|\bor\b|\band\b)\W*"
_NAME = r"\b(?i:answer|option|choice)\b(?i:\s+is)?\s*:?\s*\(?"
_SEVERAL = (
    re.compile(rf"(?:^\W*[A-Za-z]|{_NAME}\b[A-Z]){_AND}[A-Za-z]\b\W*$"),  # A or B; The answer is A or B
    re.compile(r"^\W*[A-Z][).:\]]\s.*\bor\b\W*[A-Z][).:\]]\s", re.DOTALL),  # A. a cat or B. a dog
)
_MARKS = r"[\s()\[\]{}.:,;!?#\"'“”‘’«»。、：！？]*"
"""What may stand around a letter. Signs may not: ``B+`` may be an option's text."""
_ALONE = re.compile(rf"^(?:[-–•]\s+)?{_MARKS}(?:<([A-Za-z])>|([A-Za-z])){_MARKS}$")
_QUOTES, _STOPS = "\"'“”‘’«»", ".,;:!?。、：！？"
_ENCLOSED = re.compile(r"^(?:\((.*)\)|\[(.*)\])$")
_FIRST = re.compile(r"^\W*(?:([A-Za-z])[).:\]](?=\s|$)|([A-Z])\s*\n)")
_NO_NOUN = r"(?!\s+(?!(?:is|as|because|since|which|for|due|with)\b)[a-z])"
_NAMED = re.compile(rf"{_NAME}\b(?:([B-HJ-Z])\b(?!')|([AI])\b(?!'){_NO_NOUN})|\b(?i:answer)\s*:\s*([a-z])\W*$")
"""*A* and *I* are words, too: *The answer is A cat.* names none, *The answer is A.* does."""
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")
_EMPHASIS = str.maketrans("", "", "*`")
_NOT = re.compile(rf"{_NAME}\b[A-Z]\b\)?\s+(?:is|are|was)\s+(?:not|wrong|incorrect|false)\b")
"""An option that is refused, and not chosen."""


def option_letter(answer: str) -> str | None:
    """The letter that an answer chooses: ``B``, ``(B) a cat``, ``**B.** a cat``, ``Answer: B``, ``The answer is B``.

    None if it names none, or several: nothing is guessed, and the first word of *A cat.* is no letter.
    """
    answer = _NOT.sub("", answer.translate(_EMPHASIS))
    if any(form.search(answer) for form in _SEVERAL):
        return None
    if not _FIRST.search(answer) and len(set(_IN_BRACKETS.findall(answer))) > 1:
        return None
    for form in (_ALONE, _FIRST, _NAMED, _IN_BRACKETS):
        letters = {next(filter(None, found.groups())).upper() for found in form.finditer(answer)}
        if len(letters) == 1:
            return letters.pop()
    return None


class OptionLetter(AnswerMetric):
    """1 for the right option, by its text or its letter; every other answer counts as wrong.

    The first reference is the letter; those behind it, if there are any, are other ways to say it: the option's text.
    """

    label = "right"

    def score(self, answer: str, references: Sequence[str]) -> float:
        plain = _plain(answer)
        is_letter = _ALONE.search(answer.translate(_EMPHASIS)) is not None
        if plain and not is_letter:
            texts = [_plain(reference) for reference in references]
            inside = _ENCLOSED.search(plain)
            if plain in texts or (inside and next(filter(None, inside.groups()), "") in texts):
                return 1.0
        return float(option_letter(answer) == references[0].strip().upper())


class CircularChoice(OptionLetter):
    """Questions that are asked several times, their options turned round (MMBench's CircularEval).

    ``circular``: the share of questions, told apart by their sample, whose every copy is answered rightly. ``single
    pass``: the score of the copies of level ``first`` alone.
    """

    headline = "circular"

    def figures(self, predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> Figures:
        copies: dict[str, list[int]] = defaultdict(list)
        for index, one in enumerate(predictions):
            copies[one.sample].append(index)
        right = np.array([all(predictions[index].score == 1 for index in of) for of in copies.values()])
        of_question = np.array([weights[of[0]] for of in copies.values()])
        scores, first = np.array([p.score for p in predictions]), np.array([p.level == "first" for p in predictions])
        return {
            "circular": 100 * float(np.average(right, weights=of_question)),
            "single pass": 100 * float((weights * first) @ scores / max(1e-12, float(weights @ first))),
        }


def _plain(text: str) -> str:
    """Without what stands around a text; signs are part of it: -5 is not 5, nor B+ the letter B."""
    text, before = text.translate(_EMPHASIS).lower(), ""
    while text != before:
        before, text = text, text.strip(string.whitespace + _QUOTES).rstrip(_STOPS)
    return text

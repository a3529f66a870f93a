"""Questions with lettered options: ScienceQA, MMBench, SEED, MMMU, MVBench, Video-MME, EgoSchema, NExT-QA."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from lavi.metrics.base import AnswerMetric

_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_FIRST = re.compile(r"^\W*([A-Z])[).:,\]]")
_NAMED = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*\(?\b([A-Z])\b(?!')")
_IN_BRACKETS = re.compile(r"\(([A-Z])\)")


def option_letter(answer: str) -> str | None:
    """The letter that an answer chooses: ``B``, ``(B) a cat``, ``B. a cat``, ``The answer is B``.

    None if it names none, or several: nothing is guessed, and the first word of *A cat.* is no letter.
    """
    bracketed = set(_IN_BRACKETS.findall(answer))
    for form in (_ALONE, _FIRST, _NAMED, _IN_BRACKETS):
        letters = set(form.findall(answer)) if len(bracketed) < 2 else set()
        if len(letters) == 1:
            return str(letters.pop()).upper()
    return None


class OptionLetter(AnswerMetric):
    """1 for the right option, by its letter or, without one, by its text; every other answer counts as wrong.

    The first reference is the letter; those behind it, if there are any, are other ways to say it: the option's text.
    """

    label = "right"

    def score(self, answer: str, references: Sequence[str]) -> float:
        letter = option_letter(answer)
        if letter is not None:
            return float(letter == references[0].strip().upper())
        return float(_plain(answer) in map(_plain, references))


def _plain(text: str) -> str:
    return text.lower().strip(string.punctuation + string.whitespace)

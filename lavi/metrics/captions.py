"""Captions: CIDEr-D, how much an answer says what people say of this image and of few others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log, sqrt

from lavi.metrics.base import AnswerMetric, Prediction

LENGTHS = (1, 2, 3, 4)
"""Words of an n-gram."""
SIGMA = 6.0
"""Words by which a caption may be longer or shorter, as the deviation of a Gaussian penalty."""
HIGHEST = 10.0

Grams = dict[tuple[str, ...], float]


class CIDEr(AnswerMetric):
    """CIDEr-D (arXiv 1411.5726) in percent: 100 is a score of 1, as papers report it.

    How rare a phrase is counts over the captions of all images, so that a score is of the whole set alone. Words are
    runs of letters and digits in lower case, in place of the Penn Treebank's tokenizer, which needs Java: figures may
    differ from published ones by some tenths.
    """

    label = "CIDEr"
    highest = HIGHEST

    def score(self, answer: str, references: Sequence[str]) -> float:
        return 0.0  # until all answers are there

    def predictions(self) -> list[Prediction]:
        """All answers so far, each with its score among them."""
        predictions = super().predictions()
        scores = cider([words(p.answer) for p in predictions], [[*map(words, p.references)] for p in predictions])
        return [replace(one, score=score) for one, score in zip(predictions, scores, strict=True)]


_WORD = re.compile(r"\w+(?:'\w+)?")


def words(caption: str) -> list[str]:
    """Of a caption, in lower case, without punctuation."""
    return _WORD.findall(caption.lower())


def cider(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """The score of each answer, from 0 to 10.

    Args:
        answers: the words of each.
        references: the words of each image's captions.
    """
    counted = [[_grams(caption) for caption in captions] for captions in references]
    images_with = Counter(gram for captions in counted for gram in set().union(*captions))
    everything = log(max(1, len(references)))

    def weigh(grams: Counter[tuple[str, ...]]) -> list[Grams]:
        """By length of the n-grams: how often each stands there, times how rare it is."""
        weighed: list[Grams] = [{} for _ in LENGTHS]
        for gram, times in grams.items():
            weighed[len(gram) - 1][gram] = times * (everything - log(max(1.0, images_with[gram])))
        return weighed

    scores = []
    for answer, captions in zip(answers, counted, strict=True):
        said = weigh(_grams(answer))
        alike = [_similarity(said, weigh(caption), _pairs(answer), _gram_pairs(caption)) for caption in captions]
        scores.append(HIGHEST * sum(alike) / max(1, len(alike)))
    return scores


def _grams(caption: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(caption[start : start + length]) for length in LENGTHS for start in range(len(caption) - length + 1)
    )


def _pairs(caption: Sequence[str]) -> int:
    """A caption's length as the official script takes it: its pairs of words."""
    return max(0, len(caption) - 1)


def _gram_pairs(grams: Counter[tuple[str, ...]]) -> int:
    return sum(times for gram, times in grams.items() if len(gram) == 2)


def _similarity(said: list[Grams], true: list[Grams], length: int, true_length: int) -> float:
    """The mean over lengths of n-grams of the cosine, what is said too often clipped, times the penalty of length."""
    total = 0.0
    for ours, theirs in zip(said, true, strict=True):
        product = sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in ours.items())
        norms = _norm(ours) * _norm(theirs)
        total += product / norms if norms else product
    return total / len(LENGTHS) * exp(-((length - true_length) ** 2) / (2 * SIGMA**2))


def _norm(grams: Grams) -> float:
    return sqrt(sum(value**2 for value in grams.values()))

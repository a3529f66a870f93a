"""VQA accuracy: how many of the people who were asked gave the same answer (VQAv2, arXiv 1612.00837)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from lavi.metrics.base import AnswerMetric


class VQAAccuracy(AnswerMetric):
    """The mean, over all sets of nine of ten people's answers, of min(1, matches / 3).

    So 1, 2, 3 and 4 of ten who agree give 0.3, 0.6, 0.9 and 1. Both sides are normalised as the evaluation server does
    it: punctuation, articles, numbers in words, and apostrophes that were left out. With a single reference an answer
    that is the same scores 1.

    Args:
        lower_first: normalise as TextVQA's and VizWiz's scripts do, which also part ``'s`` from its word.
    """

    label = "VQA accuracy"

    def __init__(self, *, lower_first: bool = False) -> None:
        super().__init__()
        self.normalised = normalised_words if lower_first else normalised

    def score(self, answer: str, references: Sequence[str]) -> float:
        said, given = self.normalised(answer), [self.normalised(reference) for reference in references]
        if len(given) == 1:
            return float(said == given[0])
        matches = given.count(said)
        return mean(min(1.0, float(matches - (one == said)) / 3) for one in given)


def normalised(text: str) -> str:
    """An answer as VQAv2's evaluation server compares it."""
    return _words(_without_punctuation(_one_line(text)))


def normalised_words(text: str) -> str:
    """The same as TextVQA's script does it."""
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_punctuation(_one_line(lower)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LONE_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d)(\,)+(?=\d)")
_PERIODS = 32
"""The official script removes no more of them: it hands a flag where a count belongs."""


def _without_punctuation(text: str) -> str:
    """Without a mark that stands at a blank, or, in a text with 1,000, without any; with a blank for other marks."""
    plain, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        gone = number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if gone else " ")
    return _LONE_PERIOD.sub("", plain, _PERIODS)


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")

_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't should've shouldn't shouldn't've she'd've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTED = tuple(_WORDS.split())
"""The words that get an apostrophe of theirs back where it was left out."""
_IRREGULAR = {"somebody'd": "somebodyd"}
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | _IRREGULAR


def _words(text: str) -> str:
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

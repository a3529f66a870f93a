"""How sure a score is: intervals by bootstrap over images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

DRAWS = 2000
"""How often the samples are drawn anew."""
SEED = 0
BLOCK = 2**24
"""Numbers of draws that are held at a time."""


class ScoredAnswer(NamedTuple):
    """The score of one answer, from 0 to 1, and the number of the sample that it is of."""

    sample: int
    family: str
    level: str
    score: float


def intervals(answers: Iterable[ScoredAnswer], *, draws: int = DRAWS) -> dict[str, list[float]]:
    """95 % intervals [low, high], in percent, of the mean score of each group: ``all``, ``level/easy`` and so on.

    Samples are drawn with replacement, with all of their answers: those about one image are not independent. The
    interval is from the 2.5th to the 97.5th percentile of the means. The same answers give the same intervals.
    """
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for group in ("all", f"level/{answer.level}", f"family/{answer.family}"):
            groups[group][answer.sample].append(answer.score)
    return {group: _interval(list(scores.values()), draws) for group, scores in sorted(groups.items())}


def _interval(samples: list[list[float]], draws: int) -> list[float]:
    sums = np.array([sum(scores) for scores in samples])
    counts = np.array([len(scores) for scores in samples])
    rng = np.random.default_rng(SEED)
    means: list[np.ndarray] = []
    while (left := draws - sum(map(len, means))) > 0:
        block = min(left, max(1, BLOCK // len(samples)))
        drawn = rng.integers(len(samples), size=(block, len(samples)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = 100 * np.percentile(np.concatenate(means), [2.5, 97.5])
    return [float(low), float(high)]

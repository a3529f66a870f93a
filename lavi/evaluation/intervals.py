"""How sure a score is, and the difference of two: by bootstrap over images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lavi.errors import UserError
from lavi.metrics.base import AnswerMetric, Prediction, group_names

DRAWS = 2000
"""How often the samples are drawn anew."""
FIGURE_DRAWS = 500
"""The same for figures that are no means, which take longer."""
SEED = 0
BLOCK = 2**24
"""Numbers of draws that are held at a time."""

Interval = list[float]
"""[low, high], 95 %."""


def intervals(predictions: Sequence[Prediction], *, draws: int = DRAWS) -> dict[str, Interval]:
    """Intervals in percent of the mean score of each group: ``all``, ``level/easy`` and so on.

    Samples are drawn with replacement, with all of their answers: those about one image are not independent. The
    interval is from the 2.5th to the 97.5th percentile of the means. The same answers give the same intervals.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for one in predictions:
        for group in group_names(one.family, one.level):
            groups.setdefault(group, {}).setdefault(one.sample, []).append(one.score)
    return {group: _of_means(list(scores.values()), draws) for group, scores in sorted(groups.items())}


def figure_intervals(
    metric: AnswerMetric, predictions: Sequence[Prediction], *, draws: int = FIGURE_DRAWS
) -> dict[str, Interval]:
    """The same of what a metric says of all answers besides the means: F1, MME's sums."""
    if not predictions or not metric.figures(predictions, np.ones(len(predictions))):
        return {}
    _, sample = np.unique([one.sample for one in predictions], return_inverse=True)  # (answers,)
    rng = np.random.default_rng(SEED)
    drawn = [
        metric.figures(predictions, np.bincount(rng.integers(count, size=count), minlength=count)[sample].astype(float))
        for count in [int(sample.max()) + 1] * draws
    ]
    return {name: _ends(np.array([figures[name] for figures in drawn])) for name in drawn[0]}


@dataclass(frozen=True)
class Difference:
    """How much better one run is than another on the same questions, in percentage points."""

    mean: float
    interval: Interval
    p: float
    """The share of random swaps of the two runs, image by image, that differ as much: two-sided, as a permutation
    test."""


def paired_difference(ours: Sequence[Prediction], theirs: Sequence[Prediction], *, draws: int = DRAWS) -> Difference:
    """The difference of two runs' mean scores, tested on the questions that both answered.

    Raises:
        UserError: they did not answer the same questions.
    """
    if [(one.sample, one.question, one.family) for one in ours] != [
        (one.sample, one.question, one.family) for one in theirs
    ]:
        raise UserError("two runs are compared on the same questions, in the same order: these answered others.")
    samples, sample = np.unique([one.sample for one in ours], return_inverse=True)
    gains = np.array([a.score - b.score for a, b in zip(ours, theirs, strict=True)])
    sums = np.bincount(sample, gains).astype(np.float64)
    counts: NDArray[np.int64] = np.bincount(sample)
    mean = 100 * float(gains.mean())
    rng = np.random.default_rng(SEED)
    means = 100 * np.concatenate(list(_drawn_means(sums, counts, rng, draws)))
    most = max(1, BLOCK // len(samples))
    blocks = [rng.integers(0, 2, size=(min(most, draws - at), len(samples))) for at in range(0, draws, most)]
    swapped = 100 * np.concatenate([(2 * block - 1) @ sums for block in blocks]) / counts.sum()
    p = (1 + int((np.abs(swapped) >= abs(mean) - 1e-9).sum())) / (1 + draws)
    return Difference(mean, _ends(means), p)


def _of_means(samples: list[list[float]], draws: int) -> Interval:
    sums = np.array([sum(scores) for scores in samples])
    counts = np.array([len(scores) for scores in samples])
    return _ends(100 * np.concatenate(list(_drawn_means(sums, counts, np.random.default_rng(SEED), draws))))


def _drawn_means(
    sums: NDArray[np.float64], counts: NDArray[np.int64], rng: np.random.Generator, draws: int
) -> Iterator[NDArray[np.float64]]:
    """Means over samples drawn with replacement, in blocks that fit into memory."""
    most = max(1, BLOCK // len(sums))
    for start in range(0, draws, most):
        drawn = rng.integers(len(sums), size=(min(most, draws - start), len(sums)))
        yield sums[drawn].sum(1) / counts[drawn].sum(1)


def _ends(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]

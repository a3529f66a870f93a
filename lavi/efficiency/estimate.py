"""Medians, and how far they can be trusted: an interval that holds however the values are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from statistics import median

CONFIDENCE = 0.95
NOISE = 0.25
"""How far, as a share of the median, its interval may reach."""
FEWEST = 6
"""Values, below which no two of them hold the median with :data:`CONFIDENCE`."""
LARGEST_WAIT = NOISE / (1 + NOISE)
"""Share of the time without a core, by which times grow by :data:`NOISE`."""

NOTE = (
    "Runs are taken in turns. ms: median (p10-p90). Times the floor, times concatenation: median of the turns' "
    f"ratios ({CONFIDENCE:.0%} interval). Noisy: the median's interval reaches more than {NOISE:.0%} of it to one "
    f"side, or there were fewer than {FEWEST} turns; of ms also: other processes had the cores for more than "
    f"{LARGEST_WAIT:.0%} of the time."
)
"""What stands below tables of times."""


@dataclass(frozen=True)
class Estimate:
    """The median of ``count`` values, and the ends of its interval."""

    median: float
    low: float
    high: float
    count: int

    @property
    def noisy(self) -> bool:
        """Whether the figure says nothing: its interval reaches more than :data:`NOISE` of the median to one side.

        So it is with fewer than :data:`FEWEST` values, too: their interval would have no ends. A time is noisy as well
        if the process had no core for more than :data:`LARGEST_WAIT` of it (:meth:`Record.time_is_noisy`): such times
        are all too long and need not differ. Ratios of neighbouring runs do not change with that.
        """
        reach = max(self.high - self.median, self.median - self.low)
        return self.count < FEWEST or reach > NOISE * self.median


def estimate(values: Sequence[float]) -> Estimate:
    """The median, and the interval between the two values that stand equally far from both ends.

    These are the innermost two that hold the median of what the values are drawn from with :data:`CONFIDENCE`,
    whatever its distribution: how many of n values lie below the median is binomial (n, 1/2). Fewer than
    :data:`FEWEST` give the smallest and the largest, which hold it less often.
    """
    ordered = sorted(values)
    skipped = values_outside(len(ordered))
    return Estimate(median(ordered), ordered[skipped], ordered[-1 - skipped], len(ordered))


def values_outside(count: int) -> int:
    """How many of so many values lie outside the interval of their median at each end."""
    skipped, tail = 0, 0  # in whole numbers: a float holds neither the terms nor their share of many
    while 2 * (tail := tail + comb(count, skipped)) <= 2**count * (1 - Fraction(CONFIDENCE)):
        skipped += 1
    return max(0, skipped - 1)


def ratio(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The median of the ratios of the values of the same turns."""
    return estimate([value / other for value, other in zip(values, others, strict=True)])

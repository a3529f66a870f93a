"""What an argument of a component may be.

A component says it in the type of the argument, and a recipe is checked against that before anything is built::

    def __init__(self, *, every: Count = 4, config: Annotated[dict[str, Any], Check(known_keys)] | None = None)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` (or above it) to ``most``, and one ``besides`` that means something else."""

    least: float
    most: float = math.inf
    above: bool = False
    """``least`` itself is too small."""
    besides: float | None = None

    def __contains__(self, value: float) -> bool:
        inside = self.least < value <= self.most if self.above else self.least <= value <= self.most
        return (inside and math.isfinite(value)) or value == self.besides

    def __str__(self) -> str:
        if self.above:
            return f"above {self.least:.12g}" + (f" and at most {self.most:.12g}" if self.most < math.inf else "")
        text = f"from {self.least:.12g}" + (f" to {self.most:.12g}" if self.most < math.inf else "")
        return text if self.besides is None else f"{text}, or {self.besides:.12g}"


@dataclass(frozen=True)
class Check:
    """Whatever a function does not refuse by a :class:`UserError`."""

    function: Callable[[Any], object]


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
PositiveOrZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, above=True)]
ShareOrZero = Annotated[float, Range(0, 1)]

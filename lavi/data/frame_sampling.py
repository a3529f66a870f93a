"""Which frames of a video are kept."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lavi.errors import UserError

TICK = 1e-3
"""Times closer than this are one: Matroska rounds to milliseconds."""

How = Literal["uniform", "fps", "keyframes"]


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are kept.

    A moment's frame is the one on screen then; a frame that stays for several moments is kept once.

    Args:
        how: ``uniform``: those on screen in the middle of ``frames`` equal parts of the time, or all where there are
            no more. ``fps``: one every 1 / ``fps`` seconds from the start; where that would be more than ``frames``,
            as ``uniform``. ``keyframes``: the stored key frames; of more than ``frames``, those evenly spread.
        frames: the most frames kept, F.
        fps: frames a second.

    Raises:
        UserError: there is no such way, or a number is not positive.
    """

    how: How = "uniform"
    frames: int = 8
    fps: float = 1.0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise UserError(f"frames are sampled {', '.join(get_args(How))}, not how={self.how!r}.")
        if not isinstance(self.frames, int) or isinstance(self.frames, bool) or self.frames < 1:
            raise UserError(f"frame sampling keeps a whole number of frames, 1 or more, not frames={self.frames!r}.")
        if not isinstance(self.fps, int | float) or not 0 < self.fps < math.inf:
            raise UserError(f"frame sampling takes a positive number of frames a second, not fps={self.fps!r}.")

    def moments(self, start: float, stop: float) -> list[float]:
        """The seconds in [``start``, ``stop``) whose frames are kept."""
        length = stop - start
        if self._at_rate(length):
            return [start + i / self.fps for i in range(max(1, math.ceil(length * self.fps - TICK)))]
        return [start + (i + 0.5) * length / self.frames for i in range(self.frames)]

    def pick(self, seconds: Sequence[float], start: float, stop: float, *, keys: Sequence[bool] = ()) -> list[int]:
        """Which frames are kept: their numbers, ascending.

        Args:
            seconds: when each is shown (F,), ascending.
            start, stop: the time they are picked from.
            keys: whether each is a key frame (F,); empty: all are.
        """
        first = _on_screen(seconds, start)
        shown = range(first, max(first + 1, bisect_left(seconds, stop - TICK)))
        if self.how == "keyframes":
            stored = [i for i in shown if not keys or keys[i]]
            return stored if len(stored) <= self.frames else _spread(stored, self.frames)
        if len(shown) <= self.frames and not self._at_rate(stop - start):
            return list(shown)
        return sorted({_on_screen(seconds, moment) for moment in self.moments(start, stop)})

    def _at_rate(self, length: float) -> bool:
        return self.how == "fps" and length * self.fps - TICK <= self.frames


def _on_screen(seconds: Sequence[float], moment: float) -> int:
    """The number of the frame shown at ``moment``; before the first, the first."""
    return max(0, bisect_right(seconds, moment + TICK) - 1)


def _spread(items: list[int], count: int) -> list[int]:
    """Those in the middle of ``count`` equal parts."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]

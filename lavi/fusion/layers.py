"""Which decoder layers a method works in."""

from __future__ import annotations

from collections.abc import Sequence

from lavi.errors import UserError


def spread_layers(count: int, chosen: int, where: str) -> list[int]:
    """``chosen`` of ``count`` layers: the first, the last, or one at the end of each of equal groups."""
    if where == "first":
        return list(range(chosen))
    if where == "last":
        return list(range(count - chosen, count))
    return [round((i + 1) * count / chosen) - 1 for i in range(chosen)]


def chosen_layers(
    count: int, *, every: int, layers: Sequence[int] | None, fraction: float | None, where: str, method: str
) -> list[int]:
    """The layers that a ``method`` works in, ascending: those named, else a share of ``count``, else one of ``every``.

    Raises:
        UserError: none, or one that the language model has not; a share or a group that is none.
    """
    if every < 1 or not (fraction is None or 0 < fraction <= 1):
        raise UserError(
            f"{method} takes every from 1 and a fraction above 0 and at most 1, not {every} and {fraction}."
        )
    if layers is not None:
        chosen = list(layers)
    elif fraction is not None:
        chosen = spread_layers(count, max(1, round(fraction * count)), where)
    else:
        chosen = list(range(every - 1, count, every))
    if not chosen or not all(0 <= layer < count for layer in chosen):
        raise UserError(
            f"{method} cannot work in layers {chosen} (every={every}): the language model has 0 to {count - 1}."
        )
    return sorted(set(chosen))

"""Features of several tower layers, which stand side by side in Dv (``model.vision.layer=[8, 16, 24]``), apart again.

A level is what one of them gave, also behind :class:`~lavi.reduction.pixel_shuffle.PixelShuffle`. Whatever else stands
side by side in equal parts is split alike: the tokens of a square that it made of one layer are levels, too.
"""

from __future__ import annotations

from torch import Tensor

from lavi.errors import UserError


def width_of_level(width: int, levels: int, *, method: str) -> int:
    """The width of each of ``levels`` levels that together are ``width`` wide.

    Raises:
        UserError: there is none, or they do not divide the width.
    """
    if levels < 1 or width % levels:
        raise UserError(
            f"{method} cannot split visual tokens of width {width} into {levels} levels: levels is how many layers "
            "model.vision.layer names, such as 3 of layer=[8, 16, 24]."
        )
    return width // levels


def split_levels(features: Tensor, levels: int) -> tuple[Tensor, ...]:
    """(views, N, Dv) to the levels in their order, (views, N, Dv / levels) each."""
    # Laid out as if each were alone, so that it is multiplied as if it were.
    return tuple(level.contiguous() for level in features.chunk(levels, dim=-1))

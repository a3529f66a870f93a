"""Which part of its image each view shows."""

from __future__ import annotations

from lavi.batch import Layout

Window = tuple[float, float, float, float]
"""Top, left, height and width, in heights and widths of the image."""

WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


def windows_of_views(layout: Layout, grid: tuple[int, int]) -> list[Window]:
    """What each view of an image shows.

    A view that is all of its image, or a frame, shows 0, 0, 1, 1. Tiles in whose middle the image stands
    (:class:`lavi.data.tiling.AnyRes`) may begin above it and end below it.

    Args:
        grid: rows and columns of the tokens of one view; their cells are square.
    """
    if layout.tiles is None or layout.video:
        return layout.views * [WHOLE]
    rows, columns = layout.tiles
    height, width = _tile_extent(layout, grid)
    top, left = (1 - height * rows) / 2, (1 - width * columns) / 2
    tiles = [(top + r * height, left + c * width, height, width) for r in range(rows) for c in range(columns)]
    return [WHOLE, *tiles]


def _tile_extent(layout: Layout, grid: tuple[int, int]) -> tuple[float, float]:
    """Height and width of a tile, in heights and widths of the image, which fills its tiles one way or both."""
    assert layout.tiles is not None
    rows, columns = layout.tiles[0] * grid[0], layout.tiles[1] * grid[1]
    height, width = (rows, columns) if layout.fills_tiles else layout.size
    scale = min(rows / height, columns / width)
    return grid[0] / (scale * height), grid[1] / (scale * width)

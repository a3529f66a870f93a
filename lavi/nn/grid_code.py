"""Where in its image a visual token lies, as sines and cosines of its row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lavi.nn.take_rows import take_rows
from lavi.nn.waves import waves


class GridCode(nn.Module):
    """Sines and cosines of a token's row and column in its image, each channel with a learned amplitude.

    Chosen here. It is added to normalised features, whose deviation is 1, so that it weighs the same beside those of
    any tower. Rows and columns are counted in heights and widths of the whole image: a tile's tokens have the code of
    what they show, whatever the grid. Tokens that stand before the grid (a class token) or behind it (padding) get 0.

    Args:
        width: Dv. Half of the channels tell rows, half columns.
        amplitude: that all channels start with.
    """

    CYCLES = (0.5, 16.0)
    """The slowest and the fastest wave, in cycles over the image."""

    def __init__(self, width: int, *, amplitude: float = 0.7) -> None:
        super().__init__()
        self.amplitude = nn.Parameter(torch.full((width,), amplitude))

    def forward(self, windows: Tensor, grids: Sequence[tuple[int, int]], tokens: int, *, prefix: int = 0) -> Tensor:
        """The code (views, N, Dv) of ``tokens`` tokens a view, of which ``prefix`` stand before the grid.

        Args:
            windows: (views, 4), top, left, height and width of each view, in heights and widths of its image.
            grids: rows and columns of each view.
        """
        views, width = len(windows), len(self.amplitude)
        if not views:  # an empty product, so that the amplitudes stay in the graph
            return self.amplitude * windows.new_zeros(0, tokens, width)
        sizes = torch.tensor(grids, device="cpu").to(windows.device)  # (views, 2)
        rows, columns = (max(grid[side] for grid in grids) for side in (0, 1))
        # All tokens of a row share its half of the code: waves of each token would take as long as a layer.
        half = 2 * self._frequencies
        of_row = self._waves(windows[:, 0::2], sizes[:, 0], rows) * self.amplitude[:half]  # (views, rows, Dv / 2)
        of_column = self._waves(windows[:, 1::2], sizes[:, 1], columns)[..., : width - half] * self.amplitude[half:]
        index = torch.arange(tokens, device=windows.device) - prefix  # (N,)
        row, column = index // sizes[:, 1:], index % sizes[:, 1:]  # (views, N)
        view = torch.arange(views, device=windows.device)[:, None]
        halves = (
            take_rows(of_row.flatten(0, 1), view * rows + row.clamp(0, rows - 1)),
            take_rows(of_column.flatten(0, 1), view * columns + column),
        )
        code = torch.cat(halves, dim=-1)  # (views, N, Dv)
        inside = (index >= 0) & (index < sizes.prod(-1, keepdim=True))  # (views, N)
        return code * inside[..., None]

    @property
    def _frequencies(self) -> int:
        """Waves of each of rows and columns; each has a sine and a cosine."""
        return -(-len(self.amplitude) // 4)

    def _waves(self, window: Tensor, cells: Tensor, most: int) -> Tensor:
        """Sines and cosines (views, most, Dv / 2) of the middles of a view's rows, or columns.

        Args:
            window: (views, 2), where the view begins and how long it is.
            cells: (views,), how many rows it has.
        """
        middles = torch.arange(most, device=window.device) + 0.5
        position = window[:, :1] + window[:, 1:] * middles / cells[:, None]  # (views, most)
        return waves(position, self.CYCLES, self._frequencies)


def grid_of_tokens(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid on which ``tokens`` tokens lie: ``grid`` if they are its tokens, or one more for a class token.

    Of another number (matryoshka pooling draws one each step): the rectangle of them nearest to a square.
    """
    if tokens - grid[0] * grid[1] in (0, 1):
        return grid
    return squarest_grid(tokens)


def squarest_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of the rectangle of ``tokens`` cells that is nearest to a square."""
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows

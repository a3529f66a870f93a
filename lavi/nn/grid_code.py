"""Where in its image a visual token lies, as sines and cosines of its row and column."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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

    def forward(self, windows: Tensor, grids: Tensor, tokens: int, *, prefix: int = 0) -> Tensor:
        """The code (views, N, Dv) of ``tokens`` tokens a view, of which ``prefix`` stand before the grid.

        Args:
            windows: (views, 4), top, left, height and width of each view, in heights and widths of its image.
            grids: (views, 2), rows and columns of each view.
        """
        index = torch.arange(tokens, device=windows.device) - prefix  # (N,)
        rows, columns = grids[:, :1], grids[:, 1:]  # (views, 1)
        cell = torch.stack([index // columns, index % columns], dim=-1)  # (views, N, 2)
        position = windows[:, None, :2] + windows[:, None, 2:] * (cell + 0.5) / grids[:, None]  # (views, N, 2)
        inside = (index >= 0) & (index < rows * columns)  # (views, N)
        return self.amplitude * self._waves(position) * inside[..., None]

    def _waves(self, position: Tensor) -> Tensor:
        """(views, N, 2) to (views, N, Dv)."""
        width = len(self.amplitude)
        count = -(-width // 4)
        slowest, fastest = (math.log(2 * math.pi * cycles) for cycles in self.CYCLES)
        frequencies = torch.linspace(slowest, fastest, count, device=position.device).exp()
        phase = position.float()[..., None] * frequencies  # (views, N, 2, Dv / 4)
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-3)[..., :width]


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

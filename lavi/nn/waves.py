"""Positions as sines and cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(position: Tensor, cycles: tuple[float, float], count: int) -> Tensor:
    """A sine and a cosine of each of ``count`` frequencies: positions (...) to (..., 2 count).

    Args:
        cycles: of the slowest and the fastest wave in one unit of position; the others lie evenly between their
            logarithms.
    """
    slowest, fastest = (math.log(2 * math.pi * of_wave) for of_wave in cycles)
    frequencies = torch.linspace(slowest, fastest, count, device=position.device).exp()
    phase = position.float()[..., None] * frequencies  # (..., count)
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)

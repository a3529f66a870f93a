"""Rows of a table by their numbers, with a backward pass that is as quick as the forward pass."""

from __future__ import annotations

from torch import Tensor


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """``table`` (n, E) at ``index`` (...), to (..., E): the same as ``table[index]``.

    Indexing adds its gradients up one after the other on a CPU, and sorts the index on a GPU. Both passes take three
    times as long that way on one core (``benchmarks/gather.py``), and longer yet on two.
    """
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)

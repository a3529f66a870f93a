"""Rows of a table by their numbers, with a backward pass that is as quick as the forward pass."""

from __future__ import annotations

from torch import Tensor


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """``table`` (n, E) at ``index`` (...), from 0 and on the same device, to (..., E).

    Indexing adds its gradients up one after the other on a CPU, and takes three times as long there, both passes
    together (``benchmarks/gather.py``). On a GPU the gradients of a row that is taken several times are added in no
    fixed order, unless torch's deterministic algorithms are asked for.
    """
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)

"""The switch by which models are built from their configuration alone, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_without: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built within start from their configuration, with random weights, whatever checkpoint they name."""
    token = _without.set(True)
    try:
        yield
    finally:
        _without.reset(token)


def weights_wanted() -> bool:
    """Whether checkpoints are to be read: not within :func:`without_weights`, and never on the meta device."""
    return not _without.get() and torch.get_default_device().type != "meta"

"""Configurations of published checkpoints, without their weights: what models are counted from.

A folder here is named as the checkpoint is on the hub and holds its ``config.json`` (what of it decides shapes; of a
two-tower model, its vision tower's) and ``preprocessor_config.json``. Where no weights are wanted, the loading code
reads these instead of asking the hub, so that a recipe of a published pair is counted, or timed with random weights,
without a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

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


def configuration_of(source: str) -> str:
    """Where to read the configuration of the checkpoint ``source``: from here, if no weights are wanted."""
    folder = Path(__file__).parent / source
    return str(folder) if not weights_wanted() and (folder / "config.json").is_file() else source

"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def home_path(text: str | Path) -> Path:
    """A path with ``~`` as the home folder, where there is one of that name."""
    return Path(os.path.expanduser(text))

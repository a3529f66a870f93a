"""Paths as users write them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lavi.errors import UserError


def home_path(text: str | Path) -> Path:
    """A path with ``~`` as the home folder, where there is one of that name."""
    return Path(os.path.expanduser(text))


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The last names of absolute paths; where two are one, with as many of the folders above them as tell all apart.

    Raises:
        UserError: a path is named twice.
    """
    parts = [path.parts[1:] for path in paths]
    if twice := [path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1]:
        raise UserError(f"{twice[0]} is named twice.")
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({own[-n:] for own in parts}) == len(parts))
    return ["-".join(own[-depth:]) for own in parts]

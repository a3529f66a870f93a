"""What an argument of a command may be."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lavi.config.paths import home_path
from lavi.config.types import Range
from lavi.errors import UserError

OVERRIDE = re.compile(r"[\w.-]+=")
"""How a change to a recipe begins."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the module docstring's lines and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default == []
        return action.help if unset else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reads a command line: options and, if it has a positional ``overrides``, changes to a recipe between them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **settings})

    def read(self) -> argparse.Namespace:
        """The arguments of this process.

        Raises:
            UserError: what it does not know, or a value that an option cannot have.
        """
        args, rest = self.parse_known_args()
        unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if hasattr(args, "overrides"):
            args.overrides = [*args.overrides, *rest]
        return args

    def given(self, args: argparse.Namespace, options: Sequence[str]) -> list[str]:
        """Those of the ``options`` that have another value than their default, as they are written."""
        return [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) != self.get_default(name)]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help).")


def path(text: str) -> Path:
    """A path; ``~`` is the home folder, also where no shell has seen it (``--out=~/x``)."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path cannot be empty")
    return home_path(text)


def text(words: str) -> str:
    """Words, as UTF-8 also where the locale is not; bytes that are none are replaced."""
    return os.fsencode(words).decode(errors="replace")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least so much."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least}, not '{text}'")
        return value

    return read


def share(text: str) -> float:
    """The type of an option that is a share above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value not in Range(0, 1, above=True):
        raise argparse.ArgumentTypeError(f"a share above 0 and at most 1, not '{text}'")
    return value


def without_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of an option that takes several, and the changes to a recipe that came behind them."""
    overrides = [word for word in words if OVERRIDE.match(word) and not _exists(path(word))]
    return [word for word in words if word not in overrides], overrides


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a change to a recipe may be longer than any file's name
        return False

"""Errors that a user can mend, and the front door that prints them without a traceback."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: one sentence with what is wrong, where, and what to do.

    A data-loader worker re-raises an exception with its whole traceback as the message; :meth:`__str__` gives back
    the sentence alone.
    """

    def __str__(self) -> str:
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()


def one_line(error: BaseException, *, most: int = 300) -> str:
    """What an exception of another library says, on one line and without its last full stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:most].removesuffix(".") or type(error).__name__


def nearest(name: object, known: Iterable[object]) -> str:
    """``did you mean 'x'?`` for the known name closest to ``name``, else the list of known names."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}." if names else "nothing is known here."


def front(main: Callable[[], int | None]) -> Callable[[], NoReturn]:
    """Wrap a command-line ``main``: a :class:`UserError` becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run() -> NoReturn:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            sys.exit(main() or 0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the module docstring's lines and shows defaults."""

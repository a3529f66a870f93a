"""Errors that a user can mend."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: one sentence with what is wrong, where, and what to do.

    A data-loader worker re-raises an exception with its whole traceback as the message; :meth:`__str__` gives back
    the sentence alone.
    """

    def __str__(self) -> str:
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()


class Busy(UserError):
    """Another process has it in work: to be waited for, or left to it."""


def one_line(error: BaseException, *, most: int = 300) -> str:
    """What an exception of another library says, on one line and without its last full stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:most].rstrip(".!") or type(error).__name__


MANY = 40
"""Names, more than which nobody reads."""


def nearest(name: object, known: Iterable[object]) -> str:
    """``did you mean 'x'?`` for the known name closest to ``name``, else the known names, of many the closest."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    if len(names) > MANY:
        names = [*difflib.get_close_matches(str(name), names, n=5, cutoff=0), "..."]
    return f"known: {', '.join(names).removesuffix('.')}." if names else "nothing is known here."


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, in a few words, also where a library wrapped what the system said."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if os.strerror(errno.ENOSPC) in str(error):
        return os.strerror(errno.ENOSPC)
    return str(error).partition("\n")[0] or type(error).__name__

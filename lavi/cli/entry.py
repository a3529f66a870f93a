"""How every command starts and ends: errors that a user can mend become one line and exit status 2."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from lavi.cli.output import prepare_output
from lavi.errors import UserError

REMEDIES = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder in the place of that file",
    errno.ELOOP: "mend that link",
    errno.EMFILE: "allow more with `ulimit -n`, or lower data.workers",
}
"""What to do about what the system refuses."""
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)
"""What the system may refuse without naming the file."""


def mendable(error: Exception) -> str | None:
    """The sentence for an error that a user can mend; None where it may be a fault of the program."""
    if isinstance(error, UserError | argparse.ArgumentTypeError):
        return str(error)
    message = str(error).partition("\n")[0]
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno or 0)
        if isinstance(error, FileNotFoundError) and _was_given(error.filename):
            remedy = "give one that exists"
        if remedy is None or not (error.filename or error.errno in NAMELESS):
            return None
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}: {remedy}."
    if (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "can't allocate memory" in message
    ):
        return (
            f"the memory is too small ({'. '.join(message.split('. ')[:2]) or 'of this machine'}): lower "
            "data.batch_size (of an evaluation --batch-size), set module.checkpointing=true, or take smaller images, a "
            "shorter context or a smaller model."
        )
    if (full := os.strerror(errno.ENOSPC)) in message:  # as other libraries pass it on
        return f"{full}: {REMEDIES[errno.ENOSPC]}."
    if "gloo/transport" in message or "ncclRemoteError" in str(error):
        return f"another rank has ended ({message.rpartition('] ')[2].partition('. ')[0]}): what it says itself is why."
    if message.startswith("DataLoader worker"):  # killed from outside
        return f"a process that reads data ended ({message}): give it more memory, or lower data.workers."
    return None


def _was_given(file: object) -> bool:
    """Whether the command line named a file; only then is it the user's to mend that it is not there."""
    paths = {os.path.abspath(os.path.expanduser(argument.rpartition("=")[2])) for argument in sys.argv[1:]}
    return isinstance(file, str | os.PathLike) and os.path.abspath(file) in paths


def cli_entry_point(main: Callable[[], int | None]) -> Callable[[], NoReturn]:
    """Wrap a command-line ``main``: what a user can mend becomes one line on stderr and exit status 2.

    Notes on an error (``add_note``) stand behind its sentence; below the traceback, where it keeps that.
    """

    @functools.wraps(main)
    def run() -> NoReturn:
        prepare_output()
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for talkative in ("httpx", "timm"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it finds torchao's enums old-fashioned
        try:
            status = main() or 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
                status = 128 + 13  # as of a command that SIGPIPE ended
            elif (sentence := mendable(error)) is not None:
                print("error:", sentence, *getattr(error, "__notes__", ()), file=sys.stderr)
                status = 2
            else:
                raise
        sys.exit(status)

    return run


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads what a stream writes (``| head``); from then on it writes to nowhere."""
    try:
        print(file=stream, flush=True)  # what failed to be written is dropped: flushing alone would not fail again
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False

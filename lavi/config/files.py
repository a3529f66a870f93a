"""Files that are there whole or not at all, and files that one process at a time may write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, Timeout

from lavi.errors import UserError


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; what was written replaces ``file`` in one step, once it is on the disk.

    If writing fails, ``file`` stays as it was, and what was written is removed.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def holding(lock: BaseFileLock, *, busy: str) -> Iterator[None]:
    """Hold a file lock; its file is removed at the end.

    Args:
        busy: the sentence of the error, if another process holds the lock for longer than the lock's timeout.

    Raises:
        UserError: ``busy``.
        OSError, NotImplementedError: the file cannot be written, or its file system has no locks.
    """
    try:
        lock.acquire()
    except Timeout:
        raise UserError(busy) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # of nested ones the outermost
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while it is held: a process that opened it meanwhile sees that, and retries
        lock.release()

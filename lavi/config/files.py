"""Files that are there whole or not at all, and files that one process at a time may write."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lavi.errors import Busy, UserError, reason

log = logging.getLogger("lavi")
PATIENCE = 2.0
"""Seconds to wait for a lock: a process that was just killed may need a moment to be gone."""


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
        Busy: with this sentence.
        OSError, NotImplementedError: the file cannot be written, or its file system has no locks.
    """
    try:
        lock.acquire()
    except Timeout:
        raise Busy(busy) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # of nested ones the outermost
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while it is held: a process that opened it meanwhile sees that, and retries
        lock.release()


@contextmanager
def one_process(file: Path, *, busy: str) -> Iterator[None]:
    """Keep other processes from what ``file`` is the lock of, as far as its file system has locks.

    Raises:
        Busy: with this sentence.
        UserError: the file cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(FileLock(file, timeout=PATIENCE), busy=busy))
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise UserError(f"nothing can be written into {file.parent} ({reason(error)}).") from None
            log.warning("%s cannot be locked (%s): let no other process write there.", file, reason(error))
        yield

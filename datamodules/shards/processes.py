"""Work shared among processes that leave Ctrl-C to their parent and end when it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from lavi.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
TOGETHER = 512
"""Items that a process gets at a time."""
GRACE = 60
"""Seconds that a parent has to save what it does, and to end its processes itself."""


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent alone answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_signals_to_parent() -> None:
    """A scheduler's SIGTERM reaches all processes of a job, as Ctrl-C those of a terminal: the parent answers both.

    A second SIGTERM ends this process, and so do :data:`GRACE` seconds. Not for the processes of a pool, which waits
    for those it has terminated.
    """
    leave_interrupts_to_parent()
    signal.signal(signal.SIGTERM, _on_first_sigterm)


def _on_first_sigterm(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(GRACE)  # whose usual answer is to end


def end_with_parent() -> None:
    """End when the parent is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """``work`` of each item, in the order of the items; of any number, few are in memory.

    Args:
        work: must be picklable, as must be the items and the results.

    Raises:
        UserError: a process was killed. What ``work`` raises is raised here.
    """
    pool = ProcessPoolExecutor(workers, initializer=_begin)
    waiting: deque[Future[list[Result]]] = deque()
    left = iter(items)
    try:
        while some := list(islice(left, TOGETHER)):
            waiting.append(pool.submit(_each, work, some))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"one of {workers} processes was killed (is the memory enough for them?).") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    leave_interrupts_to_parent()
    end_with_parent()


def _each(work: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [work(item) for item in items]

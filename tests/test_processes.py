"""Processes that tests fork leave alone what is the parent's."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from processes import start_process


class Cyclic:
    """What the garbage collector alone ends, such as a process group with its threads."""

    def __init__(self, note: Path) -> None:
        self.me, self.note = self, note

    def __del__(self) -> None:
        with self.note.open("a") as stream:
            print(os.getpid(), file=stream)


def test_garbage_of_the_parent_ends_in_the_parent(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        Cyclic(tmp_path / "ended")
        assert start_process(gc.collect, tmp_path / "said").wait() == 0
        gc.collect()
    finally:
        gc.enable()
    assert (tmp_path / "ended").read_text().split() == [str(os.getpid())]

"""TensorBoard's files in a run folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lavi.checkpoints.run_folder import cannot_write
from lavi.errors import UserError, reason


class Curves(TensorBoardLogger):
    """TensorBoard's files in a run folder; what a run had logged behind the checkpoint it goes on from is hidden."""

    def __init__(self, run: Path, *, resumed_step: int | None = None) -> None:
        super().__init__(run, name="", version="", purge_step=resumed_step)
        self._usual_hook, threading.excepthook = threading.excepthook, self._on_thread_exception

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        """The thread that writes hands its error to the run, which says it: not a second time."""
        if type(args.thread).__name__ != "_AsyncWriterThread":
            self._usual_hook(args)

    @property
    def experiment(self) -> Any:
        with self._writing():
            return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._writing():
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with self._writing():
            super().save()

    def finalize(self, status: str) -> None:
        threading.excepthook = self._usual_hook
        # After a failure another one would hide it.
        with self._writing() if status == "success" else suppress(OSError):
            super().finalize(status)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # Lightning makes the second of the first
            if not isinstance(error.__cause__ or error, OSError):
                raise
            raise UserError(cannot_write("TensorBoard's curves", Path(self.log_dir), reason(error))) from None

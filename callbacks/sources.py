"""How many samples came from each source of a mixture, and how many were left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl

from lavi.batch import Batch


class Sources(pl.Callback):
    """Logs ``samples/NAME`` for each source and ``samples/skipped``, since the run began, over all ranks.

    The counts are in the checkpoint: a resumed run counts on.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        # Before the step: a checkpoint made at its end, by whichever callback, has it counted.
        self.counts.update(batch.sources)
        self.counts["skipped"] += sum(skip.samples for skip in batch.skipped)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer._logger_connector.should_update_logs:
            # A rank may not have seen one of them yet, and all must log the same.
            names = sorted({*trainer.datamodule.source_names, "skipped"})  # type: ignore[attr-defined]
            counts = {f"samples/{name}": float(self.counts[name]) for name in names}
            module.log_dict(counts, sync_dist=True, reduce_fx="sum")

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter(state)

"""How many samples came from each source of a mixture, and how many were left out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lavi.data.data_module import DataModule


class Sources(pl.Callback):
    """Logs ``samples/NAME`` for each source and ``samples/skipped``, since the run began, over all ranks.

    The data module counts and keeps its counts with its position in the data: a resumed run counts on.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer._logger_connector.should_update_logs:
            data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
            # A rank may not have seen one of them yet, and all must log the same.
            names = sorted({*data.source_names, "skipped"})
            counts = {f"samples/{name}": float(data.counts[name]) for name in names}
            module.log_dict(counts, sync_dist=True, reduce_fx="sum")

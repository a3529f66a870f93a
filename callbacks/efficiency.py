"""What this model costs beside its concatenation twin, over a sweep of visual tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lavi.checkpoints.model_folder import RECIPE
from lavi.config.types import Count, CountOrZero
from lavi.efficiency import figures
from lavi.efficiency.latency import TURNS
from lavi.efficiency.measure import check_not_quantized
from lavi.efficiency.record import Record, write_records
from lavi.efficiency.scenario import Scenario
from lavi.efficiency.sweep import Sweep, sweep_records, with_baseline
from lavi.errors import UserError
from lavi.recipe import Recipe
from lavi.report import console, track

log = logging.getLogger("lavi")

RECORDS = "efficiency.jsonl"


class Efficiency(pl.Callback):
    """Counts FLOPs on the meta device when training starts; time and memory on the device in use when it ends.

    Each point is one JSON line in ``efficiency.jsonl`` of the run folder. In TensorBoard the curves stand under
    ``efficiency``, x = visual tokens, one line a method (a run of its own, so that they overlay), and what each method
    saves among the hyperparameters. The weights that were trained are not touched: fresh models are measured, since
    time does not depend on weights. Of a decoder that cannot be counted nothing is measured: it trains all the same.

    Args:
        visual_tokens: the sweep.
        text_tokens: of the prompt.
        runs: timed turns of each stage; 0 counts FLOPs only.
    """

    def __init__(self, *, visual_tokens: list[CountOrZero], text_tokens: Count = 50, runs: CountOrZero = TURNS) -> None:
        if not visual_tokens:
            raise UserError("visual_tokens of Efficiency are the numbers that it measures at: name one, such as [64].")
        self.visual_tokens, self.text_tokens, self.runs = visual_tokens, text_tokens, runs

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:  # a run that goes on has them
            records = self.sweep(Recipe.load(Path(trainer.default_root_dir) / RECIPE))
            for folder in _folders(trainer):
                figures.write_curves(records, folder, figures.COUNTED)
                figures.write_savings(records, folder)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        recipe, device = Recipe.load(root / RECIPE), module.device if self.runs else None
        try:
            check_not_quantized(recipe)
        except UserError as error:
            log.warning("not measured: %s", error)
            device = None
        records = self.sweep(recipe, device)
        if not records:
            return
        write_records(records, root / RECORDS)
        for folder in _folders(trainer):
            figures.write_curves(records, folder, figures.MEASURED)
        for shown in figures.sweep_tables(records):
            console().print(shown)

    def sweep(self, recipe: Recipe, device: torch.device | None = None) -> list[Record]:
        """One record for each method and number of visual tokens; timed if there is a device to do it on."""
        sweep = Sweep("visual_tokens", tuple(self.visual_tokens))
        return list(
            sweep_records(
                with_baseline([recipe]),
                sweep,
                Scenario(text=self.text_tokens),
                device=device,
                runs=self.runs,
                track=partial(track, description="counting" if device is None else "measuring"),
                leave_out=lambda error: log.warning("not measured: %s", error),
            )
        )


def _folders(trainer: pl.Trainer) -> Iterable[Path]:
    return (Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))

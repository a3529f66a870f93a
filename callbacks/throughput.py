"""How fast training goes: samples, text tokens and FLOPs a second, the share of the peak, the share spent waiting."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ThroughputMonitor

from lavi.batch import IGNORE, Batch, ImageSlot
from lavi.config.types import Count
from lavi.efficiency.flops import closed_form
from lavi.efficiency.scenario import PromptShape
from lavi.model import VisionLanguageModel


class Throughput(ThroughputMonitor):
    """Lightning's throughput monitor for batches of conversations, and the time that each step waited for its batch.

    Logs ``train/device/samples_per_sec``, ``train/device/items_per_sec`` (text tokens), FLOPs a second and, where the
    device's peak is known, ``mfu``; and ``train/data_wait``, the share of the time since the last log that was spent
    waiting for data; validation and checkpoints, and the wait right behind them, count as neither.

    FLOPs of training are those of the forward pass three times where weights train, twice where
    gradients only pass through (also beside adapters), once in a frozen tower; none in a tower whose features are read.
    The head is that of the trained tokens. On a GPU each step waits for the device, as a clock has to.

    Args:
        window: steps that rates are averaged over; before so many there are none.
    """

    def __init__(self, *, window: Count = 20) -> None:
        super().__init__(batch_size_fn=conversations, length_fn=text_tokens, window_size=window)
        self._known: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._ended = self._waited = self._since = 0.0
        self._step, self._did_other_work = 0, False

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._ended = self._since = time.perf_counter()
        self._step, self._did_other_work = trainer.global_step, False

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        between = time.perf_counter() - self._ended
        if self._did_other_work:
            self._since += between
        else:
            self._waited += between
        self._did_other_work = False
        module.flops_per_batch = self.flops(module, batch)  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, *args)
        self._ended = time.perf_counter()
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and trainer._logger_connector.should_update_logs:
            module.log("train/data_wait", self._waited / max(1e-9, self._ended - self._since))
            self._waited, self._since = 0.0, self._ended

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_validation_start(trainer, *args)
        self._did_other_work = True

    def on_save_checkpoint(self, *args: Any) -> None:
        self._did_other_work = True

    def _compute(self, trainer: pl.Trainer, iter_num: int | None = None) -> None:
        if trainer.training:  # validation would be logged over batches that it counts itself
            super()._compute(trainer)

    def flops(self, module: pl.LightningModule, batch: Batch) -> float:
        """FLOPs of one training step on this batch, padding included."""
        model = module.model
        assert isinstance(model, VisionLanguageModel)
        rows: list[list[ImageSlot]] = [[] for _ in range(len(batch))]
        for slot in batch.image_slots:
            rows[slot.row].append(slot)
        text, encodes = batch.input_ids.shape[1], batch.backbone_features is None
        of_rows = [self._row(model, text, slots, encodes=encodes) for slots in rows]
        trained = int((batch.labels != IGNORE).sum())
        return sum(body for body, _ in of_rows) + trained * of_rows[0][1]

    def _row(
        self, model: VisionLanguageModel, text: int, slots: list[ImageSlot], *, encodes: bool
    ) -> tuple[float, float]:
        """FLOPs of a row without its head, and of the head for a token."""
        key = (text, encodes, *(slot.layout._replace(size=(0, 0)) for slot in slots))
        if key not in self._known:
            passes, bare = _passes(model, encodes=encodes), closed_form(model, PromptShape(text)).prefill
            row = Counter(bare)
            for slot in slots:
                seeing = closed_form(model, _point(text, slot, model)).prefill
                row.update({name: flops - bare.get(name, 0.0) for name, flops in seeing.items()})  # type: ignore[misc]
            head = passes["head"] * row.pop("head")
            self._known[key] = sum(passes[name] * flops for name, flops in row.items()), head
        return self._known[key]


OF_LANGUAGE = ("text_attention", "text_ffn", "visual_attention", "visual_ffn", "head")
"""Components whose weights are the language model's; others are the fusion's and the reducer's, or the tower's."""


def _passes(model: VisionLanguageModel, *, encodes: bool) -> defaultdict[str, int]:
    """How many forward passes a training step is worth, by component."""
    adapters = {f"language.{name}" for name in model.language.adapters}
    trains = {
        name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and name not in adapters
    }
    fusion = 3 if trains & {"fusion", "reducer"} else 2
    passes = defaultdict(lambda: fusion, dict.fromkeys(OF_LANGUAGE, 3 if "language" in trains else 2))
    passes["vision_encoder"] = (3 if "vision" in trains else 1) if encodes else 0
    return passes


def _point(text: int, slot: ImageSlot, model: VisionLanguageModel) -> PromptShape:
    return PromptShape(text, layout=slot.layout, per_view=model.feature_spec.tokens, encoded=slot.views)


def conversations(batch: Batch) -> int:
    """The conversations of a batch, of which a packed row has several."""
    return len(batch.keys)


def text_tokens(batch: Batch) -> int:
    """The text tokens of a batch without its padding."""
    return sum(stop - start for start, stop in batch.spans)

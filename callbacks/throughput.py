"""How fast training goes: samples, text tokens and FLOPs a second, the share of the peak, the share spent waiting."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ThroughputMonitor

from lavi.batch import Batch, ImageSlot
from lavi.config.types import Count
from lavi.efficiency.flops import closed_form
from lavi.efficiency.scenario import PromptShape
from lavi.model import VisionLanguageModel


class Throughput(ThroughputMonitor):
    """Lightning's throughput monitor for batches of conversations, and the time that each step waited for its batch.

    Logs ``train/device/samples_per_sec``, ``train/device/items_per_sec`` (text tokens), FLOPs a second and, where the
    device's peak is known, ``mfu``; and ``train/data_wait``, the share of the time since the last log that was spent
    waiting for data. FLOPs of training are those of the forward pass three times where weights train, twice where
    gradients only pass through, once in a frozen tower. On a GPU each step waits for the device, as a clock has to.

    Args:
        window: steps that rates are averaged over; before so many there are none.
    """

    def __init__(self, *, window: Count = 20) -> None:
        super().__init__(batch_size_fn=len, length_fn=text_tokens, window_size=window)
        self._known: dict[tuple[Any, ...], float] = {}
        self._ended = self._waited = self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self._ended = self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        self._waited += time.perf_counter() - self._ended
        module.flops_per_batch = self.flops(module, batch)  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, *args)
        self._ended = time.perf_counter()
        if trainer._logger_connector.should_update_logs:
            module.log("train/data_wait", self._waited / max(1e-9, self._ended - self._since))
            self._waited, self._since = 0.0, self._ended

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
        return sum(self._row(model, batch.input_ids.shape[1], slots) for slots in rows)

    def _row(self, model: VisionLanguageModel, text: int, slots: list[ImageSlot]) -> float:
        key = (text, *(slot.layout._replace(size=(0, 0)) for slot in slots))
        if key not in self._known:
            trains = {name: any(p.requires_grad for p in part.parameters()) for name, part in model.named_children()}
            counted = [closed_form(model, _point(text, slot, model)) for slot in slots]
            bare = closed_form(model, PromptShape(text)).language
            vision = sum(flops.prefill["vision_encoder"] for flops in counted)
            rest = bare + sum(flops.language - bare for flops in counted)
            self._known[key] = (3 if trains["vision"] else 1) * vision + (3 if trains["language"] else 2) * rest
        return self._known[key]


def _point(text: int, slot: ImageSlot, model: VisionLanguageModel) -> PromptShape:
    return PromptShape(text, layout=slot.layout, per_view=model.feature_spec.tokens, encoded=slot.views)


def text_tokens(batch: Batch) -> int:
    """The text tokens of a batch without its padding."""
    return sum(stop - start for start, stop in batch.spans)

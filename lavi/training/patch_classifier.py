"""Training a small tower from dense labels: each patch names what it shows.

The built-in tower was trained so (``recipes/scenes/vision_tower.yaml``). Chosen here: at this size a contrastive
objective needs far more data than labels at each patch. Patches that show something are few (a letter stands on one in
thirty): averaged over all patches they hardly count, and the tower reads 36 % of the letters; so they and the empty
ones weigh alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lavi.config.types import Positive
from lavi.vision.hf import HFVision


class PatchClassifier(pl.LightningModule):
    """One linear head an attribute on the features of each patch; the tower is saved, the heads are thrown away.

    Args:
        model: the tower to train.
        classes: number of classes of each attribute; class 0 is "nothing here".
        centres: also tell where in the image the centre of what a patch shows lies.
        learning_rate: peak of a one-cycle schedule of AdamW.
    """

    CENTRE_WEIGHT = 10.0
    """Of the squared error in widths of the image, beside cross-entropies."""

    def __init__(
        self, model: HFVision, *, classes: dict[str, int], centres: bool = False, learning_rate: Positive = 1e-3
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict({name: nn.Linear(model.width, count) for name, count in classes.items()})
        self.centre = nn.Linear(model.width, 2) if centres else None
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """``batch``: ``pixels`` (B, C, H, W), labels (B, N) of each attribute, ``centre`` (B, N, 2), NaN if none."""
        features = self.model(batch["pixels"])  # (B, N, Dv)
        loss = features.new_zeros(())
        for name, head in self.heads.items():
            logits, labels = head(features).flatten(0, 1), batch[name].flatten()  # (B N, classes), (B N,)
            each, shown = nn.functional.cross_entropy(logits, labels, reduction="none"), labels > 0  # (B N,)
            loss = loss + _mean(each, shown) + _mean(each, ~shown)
            self.log(f"train/accuracy/{name}", (logits.argmax(-1) == labels)[shown].float().mean(), prog_bar=True)
        if self.centre is not None:
            there = batch["centre"].isfinite().all(-1)  # (B, N)
            error = (self.centre(features) - batch["centre"])[there]  # (shown, 2)
            loss = loss + self.CENTRE_WEIGHT * error.square().sum() / max(1, error.numel())
            self.log("train/centre_error", error.abs().sum() / max(1, error.numel()), prog_bar=True)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(Path(self.trainer.default_root_dir) / "vision_tower")


def _mean(values: Tensor, which: Tensor) -> Tensor:
    """The mean of some of the values (n,); 0 of none."""
    return (values * which).sum() / which.sum().clamp(min=1)

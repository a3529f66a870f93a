"""Training a small tower from dense labels: each patch names what it shows.

The built-in tower was trained so (``recipes/scenes/vision_tower.yaml``). Chosen here: at this size a contrastive
objective needs far more data than labels at each patch.
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
        classes: number of classes of each attribute.
        learning_rate: peak of a one-cycle schedule of AdamW.
    """

    def __init__(self, model: HFVision, *, classes: dict[str, int], learning_rate: Positive = 1e-3) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict({name: nn.Linear(model.width, count) for name, count in classes.items()})
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """``batch``: ``pixels`` (B, C, H, W) and, for each attribute, labels (B, N)."""
        features = self.model(batch["pixels"])  # (B, N, Dv)
        loss = features.new_zeros(())
        for name, head in self.heads.items():
            logits, labels = head(features).flatten(0, 1), batch[name].flatten()  # (B N, classes), (B N,)
            loss = loss + nn.functional.cross_entropy(logits, labels)
            shown = labels > 0  # class 0 is "nothing here", most patches
            self.log(f"train/accuracy/{name}", (logits.argmax(-1) == labels)[shown].float().mean(), prog_bar=True)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.model.save_pretrained(Path(self.trainer.default_root_dir) / "vision_tower")

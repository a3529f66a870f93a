"""The LightningModule: step, optimiser groups, schedule, and which parts train."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lavi.batch import IGNORE, Batch
from lavi.errors import UserError, nearest
from lavi.metrics.answers import FamilyAccuracy, groups, right_under_teacher_forcing
from lavi.model import VisionLanguageModel
from lavi.optim import MuonAdamW, adamw, hidden_matrices


class VisionLanguageModule(pl.LightningModule):
    """Trains a :class:`VisionLanguageModel` on the tokens of its answers.

    Args:
        model: what is trained.
        learning_rate: peak rate of each part that trains, by its name in the model (``fusion``, ``language``,
            ``vision``); a part that is not named, or at null, is frozen.
        weight_decay: on matrices only.
        warmup: share of the steps over which the rate rises; then it falls along a cosine to a hundredth.
        muon: train the hidden matrices with Muon, at this many times their part's rate, and only the rest (embeddings,
            norms, biases) with AdamW; None: AdamW for all. For small models from scratch; finetuning uses AdamW.

    Raises:
        UserError: an unknown part.
    """

    # A checkpoint holds what was trained; the rest comes from the recipe (checkpoint.py checks the exact set).
    strict_loading = False

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        learning_rate: dict[str, float | None],
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        muon: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = {part: rate for part, rate in learning_rate.items() if rate is not None}
        self.weight_decay, self.warmup, self.muon = weight_decay, warmup, muon
        for part in learning_rate:
            if part not in dict(model.named_children()):
                raise UserError(f"module.learning_rate names '{part}': {nearest(part, dict(model.named_children()))}")
        for name, child in model.named_children():
            child.requires_grad_(name in self.learning_rate)
        self.accuracy = {"train": FamilyAccuracy(), "val": FamilyAccuracy()}

    def train(self, mode: bool = True) -> VisionLanguageModule:
        """A frozen part stays in evaluation mode."""
        super().train(mode)
        for name, part in self.model.named_children():
            if name not in self.learning_rate:
                part.eval()
        return self

    def training_step(self, batch: Batch, index: int) -> Tensor:
        logits = self.model(batch)
        loss, tokens = summed_loss(logits, batch.labels)
        total = self._sum_over_ranks(tokens)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss)} at step {self.global_step}, in samples {', '.join(batch.keys[:8])}: "
                "lower module.learning_rate or train in fp32; checkpoints written before this step are intact."
            )
        # Gradients are averaged over ranks: times their number, each token of the global batch weighs the same.
        loss = loss * (self.trainer.world_size / total)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.accuracy["train"].update(right_under_teacher_forcing(logits.detach(), batch), groups(batch.answers))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        if self.global_step % max(1, self.trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._log_accuracy("train")

    def validation_step(self, batch: Batch, index: int) -> None:
        logits = self.model(batch)
        loss, tokens = summed_loss(logits, batch.labels)
        self.log("val/loss", loss / tokens, batch_size=int(tokens), sync_dist=True)
        self.accuracy["val"].update(right_under_teacher_forcing(logits, batch), groups(batch.answers))

    def on_validation_epoch_end(self) -> None:
        self._log_accuracy("val")

    def _log_accuracy(self, split: str) -> None:
        """``val/accuracy`` over all, ``val/level/easy``, ``val/family/colour`` and so on, in percent."""
        scores = self.accuracy[split].compute()
        self.accuracy[split].reset()
        for group, value in scores.items():
            name = "accuracy" if group == "all" else group
            if not group.endswith("/all"):  # data without families or levels have one group
                self.log(f"{split}/{name}", value, prog_bar=group == "all")

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        groups = [group for name in self.learning_rate for group in self._groups_of(name)]
        optimizer = adamw(groups) if self.muon is None else MuonAdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups_of(self, name: str) -> list[dict[str, Any]]:
        """The parameter groups of one part: what Muon trains, other matrices, vectors (which never decay)."""
        part, rate = self.model.get_submodule(name), self.learning_rate[name]
        hidden = set() if self.muon is None else hidden_matrices(part)
        parameters = [p for p in part.parameters() if p.requires_grad]
        muon = [p for p in parameters if id(p) in hidden]
        matrices = [p for p in parameters if p.ndim > 1 and id(p) not in hidden]
        vectors = [p for p in parameters if p.ndim <= 1]
        kinds = {
            "muon": (muon, rate * (self.muon or 1.0), self.weight_decay),
            "matrices": (matrices, rate, self.weight_decay),
            "vectors": (vectors, rate, 0.0),
        }
        return [
            {
                "params": chosen,
                "lr": lr,
                "weight_decay": decay,
                "kind": "muon" if kind == "muon" else "adamw",
                "name": f"{name}/{kind}",
            }
            for kind, (chosen, lr, decay) in kinds.items()
            if chosen
        ]

    def _share_of_peak(self, step: int) -> float:
        total = self.trainer.max_steps
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, total - rise)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the trained tokens, and their number; logits (B, T, vocabulary), labels (B, T)."""
    targets = labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
    )
    return loss, (targets != IGNORE).sum()

"""Muon for hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def adamw(groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW with the second moment that language models of every size are trained with."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class MuonAdamW(torch.optim.Optimizer):
    """Steps each parameter group by its ``kind``: ``muon`` or ``adamw``, both torch's own.

    Trainers and schedules take one optimizer; Muon is made for the matrices of hidden layers only. Its rates are
    scaled to AdamW's update size (``match_rms_adamw``), so that both live on one scale.

    Args:
        groups: parameter groups with ``params``, ``lr``, ``weight_decay`` and ``kind``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"kind": "adamw"})
        self._share()

    def _share(self) -> None:
        """Let torch's optimizers work on this one's groups and state: schedules and checkpoints know only this one."""
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in self.param_groups:
            groups[group["kind"]].append(group)
        self.parts: list[torch.optim.Optimizer] = []
        if groups["muon"]:
            self.parts.append(torch.optim.Muon(groups["muon"], adjust_lr_fn="match_rms_adamw"))
        if groups["adamw"]:
            self.parts.append(adamw(groups["adamw"]))
        for part in self.parts:
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading a checkpoint makes new groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def hidden_matrices(part: nn.Module) -> set[int]:
    """Ids of the parameters that Muon is for: weights of linear layers, but not those that give logits.

    A head is known by its weight being an embedding's (tied), or by a transformers model naming it.
    """
    heads = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
    for module in part.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        if head is not None:
            heads.add(id(head.weight))
    return {id(m.weight) for m in part.modules() if isinstance(m, nn.Linear)} - heads

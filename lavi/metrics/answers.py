"""Accuracy of whole answers, per question family and level."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from lavi.batch import IGNORE, Answer, Batch


class FamilyAccuracy(Metric):
    """Share of right answers: over all, per level (easy, hard ...) and per question family.

    :meth:`compute` gives ``{"all": x, "level/easy": x, "family/colour": x, ...}``. An answer that is missing or
    cannot be read counts as wrong; none is left out of the denominator.
    """

    full_state_update = False
    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Rows of (crc of the group's name, right, asked): families need not be known beforehand, nor on every rank.
        self.add_state("seen", default=[], dist_reduce_fx="cat")
        self.names: dict[int, str] = {}

    def update(self, right: Iterable[bool], answers: Iterable[tuple[str, str]]) -> None:
        """``answers``: (family, level) of each answer judged."""
        rows = []
        for is_right, (family, level) in zip(right, answers, strict=True):
            for group in dict.fromkeys(("all", f"level/{level}", f"family/{family}")):
                rows.append((self._id(group), int(is_right), 1))
        if rows:
            self.seen.append(torch.tensor(rows, device=self.device))

    def compute(self) -> dict[str, float]:
        """Percent right of each group, groups in alphabetical order."""
        if not len(self.seen):
            return {}
        seen = self.seen if isinstance(self.seen, Tensor) else torch.cat(self.seen)
        groups, place = seen[:, 0].unique(return_inverse=True)
        sums = torch.zeros(len(groups), 2, dtype=torch.float64).index_add_(0, place.cpu(), seen[:, 1:].cpu().double())
        names = self._all_names()
        scores = {names[int(g)]: 100 * float(right / asked) for g, (right, asked) in zip(groups, sums, strict=True)}
        return dict(sorted(scores.items()))

    def _id(self, group: str) -> int:
        number = zlib.crc32(group.encode())
        self.names[number] = group
        return number

    def _all_names(self) -> dict[int, str]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.names
        gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, self.names)
        return {number: name for names in gathered for number, name in names.items()}


def right_under_teacher_forcing(logits: Tensor, batch: Batch) -> list[bool]:
    """Whether each answer's tokens, its end token among them, are all the likeliest ones; logits (B, T, vocabulary)."""
    labels = batch.labels[:, 1:]
    right = ((logits[:, :-1].argmax(-1) == labels) | (labels == IGNORE)).cpu()  # (B, T - 1)
    return [bool(right[a.row, a.start - 1 : a.stop - 1].all()) for a in batch.answers]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is the true one, but for case and outer blanks."""
    return answer.strip().lower() == truth.strip().lower()


def groups(answers: Iterable[Answer]) -> list[tuple[str, str]]:
    """(family, level) of each answer."""
    return [(answer.family, answer.level) for answer in answers]

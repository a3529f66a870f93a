"""The contracts of metrics: a mean over groups, and a score of whole answers."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lavi.batch import Answer
from lavi.errors import UserError

Group = tuple[str, str]
"""The question family and the level of an answer."""


def groups_of(answers: Iterable[Answer]) -> list[Group]:
    """(family, level) of each answer."""
    return [(answer.family, answer.level) for answer in answers]


class GroupedMean(Metric):
    """Mean score in percent: over all, per level (easy, hard ...) and per question family.

    :meth:`compute` gives ``{"all": x, "level/easy": x, "family/colour": x, ...}``. The scores of all ranks
    count; they need not have the same families.
    """

    full_state_update = False
    group_ids: list[Tensor]
    scores: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # One row for each group of each score. A group is the checksum of its name: ranks exchange tensors.
        self.add_state("group_ids", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.group_names: dict[int, str] = {}

    def update(self, scores: Iterable[float], groups: Iterable[Group]) -> None:
        """Add scores between 0 and 1, each with its (family, level)."""
        rows = [
            (self._id(name), float(score))
            for score, (family, level) in zip(scores, groups, strict=True)
            for name in dict.fromkeys(("all", f"level/{level}", f"family/{family}"))
        ]
        self.group_ids.append(torch.tensor([number for number, _ in rows], dtype=torch.long, device=self.device))
        self.scores.append(torch.tensor([score for _, score in rows], device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the scores of all ranks; called before each :meth:`compute`, on one rank, too.

        A state is never an empty list: torchmetrics would exchange a tensor of floats instead, whatever others have.
        """
        if not len(self.scores):
            self.update([], [])
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        """Mean score of each group in percent, groups in alphabetical order."""
        ids, scores = (_joined(state).cpu() for state in (self.group_ids, self.scores))
        known, index = ids.unique(return_inverse=True)
        sums = torch.zeros(len(known), dtype=torch.float64).index_add_(0, index, scores.double())
        names = self._names_of_all_ranks()
        means = 100 * (sums / index.bincount(minlength=len(known)))
        return dict(sorted((names[int(number)], float(mean)) for number, mean in zip(known, means, strict=True)))

    def _id(self, name: str) -> int:
        number = zlib.crc32(name.encode())
        self.group_names[number] = name
        return number

    def _names_of_all_ranks(self) -> dict[int, str]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.group_names
        gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, self.group_names)
        return {number: name for names in gathered for number, name in names.items()}


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    """A state as one tensor: torchmetrics joins it when ranks exchange it."""
    return state if isinstance(state, Tensor) else torch.cat(state)


class AnswerMetric(GroupedMean, ABC):
    """Scores whole answers. A recipe names it as ``data.metric``; a subclass needs :meth:`score` alone."""

    label = ""
    """What the percents are of, in a sentence such as ``75.0 % right of 5 answers``; empty: the name of the class."""

    wants_whole_answers = True
    """Whether an answer that goes on behind the true one may still score: else it is cut some tokens behind it."""

    @abstractmethod
    def score(self, answer: str, truth: str) -> float:
        """How good an answer is, from 0 to 1; an empty one or one that cannot be read has a score, too."""

    def update_answers(self, answers: Iterable[str], truths: Iterable[str], groups: Iterable[Group]) -> list[float]:
        """Score answers against the true ones; returns the scores.

        Raises:
            UserError: a score outside of 0 to 1.
        """
        scores = [self._checked(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
        self.update(scores, groups)
        return scores

    def _checked(self, answer: str, truth: str) -> float:
        score = self.score(answer, truth)
        if not 0 <= score <= 1:
            raise UserError(
                f"{self.name}.score gives {score} for the answer {answer[:80]!r} and the truth {truth[:80]!r}: a score "
                "is a number from 0 to 1."
            )
        return score

    @property
    def name(self) -> str:
        """The name of the class: what records keep."""
        return type(self).__name__

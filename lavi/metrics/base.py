"""The contracts of metrics: a mean over groups, and a score of whole answers."""

from __future__ import annotations

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lavi.batch import Answer
from lavi.errors import UserError

Group = tuple[str, str]
"""The question family and the level of an answer."""


def groups_of(answers: Iterable[Answer]) -> list[Group]:
    """(family, level) of each answer."""
    return [(answer.family, answer.level) for answer in answers]


def group_names(family: str, level: str) -> tuple[str, ...]:
    """The groups that an answer counts in."""
    return ("all", f"level/{level}", f"family/{family}")


class _ListStates(Metric):
    """A metric whose states are lists, of one tensor for each update; none of them has the same length on all ranks."""

    full_state_update = False
    no_update: tuple[Any, ...]
    """Arguments of an update that adds nothing."""

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks; called before each ``compute``, on one rank, too.

        A state is never an empty list: torchmetrics would exchange a tensor of floats instead, whatever others have.
        """
        if not all(len(getattr(self, name)) for name in self._defaults):
            self.update(*self.no_update)
        super().sync(*args, **kwargs)


class GroupedMean(_ListStates):
    """Mean score in percent: over all, per level (easy, hard ...) and per question family.

    :meth:`compute` gives ``{"all": x, "level/easy": x, "family/colour": x, ...}``. The scores of all ranks
    count; they need not have the same families.
    """

    no_update = ([], [])
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
            for score, group in zip(scores, groups, strict=True)
            for name in dict.fromkeys(group_names(*group))
        ]
        self.group_ids.append(torch.tensor([number for number, _ in rows], dtype=torch.long, device=self.device))
        self.scores.append(torch.tensor([score for _, score in rows], device=self.device))

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


@dataclass(frozen=True)
class Prediction:
    """What a model answered, with all that it is scored by."""

    answer: str
    references: tuple[str, ...]
    """True answers: one, or as many as people gave."""
    sample: str
    """Whose answers are not independent of each other: those about one image."""
    family: str = "all"
    level: str = "all"
    question: str = ""
    score: float = math.nan
    """How good it is, once a metric has said so."""
    grade: float = math.nan
    """What a judge gave it besides."""


Figures = dict[str, float]
"""By name, in percent unless the metric says otherwise."""


class AnswerMetric(_ListStates, ABC):
    """Scores whole answers. A recipe names it as ``data.metric``; a subclass needs :meth:`score` alone.

    :meth:`compute` gives the mean score in percent, over all and by group, as :class:`GroupedMean` does, and whatever
    else the metric says of all answers together (:meth:`figures`). The answers of all ranks count.
    """

    no_update = ([],)
    label = ""
    """What the percents are of, in a sentence such as ``75.0 % right of 5 answers``; empty: the name of the class."""

    wants_whole_answers = True
    """Whether an answer that goes on behind the true one may still score: else it is cut some tokens behind it."""

    highest = 1.0
    """The best score there is."""

    headline = "all"
    """The figure that papers report."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # One JSON line for each answer, as bytes: ranks exchange tensors.
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, answer: str, references: Sequence[str]) -> float:
        """How good an answer is, from 0 to 1; an empty one or one that cannot be read has a score, too."""

    def scored(self, prediction: Prediction) -> Prediction:
        """A prediction with its score; to be overridden where that needs more than the answer and its references."""
        return replace(prediction, score=float(self.score(prediction.answer, prediction.references)))

    def figures(self, predictions: Sequence[Prediction], weights: NDArray[np.float64]) -> Figures:
        """What there is to say of all answers besides the means of their scores.

        Args:
            predictions: with their scores.
            weights: (answers,), how often each counts: 1, or as often as it was drawn for an interval.
        """
        return {}

    def update(self, predictions: Iterable[Prediction]) -> None:
        """Score answers.

        Raises:
            UserError: a score outside of 0 to :attr:`highest`.
        """
        scored = map(self._checked, predictions)
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in scored).encode()
        self.rows.append(torch.from_numpy(np.frombuffer(lines, dtype=np.uint8).copy()).to(self.device))

    def predictions(self) -> list[Prediction]:
        """All answers so far, with their scores."""
        if not len(self.rows):
            return []
        rows = map(json.loads, bytes(_joined(self.rows).cpu().numpy()).splitlines())
        return [Prediction(**row | {"references": tuple(row["references"])}) for row in rows]

    def compute(self) -> Figures:
        """All figures, those of groups in alphabetical order."""
        predictions = self.predictions()
        if not predictions:
            return {}
        return grouped_means(predictions) | self.figures(predictions, np.ones(len(predictions)))

    def _checked(self, prediction: Prediction) -> Prediction:
        scored = self.scored(prediction)
        if not 0 <= scored.score <= self.highest:
            raise UserError(
                f"{self.name}.score gives {scored.score} for the answer {prediction.answer[:80]!r} and the truth "
                f"{' | '.join(prediction.references)[:80]!r}: a score is a number from 0 to {self.highest:g}."
            )
        return scored

    @property
    def name(self) -> str:
        """The name of the class: what records keep."""
        return type(self).__name__


def grouped_means(predictions: Iterable[Prediction]) -> Figures:
    """Mean score of each group in percent, groups in alphabetical order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for one in predictions:
        for name in dict.fromkeys(group_names(one.family, one.level)):
            groups[name].append(one.score)
    return {name: 100 * (sum(scores) / len(scores)) for name, scores in sorted(groups.items())}

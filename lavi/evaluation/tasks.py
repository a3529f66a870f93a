"""Tasks: a benchmark's questions, what they are scored by, and how long answers may be.

A task is a file of a few lines (``recipes/tasks/gqa.yaml``): a component of this class, as in a recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lavi.batch import Sample
from lavi.config.text import read
from lavi.config.types import Count
from lavi.errors import UserError, nearest
from lavi.metrics.base import AnswerMetric
from lavi.recipe import load_component

FOLDER = Path("recipes/tasks")
"""Of the tasks that are named without a folder."""


class UnreadableError(UserError):
    """A question whose image cannot be read.

    Args:
        sample: the conversation, with its true answer and without images.
    """

    def __init__(self, message: str, sample: Sample) -> None:
        super().__init__(message)
        self.sample = sample


class QuestionSource(ABC):
    """The questions of a benchmark, as they lie on this machine.

    Reading a list of them is cheap; images and videos are opened one question at a time.
    """

    @abstractmethod
    def records(self, folder: Path) -> Iterable[Any]:
        """What there is to ask, in order: nothing that is decoded.

        Args:
            folder: of the benchmark's files.

        Raises:
            UserError: a file is missing or is something else.
        """

    def count(self, folder: Path, limit: int | None = None) -> int:
        """How many records there are, or the limit where there are more."""
        return sum(1 for _ in islice(self.records(folder), limit))

    def fingerprint(self, folder: Path) -> str:
        """What the files of the questions are, by which answers are told from those to other files."""
        return ""

    @abstractmethod
    def sample(self, record: Any, folder: Path) -> Sample:
        """One question as a conversation that ends with its true answer.

        The sample's key is its image's: answers about one image are not independent. The last message may have
        ``references``, ``family`` and ``level``, as :class:`lavi.batch.Sample` says.

        Raises:
            UnreadableError: its image cannot be read. It counts as a question without an answer.
            UserError: the record has not what the task names: the evaluation stops.
        """


class Task:
    """A benchmark.

    Args:
        name: of its folder below ``data/tasks``, and of what is written.
        questions: where they lie.
        metric: what scores the answers.
        max_new_tokens: the longest answer.
    """

    written: dict[str, Any] | None = None
    """What its file says, by which answers are told from those to another prompt; None: it was made by hand."""

    def __init__(
        self, *, name: str, questions: QuestionSource, metric: AnswerMetric, max_new_tokens: Count = 16
    ) -> None:
        self.name, self.questions, self.metric, self.max_new_tokens = name, questions, metric, max_new_tokens

    @classmethod
    def load(cls, name: str) -> Task:
        """The task of that name, or of that file.

        Raises:
            UserError: there is none, or its file is wrong.
        """
        file = Path(name) if Path(name).suffix in (".yaml", ".yml") else FOLDER / f"{name}.yaml"
        if not file.is_file():
            known = sorted(one.stem for one in FOLDER.glob("*.yaml"))
            raise UserError(f"there is no task {file}: {nearest(name, known)}")
        task = load_component(file, cls)
        task.written = read(file, {})
        return task

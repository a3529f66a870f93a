"""What a run answered to a task: written as it is answered, so that a kill loses one batch.

NAME.jsonl            the whole file: a head (task, decoding, weights, versions), then a line for each answer, in order
NAME.part-0.jsonl     of each process, while they answer: the same head, then a line for each *batch* of answers, so
                      that a batch is there whole or not at all
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavi.batch import Layout
from lavi.config.files import one_process, replacing
from lavi.errors import UserError, reason
from lavi.metrics.base import Prediction

Head = dict[str, Any]


@dataclass(frozen=True)
class Answered:
    """One question with its answer, and what a record of its cost needs."""

    index: int
    """Of the question, in the order of the task."""
    prediction: Prediction
    prompt: str
    """As the model read it, its special tokens with it."""
    text_tokens: int
    layouts: list[Layout] = field(default_factory=list)
    routes: list[tuple[Hashable, int]] = field(default_factory=list)
    """The routes that the samples of a batch took through the decoder, with the first of them."""
    error: str = ""
    """Why the question was not put to the model: it counts as answered wrongly."""

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        row = asdict(self.prediction)
        row |= {"score": _number(self.prediction.score), "grade": _number(self.prediction.grade)}
        row |= {"index": self.index, "prompt": self.prompt, "text_tokens": self.text_tokens}
        return row | {"layouts": self.layouts, "routes": self.routes, "error": self.error}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Answered:
        """The reverse of :meth:`row`."""
        own = {name: row.pop(name) for name in ("index", "prompt", "text_tokens", "error")}
        layouts = [Layout(*(_tuple(value) for value in one)) for one in row.pop("layouts")]
        routes = [(_tuple(route), count) for route, count in row.pop("routes")]
        scores = {name: math.nan if row[name] is None else row[name] for name in ("score", "grade")}
        prediction = Prediction(**row | {"references": tuple(row["references"])} | scores)
        return cls(prediction=prediction, layouts=layouts, routes=routes, **own)


def _number(value: float) -> float | None:
    """NaN is none of JSON's numbers."""
    return None if math.isnan(value) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


HEAD_WORDS = {
    "computes": "the device or the precision",
    "decoding": "the decoding",
    "limit": "--limit",
    "metric": "the metric",
    "model": "the model's recipe",
    "overrides": "the changes to the recipe",
    "questions": "the files of questions",
    "run": "the run",
    "task": "the task's own file",
    "versions": "an installed version",
    "weights": "the weights",
}
"""What a head has, in a sentence."""


def _from_to(before: Any, now: Any) -> str:
    """Two values of a head, where they are short; of two mappings what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        differ = [key for key in before | now if before.get(key) != now.get(key)]
        before, now = ({key: of.get(key) for key in differ} for of in (before, now))
    words = f" (from {before} to {now})"
    return words if len(words) <= 120 else ""


class PredictionFile:
    """The answers to a task, and the parts of it that processes have written so far."""

    def __init__(self, file: Path, head: Head) -> None:
        self.file, self.head = file, json.loads(_line(head))
        self._counted: dict[Path, tuple[int, int]] = {}
        """Bytes of each part that were looked at, and the batches in them."""

    @property
    def is_complete(self) -> bool:
        """Whether all is answered."""
        return self.file.is_file()

    def answered(self) -> list[Answered]:
        """All answers so far, in the order of the task.

        Raises:
            UserError: a file is of other weights, another task or other decoding.
        """
        by_index: dict[int, Answered] = {}
        for file in [self.file] if self.is_complete else sorted(self._parts()):
            for one in self._read(file):  # an answer, and not why there was none before, in whatever part it is
                if not one.error or one.index not in by_index or by_index[one.index].error:
                    by_index[one.index] = one
        return [by_index[index] for index in sorted(by_index)]

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other commands from answering the same meanwhile.

        Raises:
            UserError: another one does.
        """
        busy = f"another process is answering into {self.file} at this moment: wait for it, or name another --out."
        return one_process(self.file.with_suffix(".lock"), busy=busy)

    def batches(self) -> int:
        """How many there are in the parts; of what was counted before nothing is read again."""
        for file in self._parts():
            read, ends = self._counted.get(file, (0, -1))  # the head is none
            with open(file, "rb") as stream:
                stream.seek(read)
                more = stream.read()
            self._counted[file] = (read + len(more), ends + more.count(b"\n"))
        return sum(max(0, ends) for _, ends in self._counted.values())

    def part(self, rank: int) -> Part:
        """What one process goes on to write: its part, without a line that a kill cut short."""
        return Part(self.file.with_name(f"{self.file.stem}.part-{rank}.jsonl"), self.head)

    def finish(self, answers: Sequence[Answered]) -> None:
        """Write the whole file in one step, and remove the parts."""
        with replacing(self.file) as part, open(part, "wb") as stream:
            stream.write(_line(self.head))
            stream.writelines(_line(one.row()) for one in answers)
        for file in self._parts():
            file.unlink()

    def reopen(self) -> None:
        """Make a part of the whole file, if there is one: what could not be asked is asked again."""
        if self.is_complete:
            self.part(0).add(self.answered())
            self.file.unlink()

    def discard(self) -> None:
        """Remove what was answered so far."""
        for file in [self.file, *self._parts()]:
            file.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return list(self.file.parent.glob(f"{self.file.stem}.part-*.jsonl"))

    def _read(self, file: Path) -> Iterator[Answered]:
        lines = whole_lines(file)
        if not lines:
            return
        head = json.loads(lines[0])
        for key in sorted(head | self.head):
            before, now = head.get(key), self.head.get(key)
            if before != now and not (key == "model" and key not in head):  # answers of before that was kept
                raise UserError(
                    f"{file} holds answers of before {HEAD_WORDS.get(key, key)} changed{_from_to(before, now)}: answer "
                    "anew with --again, or name another --out."
                )
        yield from _answers(file, lines)


class Part:
    """The part of one process: a line is added for each batch."""

    def __init__(self, file: Path, head: Head) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = sum(map(len, whole_lines(file)))
            if kept:
                os.truncate(file, kept)
            else:
                file.write_bytes(_line(head))
        except OSError as error:
            raise UserError(f"{file} cannot be written ({reason(error)}).") from None

    def add(self, answers: Iterable[Answered]) -> None:
        """Write the answers of a batch."""
        with open(self.file, "ab") as stream:
            stream.write(_line([one.row() for one in answers]))


def whole_lines(file: Path) -> list[bytes]:
    """The lines of a file that are whole; none if it is not there."""
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # no other end of a line: answers may hold any of Unicode's
    return [line + b"\n" for line in lines]


def _line(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(errors="replace") + b"\n"


def _answers(file: Path, lines: Sequence[bytes]) -> Iterator[Answered]:
    """Of the lines behind the head: of a whole file one each, of a part a batch."""
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows = json.loads(line)
            yield from [Answered.of(row) for row in (rows if isinstance(rows, list) else [rows])]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}:{number} is no answer ({error}): begin anew with --again.") from None


def read_predictions(file: Path) -> tuple[Head, list[Answered]]:
    """The head and the answers of a whole file."""
    lines = whole_lines(file)
    return json.loads(lines[0]), list(_answers(file, lines))


def routes_of(answers: Iterable[Answered]) -> Counter[Hashable]:
    """How many samples took each route."""
    routes: Counter[Hashable] = Counter()
    for one in answers:
        routes.update(dict(one.routes))
    return routes

"""Answering the questions of a task, a batch at a time, in one process or in several.

question 0 1 2 3 | 4 5 6 7 | 8 9 ...     batches of the task, the same in every run
process    0     |    1    |   0  ...     each answers every n-th, and opens no other's images
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lavi.batch import Layout
from lavi.data.collator import EncodedSample
from lavi.errors import UserError, one_line
from lavi.evaluation.predictions import Answered, Part
from lavi.evaluation.scoring import Expected, prompts_of
from lavi.evaluation.tasks import Task, UnreadableError
from lavi.metrics.base import Prediction
from lavi.model import VisionLanguageModel


class Share(NamedTuple):
    """Which of the batches a process answers."""

    rank: int
    ranks: int


ALL = Share(0, 1)


class Question(NamedTuple):
    """One question of a task; without a prompt where it could not be made."""

    number: int
    about: str
    expected: Expected
    prompt: EncodedSample | None
    error: str = ""


def answer_task(
    model: VisionLanguageModel,
    task: Task,
    folder: Path,
    part: Part,
    *,
    done: set[int],
    device: torch.device,
    batch_size: int,
    limit: int | None = None,
    share: Share = ALL,
    seen: Callable[[int], None] = lambda count: None,
) -> None:
    """Answer what is not answered yet, and add it to the part batch by batch.

    Args:
        folder: of the task's files.
        done: questions that are answered.
        limit: of the task, the first so many questions.
        seen: told after each batch how many questions are answered.
    """
    done = set(done)
    records = islice(task.questions.records(folder), limit)
    for number, batch in enumerate(_batches(enumerate(records), batch_size)):
        left = [(index, record) for index, record in batch if index not in done]
        if number % share.ranks == share.rank and left:
            questions = [_question(model, task, folder, index, record) for index, record in left]
            part.add(_answers(model, questions, task.max_new_tokens, device))
            done.update(index for index, _ in left)
            seen(len(done))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _question(model: VisionLanguageModel, task: Task, folder: Path, index: int, record: Any) -> Question:
    """A question, encoded; one whose image cannot be read, or that is too long, says why."""
    why = ""
    try:
        sample = task.questions.sample(record, folder)
    except UnreadableError as error:
        sample, why = error.sample, one_line(error)
    *_, (prompt, expected) = prompts_of(sample)
    try:
        encoded = None if why else model.processor.encode(prompt, prompt=True)
    except UserError as error:
        encoded, why = None, one_line(error)
    return Question(index, sample.key, expected, encoded, why)


def _answers(
    model: VisionLanguageModel, questions: Sequence[Question], max_new_tokens: int, device: torch.device
) -> list[Answered]:
    model.fusion.route_counts.clear()
    said = dict[int, str]()
    for group in _together(model, questions, max_new_tokens):
        prompts = [question.prompt for question in group if question.prompt is not None]
        tokens = min(max_new_tokens, *(model.room_behind(prompt.length) for prompt in prompts))
        batch = model.processor.collate(prompts, pad_left=True).to(device)
        answers = model.answer(batch, max_new_tokens=tokens)
        said |= {question.number: answer for question, answer in zip(group, answers, strict=True)}
    routes = sorted(model.fusion.route_counts.items(), key=str)
    answered = [_answered(model, question, said.get(question.number, "")) for question in questions]
    if routes:
        answered[0] = replace(answered[0], routes=routes)
    return answered


def _together(
    model: VisionLanguageModel, questions: Sequence[Question], max_new_tokens: int
) -> Iterator[list[Question]]:
    """The questions that go together; one that fills the context is alone, so that it shortens no other answer."""
    room = {q.number: model.room_behind(q.prompt.length) for q in questions if q.prompt is not None}
    if usual := [q for q in questions if room.get(q.number, 0) >= max_new_tokens]:
        yield usual
    yield from ([q] for q in questions if 0 < room.get(q.number, 0) < max_new_tokens)


def _answered(model: VisionLanguageModel, question: Question, answer: str) -> Answered:
    expected, prompt = question.expected, question.prompt
    prediction = Prediction(
        answer, expected.references, question.about, expected.family, expected.level, expected.question
    )
    if prompt is None:
        return Answered(question.number, prediction, "", 0, error=question.error)
    ids = prompt.encoded.ids
    words = str(model.processor.chat.tokenizer.decode(ids))
    layouts: list[Layout] = list(prompt.layouts)
    return Answered(question.number, prediction, words, len(ids), layouts)

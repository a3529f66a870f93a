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

from lavi.data.collator import EncodedSample
from lavi.errors import UserError, one_line
from lavi.evaluation.predictions import Answered, Part
from lavi.evaluation.scoring import LARGEST_WINDOW, Expected, prompts_of, tensor_bytes
from lavi.evaluation.tasks import Task, UnreadableError
from lavi.metrics.base import Prediction
from lavi.model import VisionLanguageModel


class ProcessShare(NamedTuple):
    """Which of the batches a process answers."""

    rank: int
    processes: int


ALL_BATCHES = ProcessShare(0, 1)


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
    share: ProcessShare = ALL_BATCHES,
    report_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Answer what is not answered yet, score it, and add it to the part batch by batch.

    Args:
        folder: of the task's files.
        done: questions that are answered.
        limit: of the task, the first so many questions.
        report_done: told after each batch how many questions are answered.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # a metric that has a model of its own takes it there
    done = set(done)
    records = islice(task.questions.records(folder), limit)
    for number, batch in enumerate(_batches(enumerate(records), batch_size)):
        left = [(index, record) for index, record in batch if index not in done]
        if number % share.processes == share.rank and left:
            part.add(_answers(model, task, (_question(model, task, folder, *one) for one in left), device))
            done.update(index for index, _ in left)
            report_done(len(done))


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
    model: VisionLanguageModel, task: Task, questions: Iterable[Question], device: torch.device
) -> list[Answered]:
    """The answers to a batch, in its order."""
    answered: list[Answered] = []
    model.fusion.route_counts.clear()
    for group in _prompt_groups(model, questions, task.max_new_tokens):
        said = iter(_say(model, [q.prompt for q in group if q.prompt is not None], task.max_new_tokens, device))
        answered += [
            _answered(model, task, question, "" if question.prompt is None else next(said)) for question in group
        ]
    answered.sort(key=lambda one: one.index)
    if routes := sorted(model.fusion.route_counts.items(), key=str):
        first = next(number for number, one in enumerate(answered) if not one.error)  # errors are asked again
        answered[first] = replace(answered[first], routes=routes)
    return answered


def _prompt_groups(
    model: VisionLanguageModel, questions: Iterable[Question], max_new_tokens: int
) -> Iterator[list[Question]]:
    """The questions that the model gets at a time, as they fit into memory.

    One whose answer has less room in the context than the others' is alone: it shortens none.
    """
    waiting: list[Question] = []
    size = 0
    for question in questions:
        if question.prompt is not None and model.room_behind(question.prompt.length) < max_new_tokens:
            yield [question]
            continue
        own = 0 if question.prompt is None else tensor_bytes(question.prompt)
        if waiting and size + own > LARGEST_WINDOW:
            yield waiting
            waiting, size = [], 0
        waiting.append(question)
        size += own
    if waiting:
        yield waiting


def _say(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], max_new_tokens: int, device: torch.device
) -> list[str]:
    if not prompts:
        return []
    tokens = min(max_new_tokens, *(model.room_behind(prompt.length) for prompt in prompts))
    batch = model.processor.collate(list(prompts), pad_left=True).to(device)
    answers: list[str] = model.answer(batch, max_new_tokens=tokens)
    return answers


def _answered(model: VisionLanguageModel, task: Task, question: Question, answer: str) -> Answered:
    expected, prompt = question.expected, question.prompt
    prediction = task.metric.scored(
        Prediction(answer, expected.references, question.about, expected.family, expected.level, expected.question)
    )
    if prompt is None:
        return Answered(question.number, prediction, "", 0, error=question.error)
    words = str(model.processor.chat.tokenizer.decode(prompt.encoded.ids))
    return Answered(question.number, prediction, words, len(prompt.encoded.ids), list(prompt.layouts))

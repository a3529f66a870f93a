"""Runs scored on benchmarks, side by side: what ``python -m lavi.evaluate --tasks`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from lavi.checkpoints.trained_weights import TRAINED
from lavi.checkpoints.weight_files import versions
from lavi.config.files import sha256_of
from lavi.efficiency.comparison import rows_over_samples, uncounted_note
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.measure import Measurement, measure
from lavi.efficiency.record import Record, check_writable, write_records
from lavi.errors import UserError
from lavi.evaluation.answer_tasks import ProcessShare, answer_task
from lavi.evaluation.compare_runs import (
    CountedRun,
    as_deployed,
    flops_record,
    open_run,
    run_name,
    run_names,
    twin_record,
)
from lavi.evaluation.intervals import Difference, paired_difference
from lavi.evaluation.predictions import Answered, PredictionFile, routes_of
from lavi.evaluation.scoring import PromptSizes, metric_intervals
from lavi.evaluation.tasks import Task
from lavi.metrics.base import Prediction
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.report import console, progress, table, track

RECORDS = "tasks.jsonl"


@dataclass(frozen=True)
class Settings:
    """How tasks are answered.

    Args:
        data: the folder with a folder of each task.
        out: of the predictions; None: ``tasks`` in each run folder.
        limit: questions of each task; None: all.
        processes: that answer, each with a model of its own; on GPUs one each.
        again: answer anew what was answered.
        timing: also time a typical prompt of each task.
    """

    data: Path
    out: Path | None
    device: torch.device
    overrides: tuple[str, ...] = ()
    trust: bool = False
    limit: int | None = None
    batch_size: int = 32
    processes: int = 1
    again: bool = False
    timing: bool = True


@dataclass(frozen=True, kw_only=True)
class ScoredTask(CountedRun):
    """What a run answered to a task, scored, and what that costs."""

    run: str
    task: Task
    predictions: list[Prediction]


def run_tasks(runs: Sequence[Path], names: Sequence[str], settings: Settings) -> list[Record]:
    """Answer tasks with each run, score the answers, count and time, and print a table; records are kept.

    Raises:
        UserError: no such run or task, its files are missing, or a file cannot be written.
    """
    tasks = [Task.load(name) for name in names]
    called = [task.name for task in tasks]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise UserError(f"two tasks are called '{twice[0]}': their answers would lie in one file.")
    for task in tasks:  # before a model is loaded
        next(iter(task.questions.records(settings.data / task.name)))
    names = run_names(runs)
    folders = [_folder_of(run, name, settings.out) for run, name in zip(runs, names, strict=True)]
    scored: list[list[ScoredTask]] = [[] for _ in runs]
    try:
        for run, name, folder, of_run in zip(runs, names, folders, scored, strict=True):
            for one in _score_run(run, name, folder, tasks, settings):
                of_run.append(one)
        if settings.timing:
            for of_task in zip(*scored, strict=True):
                timing = partial(track, description=f"{of_task[0].task.name}: timing in turns")
                measure([one.measurement for one in of_task], device=settings.device, track=timing)
    finally:  # what was scored is kept, whatever the next task or the timing comes to
        for folder, of_run in zip(folders, scored, strict=True):
            write_records([one.record for one in of_run], folder / RECORDS)
    for of_task in zip(*scored, strict=True):
        _print_table(of_task)
    return [one.record for of_run in scored for one in of_run]


def _folder_of(run: Path, name: str, out: Path | None) -> Path:
    """Where the predictions of a run lie.

    Raises:
        UserError: a recipe, which has no folder, and no ``out``.
    """
    if out is not None:
        return out / name
    if not run.is_dir():
        raise UserError(f"{run} is a recipe and has no folder: say by --out where its answers belong.")
    return run / "tasks"


# --- one run, one task ------------------------------------------------------------------------------------------------


def _score_run(run: Path, name: str, folder: Path, tasks: Sequence[Task], settings: Settings) -> Iterator[ScoredTask]:
    """All tasks of a run; its model is gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / RECORDS)
    recipe, model = open_run(run, overrides=list(settings.overrides), trust=settings.trust)
    for task in tasks:
        yield _score(run, name, recipe, model, task, folder, settings)


def _score(
    run: Path, name: str, recipe: Recipe, model: VisionLanguageModel, task: Task, folder: Path, settings: Settings
) -> ScoredTask:
    kept = PredictionFile(folder / f"{task.name}.jsonl", _head(run, recipe, model, task, settings))
    with kept.locked():
        if settings.again:
            kept.discard()
        answers = _answers(kept, run, model, task, settings)
        metric = task.metric
        metric.reset()
        metric.update(one.prediction for one in answers)
        predictions = metric.predictions()
        if not kept.is_complete:
            kept.finish([replace(a, prediction=p) for a, p in zip(answers, predictions, strict=True)])
    sizes, routes = _sizes(answers), routes_of(answers)
    typical = sizes.typical(model.vision.tokens)
    counted, _ = as_deployed(recipe, model, settings.device)
    record = flops_record(recipe, counted, typical, sizes.prompts, routes)
    record.accuracy, record.accuracy_intervals = metric.compute(), metric_intervals(metric)
    unreadable = [one.error for one in answers if one.error]
    record.knobs |= {"run": name, "task": task.name, "metric": metric.name, "headline": metric.headline}
    record.knobs |= {"answers": len(answers), "unreadable": len(unreadable), "max_new_tokens": task.max_new_tokens}
    console().print(_sentence(record, unreadable))
    usual = max(routes, key=routes.__getitem__, default=None)
    return ScoredTask(
        run=name,
        task=task,
        predictions=predictions,
        measurement=Measurement(record, typical, partial(_opened_again, run, settings), usual),
        twin=twin_record(recipe, typical, sizes.prompts),
    )


def _opened_again(run: Path, settings: Settings) -> VisionLanguageModel:
    """A run's model, when it is to be timed: until then only one model is held at a time."""
    recipe, model = open_run(run, overrides=list(settings.overrides), trust=settings.trust)
    return as_deployed(recipe, model, settings.device)[1]()


def _head(run: Path, recipe: Recipe, model: VisionLanguageModel, task: Task, settings: Settings) -> dict[str, Any]:
    """What answers depend on; another of it, and they are not of one go."""
    weights = run / TRAINED
    return {
        "task": task.written or task.name,
        "metric": task.metric.name,
        "run": run_name(run),
        "weights": sha256_of(weights) if weights.is_file() else recipe.settings["model"],
        "model": recipe.settings["model"],
        "overrides": list(settings.overrides),
        "decoding": {"max_new_tokens": task.max_new_tokens, "do_sample": False, "repetition_penalty": 1.0},
        "computes": [settings.device.type, str(model.language.hf.dtype).removeprefix("torch.")],
        "questions": task.questions.fingerprint(settings.data / task.name),
        "limit": settings.limit,
        "versions": versions(),
    }


def _answers(
    kept: PredictionFile, run: Path, model: VisionLanguageModel, task: Task, settings: Settings
) -> list[Answered]:
    """All answers: those of before, and what was left to answer."""
    before = kept.answered()
    if kept.is_complete and not any(one.error for one in before):
        console().print(f"{run_name(run)}, {task.name}: answered before ({kept.file})")
        return before
    kept.reopen()
    folder = settings.data / task.name
    total = task.questions.count(folder, settings.limit)
    done = {one.index for one in before if not one.error}  # a picture that was missing may be there now
    with progress(f"{run_name(run)}, {task.name}: answering", total=total, done=len(done)) as report_done:
        if settings.processes == 1:
            model.to(settings.device)
            answer_task(
                model,
                task,
                folder,
                kept.part(0),
                done=done,
                device=settings.device,
                batch_size=settings.batch_size,
                limit=settings.limit,
                report_done=report_done,
            )
        elif len(done) < total:
            for batches in _answer_in_processes(run, task, kept, done, settings):
                report_done(min(total, len(done) + settings.batch_size * batches))
    return kept.answered()


def _answer_in_processes(
    run: Path, task: Task, kept: PredictionFile, done: set[int], settings: Settings
) -> Iterator[int]:
    """Answer what is left in several processes; gives each second how many batches there are more.

    Raises:
        UserError: one of them met it.
    """
    earlier, mistakes = kept.batches(), processes.get_context("spawn").SimpleQueue()
    start = processes.spawn  # type: ignore[attr-defined]
    arguments = (run, task, kept, done, settings, mistakes)
    started = start(_answer_share, arguments, nprocs=settings.processes, join=False)
    try:
        while not started.join(timeout=1.0):
            yield kept.batches() - earlier
    except processes.ProcessRaisedException:
        if mistakes.empty():
            raise
        raise UserError(mistakes.get()) from None


def _answer_share(
    rank: int, run: Path, task: Task, kept: PredictionFile, done: set[int], settings: Settings, mistakes: Any
) -> None:
    """In a process of its own, which has no other way to say what a user can mend."""
    try:
        _answer_own_share(rank, run, task, kept, done, settings)
    except UserError as error:
        mistakes.put(" ".join([str(error), *getattr(error, "__notes__", ())]))
        raise


def _answer_own_share(
    rank: int, run: Path, task: Task, kept: PredictionFile, done: set[int], settings: Settings
) -> None:
    device = settings.device
    if device.type == "cuda":
        first = device.index or 0  # of the GPU that was named and those behind it
        device = torch.device("cuda", (first + rank) % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
    _, model = open_run(run, overrides=list(settings.overrides), trust=settings.trust)
    answer_task(
        model.to(device),
        task,
        settings.data / task.name,
        kept.part(rank),
        done=done,
        device=device,
        batch_size=settings.batch_size,
        limit=settings.limit,
        share=ProcessShare(rank, settings.processes),
    )


def _sizes(answers: Sequence[Answered]) -> PromptSizes:
    sizes = PromptSizes()
    for one in answers:
        if not one.error:
            sizes.note(one.text_tokens, one.layouts)
    if not sizes.text:
        raise UserError(f"not one question could be asked: {answers[0].error}")
    return sizes


# --- tables -----------------------------------------------------------------------------------------------------------


def _sentence(record: Record, unreadable: Sequence[str]) -> str:
    name, score = record.knobs["headline"], record.accuracy[record.knobs["headline"]]
    low, high = record.accuracy_intervals[name]
    called = record.knobs["metric"] if name == "all" else f"{record.knobs['metric']}, {name}"
    text = f"{record.knobs['run']}, {record.knobs['task']}: {called} {score:.1f} ({low:.1f}-{high:.1f})"
    text += f" of {record.knobs['answers']} questions"
    if unreadable:
        text += f"\n  {len(unreadable)} could not be asked and count as wrong, the first of them: {unreadable[0]}"
    return text


def _print_table(runs: Sequence[ScoredTask]) -> None:
    columns, rows = task_table(runs)
    task, answers = runs[0].task, runs[0].record.knobs["answers"]
    title = (
        f"{task.name}: {answers} questions; answers of at most {task.max_new_tokens} tokens; {runs[0].record.device}"
    )
    console().print(table(title, columns, rows))
    for one in runs:
        if note := uncounted_note(one.run, one.record, one.twin):
            console().print(note)
    console().print(NOTE)


def task_table(runs: Sequence[ScoredTask]) -> tuple[list[str], list[list[str]]]:
    """One column a run: its figures, how sure the difference to the first is, and what it costs."""
    records = [one.record for one in runs]
    rows = [[name, *(_with_interval(record, name) for record in records)] for name in records[0].accuracy]
    if len(runs) > 1:
        first = runs[0].predictions
        differences = [paired_difference(one.predictions, first) for one in runs[1:]]
        name = f"mean score, points above {runs[0].run} (95 % interval; p)"
        rows.append([name, "-", *map(_difference, differences)])
    rows += [[name, *cells] for name, cells in rows_over_samples(records, [one.twin for one in runs])]
    for stage in ("vision_encoder", "prefill", "decode"):
        if any(stage in record.milliseconds for record in records):
            cells = [f"{r.milliseconds[stage][0]:.2f}" if stage in r.milliseconds else "-" for r in records]
            rows.append([f"ms {stage.replace('_', ' ')}, median", *cells])
    return ["", *(one.run for one in runs)], rows


def _with_interval(record: Record, name: str) -> str:
    if name not in record.accuracy:
        return "-"
    low, high = record.accuracy_intervals[name]
    return f"{record.accuracy[name]:.1f} ({low:.1f}-{high:.1f})"


def _difference(difference: Difference) -> str:
    low, high = difference.interval
    return f"{difference.mean:+.1f} ({low:+.1f} to {high:+.1f}; {difference.p:.3f})"

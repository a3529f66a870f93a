"""Runs scored on their test split and timed in one process, side by side: what ``python -m lavi.evaluate`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavi.checkpoints.feature_cache import check_feature_caches
from lavi.checkpoints.model_folder import build
from lavi.checkpoints.published_vlm import is_released
from lavi.checkpoints.run_folder import load_run
from lavi.config.paths import home_path, unique_names
from lavi.efficiency.comparison import NOT_COUNTED, side_by_side, uncounted_note
from lavi.efficiency.estimate import NOTE
from lavi.efficiency.figures import waiting_note
from lavi.efficiency.measure import (
    Measurement,
    build_on,
    concat_twin,
    count,
    measure,
    method_name,
    note_mean_flops,
    uncounted,
)
from lavi.efficiency.record import Record, check_writable, write_records
from lavi.efficiency.scenario import Prompt, Scenario
from lavi.errors import UserError
from lavi.evaluation.perplexity import compare_perplexity, read_texts
from lavi.evaluation.scoring import USUAL_LIMITS, AnswerLimits, Scores, evaluate
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.report import console, table, track

RECORDS = "evaluation.jsonl"
"""The file of a run folder that an evaluation is appended to."""

RECIPES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class CountedRun:
    """What is to be timed of a run, and the count of its concatenation twin on the same prompt."""

    measurement: Measurement
    twin: Record

    @property
    def record(self) -> Record:
        return self.measurement.record


@dataclass(frozen=True, kw_only=True)
class ScoredRun(CountedRun):
    """A run's scores on its own test split, and what they cost."""

    folder: Path
    scores: Scores
    test: Any
    """The test split, as the recipe names it."""

    @property
    def asked(self) -> dict[str, str]:
        """What the run was asked, as far as it is known."""
        lies_here = isinstance(self.test, str) and home_path(self.test).exists()
        return {
            "test split": str(home_path(self.test).resolve() if lies_here else self.test),
            "samples": str(self.scores.samples),
            "answers": str(self.scores.answers),
            "a typical prompt": _said(self.scores.typical),
        }


def compare_runs(
    folders: Sequence[Path],
    *,
    overrides: Sequence[str],
    trust: bool,
    limit: int | None,
    device: torch.device,
    out: Path | None,
    text: Path | None = None,
    noise: Sequence[float] = (),
    limits: AnswerLimits = USUAL_LIMITS,
) -> list[Record]:
    """Score runs one after the other, time them in turns, write their records and print the comparison.

    Args:
        overrides: changes to the runs' recipes.
        trust: build whatever the runs' recipes name.
        limit: score at most this many test samples.
        out: a file of JSON lines that gets all records besides the run folders.
        text: a file of texts; the language models' perplexity on them is said, before training and after.
        noise: deviations of noise on the images, a control each.

    Raises:
        UserError: no such run, a run that is named twice, no test data, not one question, or a file that cannot be
            written.
    """
    names = run_names(folders)
    for file in [*([out] if out else []), *(folder / RECORDS for folder in folders if folder.is_dir())]:
        check_writable(file)
    texts = read_texts(text) if text else []
    score = partial(score_run, overrides=overrides, trust=trust, limit=limit, device=device, texts=texts)
    named = zip(folders, names, strict=True)
    runs = [score(folder, name=name, noise=noise, limits=limits) for folder, name in named]
    records = [run.record for run in runs]
    try:
        measure([run.measurement for run in runs], device=device, track=partial(track, description="timing in turns"))
    finally:  # what was scored is kept, whatever the timing comes to
        for run in runs:
            if run.folder.is_dir():  # a recipe has none
                write_records([run.record], run.folder / RECORDS)
        if out:
            write_records(records, out)
    _print_comparison(runs)
    return records


def score_run(
    folder: Path,
    *,
    overrides: Sequence[str],
    trust: bool,
    limit: int | None,
    device: torch.device,
    name: str | None = None,
    texts: Sequence[str] = (),
    noise: Sequence[float] = (),
    limits: AnswerLimits = USUAL_LIMITS,
) -> ScoredRun:
    """Score a run on its test split, count the FLOPs of its typical prompt, and print one line of both.

    Args:
        folder: of the run; or a recipe, whose model is scored as it is built: a released one.
        name: what the run is called; None: as its folder.
    """
    name = name or run_name(folder)
    recipe, model = open_run(folder, overrides=list(overrides), trust=trust)
    model.to(device)
    data = recipe.build("data", processor=model.processor)
    check_feature_caches(model, data, ["test"])
    samples = data.sample_stream("test", limit=limit)
    watched = track(samples, f"{name}: answering", total=samples.expected)
    scores = evaluate(model, watched, metric=data.metric, device=device, noise=noise, limits=limits)
    counted, build_timed = as_deployed(recipe, model, device)
    record = flops_record(recipe, counted, scores.typical, scores.prompts, scores.route_counts)
    record.accuracy, record.controls = scores.accuracy, scores.controls
    record.accuracy_intervals, record.control_intervals = scores.accuracy_intervals, scores.control_intervals
    if texts:
        record.knobs["perplexity"] = asdict(compare_perplexity(recipe, model, list(texts)))
    record.knobs |= {"run": name, "test_samples": scores.samples, "answers": scores.answers}
    record.knobs["metric"] = scores.metric
    if data.metric.wants_whole_answers:
        record.knobs["max_new_tokens"] = limits.max_new_tokens
    if left_out := samples.left_out + scores.left_out:
        record.knobs["left_out"] = dict(left_out)
    usual = max(scores.route_counts, key=scores.route_counts.__getitem__, default=None)
    if usual is not None:
        record.knobs["timed route"] = str(usual)
    console().print(f"{folder}: {scores}")
    for cause, number in left_out.items():
        console().print(f"  left out: {number} x {cause}")
    return ScoredRun(
        folder=folder,
        scores=scores,
        test=recipe.settings["data"].get("test"),
        measurement=Measurement(record, scores.typical, build_timed, usual),
        twin=twin_record(recipe, scores.typical, scores.prompts),
    )


def as_deployed(
    recipe: Recipe, model: VisionLanguageModel, device: torch.device
) -> tuple[VisionLanguageModel, Callable[[], VisionLanguageModel]]:
    """The model to count, and what gives the one to time: where adapters can be merged, without them.

    What merged weights cost is what the recipe costs without adapters, whatever the weights are. A model that cannot be
    built without weights (BioGPT) keeps its adapters.
    """
    as_it_is = model, partial(model.to, device)
    if not model.language.adapters or model.language.quantization is not None:
        return as_it_is
    try:
        return build_on(recipe, "meta"), partial(build_on, recipe, device)
    except UserError:
        return as_it_is


def flops_record(
    recipe: Recipe,
    model: VisionLanguageModel,
    typical: Scenario,
    prompts: Counter[Prompt],
    routes: Mapping[Hashable, int] | None = None,
) -> Record:
    """The FLOPs of a typical prompt and their mean over prompts; none, and why, of a model that cannot be counted.

    Args:
        model: may be on meta.
        routes: how many samples took each route through the decoder.
    """
    try:
        record = count(recipe, model, typical, routes)
        note_mean_flops(record, model, prompts, routes)
    except UserError as error:
        record = uncounted(recipe, model, typical)
        record.knobs[NOT_COUNTED] = str(error)
    return record


def twin_record(recipe: Recipe, typical: Scenario, prompts: Counter[Prompt]) -> Record:
    """The FLOPs of the concatenation twin on the same prompts; none, and why, where there can be no such model."""
    twin = concat_twin(recipe)
    try:
        model = build_on(twin, "meta")
    except UserError as error:
        return Record(method_name(twin), typical.text, 0, 0, 0, baseline=True, knobs={NOT_COUNTED: str(error)})
    return flops_record(twin, model, typical, prompts)


def run_name(folder: Path) -> str:
    """What a run, or a recipe, is called in tables."""
    return folder.stem if folder.suffix in RECIPES else folder.name


def run_names(runs: Sequence[Path]) -> list[str]:
    """What runs are called; those of one name are told apart by the folders above them.

    Raises:
        UserError: a run is named twice.
    """
    return unique_names([run.resolve().parent / run_name(run) for run in runs])


def open_run(folder: Path, *, overrides: list[str], trust: bool) -> tuple[Recipe, VisionLanguageModel]:
    """The recipe and the model of a run folder, or of the recipe of a released model.

    Raises:
        UserError: it is neither.
    """
    if folder.suffix not in RECIPES:
        return load_run(folder, overrides=overrides, trust=trust)
    recipe = Recipe.load(folder, overrides)
    if not is_released(recipe):
        raise UserError(f"{folder} is a recipe whose model is not trained: give the run folder that lavi.fit wrote.")
    return recipe, build(recipe).eval()


def _print_comparison(runs: Sequence[ScoredRun]) -> None:
    records, last = [run.record for run in runs], runs[-1]
    title = f"{last.scores.samples} test samples; one prompt of {_said(last.scores.typical)}"
    if any(run.asked != last.asked for run in runs):
        title = "each run on prompts of its own"
    columns, rows = side_by_side(records, [run.twin for run in runs])
    console().print(table(f"{title}; 1 multiply-add = 2 FLOPs; {records[0].device}", columns, rows))
    console().print(" ".join(filter(None, [NOTE, waiting_note(records)])))
    names = columns[1:]
    uncounted = [uncounted_note(name, run.record, run.twin) for name, run in zip(names, runs, strict=True)]
    for line in filter(None, [asked_otherwise(names, runs), *uncounted]):
        console().print(line, soft_wrap=True)


def _said(typical: Scenario) -> str:
    """A prompt in words."""
    return f"{typical.text} text tokens and {f'an image of {typical}' if typical.image else typical}"


def asked_otherwise(names: Sequence[str], runs: Sequence[ScoredRun]) -> str:
    """A line on what the runs were asked, where that was not the same; empty where it was.

    Args:
        names: of the runs, as their columns are called.
    """
    told = []
    for what in runs[0].asked:
        of_each = [run.asked[what] for run in runs]
        if len(set(of_each)) > 1:
            named = [f"{value} ({name})" for value, name in zip(of_each, names, strict=True)]
            told.append(f"{what}: {', '.join(named)}")
    if not told and any(run.scores.prompts != runs[0].scores.prompts for run in runs):
        told = ["prompts of other sizes"]
    return f"The runs were not asked the same; {'; '.join(told)}." if told else ""

"""VISOR's offline steps: which configurations are viable, and which one each training sample needs.

Both ask the same of a trained run: with this configuration, which answers are right, under teacher forcing? Both write
as they go, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from lavi.batch import Batch
from lavi.checkpoints.trained_weights import TRAINED
from lavi.config.files import sha256_of
from lavi.errors import UserError
from lavi.language.token_scores import TokenScores
from lavi.metrics.teacher_forcing import answer_probabilities, correct_under_teacher_forcing
from lavi.model import VisionLanguageModel
from lavi.report import track
from lavi.visor.files import Configuration, read_json
from lavi.visor.fusion import VisorFusion


def visor_of(model: VisionLanguageModel) -> VisorFusion:
    """The fusion of a run that can be searched.

    Raises:
        UserError: it is none of VISOR's, has no optional layers, or routes already.
    """
    fusion = model.fusion
    if not isinstance(fusion, VisorFusion) or not fusion.refining:
        raise UserError(
            f"this run's fusion ({type(fusion).__name__}) has no optional layers: train a recipe of VISOR's."
        )
    if fusion.router is not None:
        raise UserError("this run has a router already: search and label the run it started from.")
    return fusion


def every_configuration(optional: Sequence[int], most: int) -> list[Configuration]:
    """All sets of the optional layers, from the cheapest; of more than ``most`` a draw, of each size about as many.

    None of them, all of them and each by itself are always in it, as far as ``most`` goes.
    """
    if len(optional) < 31 and 2 ** len(optional) <= most:
        sizes = range(len(optional) + 1)
        return [subset for size in sizes for subset in itertools.combinations(optional, size)]
    draw = random.Random(0)
    configurations: set[Configuration] = {(), tuple(optional), *((layer,) for layer in optional[: most - 2])}
    while len(configurations) < most:
        configurations.add(tuple(sorted(draw.sample(list(optional), draw.randint(1, len(optional))))))
    return sorted(configurations, key=lambda one: (len(one), one))


def answer_correct(
    model: VisionLanguageModel, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[str, list[bool]]]:
    """For each sample its key, and which of its answers are right."""
    return _of_each_answer(correct_under_teacher_forcing, model, batches, device)


def answer_probability(
    model: VisionLanguageModel, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[str, list[float]]]:
    """For each sample its key, and the probability of each of its true answers, under teacher forcing."""
    return _of_each_answer(answer_probabilities, model, batches, device)


Value = TypeVar("Value")


@torch.no_grad()
def _of_each_answer(
    judge: Callable[[TokenScores, Batch], list[Value]],
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    device: torch.device,
) -> Iterator[tuple[str, list[Value]]]:
    """For each sample its key, and what ``judge`` says of each of its answers."""
    for batch in batches:
        rows: list[list[Value]] = [[] for _ in batch.keys]
        for value, answer in zip(judge(model.token_scores(batch.to(device)), batch), batch.answers, strict=True):
            rows[answer.row].append(value)
        yield from zip(batch.keys, rows, strict=True)


def search(
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    out: Path,
    *,
    about: dict[str, Any],
    keep: float,
    most: int,
    device: torch.device,
) -> dict[str, Any]:
    """Score the configurations of a run; viable are those that keep a share ``keep`` of the full one's accuracy.

    The data are read once, and ``out`` is written after each batch: a search that was stopped goes on behind it.

    Args:
        about: what the scores are of; a file of other scores is left as it is.

    Returns:
        What ``out`` holds: ``viable``, a list of layers each, ``scores``, percent right by configuration, and the
        number of ``samples`` and ``answers`` that they are of.
    """
    fusion = visor_of(model)
    configurations = every_configuration(fusion.refining, most)
    names = [_name(configuration) for configuration in configurations]
    about = about | {"refining": fusion.refining, "most": most}
    result: dict[str, Any] = {"about": about, "batches": 0, "samples": 0, "answers": 0}
    result["right"] = dict.fromkeys(names, 0)
    if out.exists():
        result = read_json(out, "the scores of a search")
    _same(result.get("about"), about, out)
    if "scores" not in result:
        for number, batch in enumerate(track(batches, description="scoring configurations"), start=1):
            if number <= result["batches"]:
                continue
            for name, configuration in zip(names, configurations, strict=True):
                with fusion.force_route(configuration):
                    result["right"][name] += sum(sum(answers) for _, answers in answer_correct(model, [batch], device))
            result["batches"] = number
            result["samples"] += len(batch)
            result["answers"] += len(batch.answers)
            _write(result, out)
        result["scores"] = {name: 100 * count / max(1, result["answers"]) for name, count in result["right"].items()}
    full = result["scores"][_name(tuple(fusion.refining))]
    result["viable"] = [list(one) for one in configurations if result["scores"][_name(one)] >= keep * full]
    _write(result, out)
    return result


def label(
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    viable: Sequence[Sequence[int]],
    out: Path,
    *,
    about: dict[str, Any],
    keep: float,
    by: Literal["right", "likely"] = "right",
    device: torch.device,
) -> dict[Configuration, int]:
    """Write for each sample the cheapest configuration that is ``keep`` times as good as the full one.

    ``right``, by right answers, is the paper's rule, with 99 %. It takes a lucky guess for knowledge: where there are
    two answers, for half of the samples that needed more. ``likely``, by the probability of the right answer, does not
    (chosen here). Samples that ``out`` holds already are left out.

    Args:
        about: what the labels are of; a file of other labels is left as it is.

    Returns:
        How many samples need each configuration.

    Raises:
        UserError: a configuration that this run cannot have, a conversation of several questions, or two samples of
            one key.
    """
    fusion = visor_of(model)
    order = sorted({fusion.configuration_of(one) for one in viable}, key=lambda one: (len(one), one))
    full = tuple(fusion.refining)
    about = about | {"configurations": [list(one) for one in order], "keep": keep, "by": by}
    judge = answer_correct if by == "right" else answer_probability
    done, met = _labelled(out, about), set[str]()
    with open(out, "a") as stream:
        for batch in track(batches, description="labelling"):
            if len({answer.row for answer in batch.answers}) < len(batch.answers):
                raise UserError(
                    "a label is for one question, and these conversations have several: give data of one each (for the "
                    "scenes: python -m datamodules.scenes --turns 1, and data.train=THAT)."
                )
            if twice := [key for key in batch.keys if key in met or batch.keys.count(key) > 1]:
                raise UserError(
                    f"two samples have the key '{twice[0]}', by which their labels are told apart: pack all data into "
                    "one folder, and name that as data.train."
                )
            met.update(batch.keys)
            if done.keys() >= set(batch.keys):
                continue
            shares: dict[Configuration, list[float]] = {}
            for configuration in {full, *order}:
                with fusion.force_route(configuration):
                    shares[configuration] = [sum(row) / max(1, len(row)) for _, row in judge(model, [batch], device)]
            for row, key in enumerate(batch.keys):
                if key not in done:
                    enough = keep * shares[full][row]
                    done[key] = next((one for one in order if shares[one][row] >= enough), order[-1])
                    line = {"key": key, "configuration": list(done[key]), "tokens": batch.text_lengths[row]}
                    stream.write(json.dumps(line) + "\n")
            stream.flush()
    return {one: sum(chosen == one for chosen in done.values()) for one in order}


def _labelled(out: Path, about: dict[str, Any]) -> dict[str, Configuration]:
    """What a file of labels holds already; a line that was cut off by a kill is taken away."""
    if not out.exists() or not (text := out.read_text()):
        out.write_text(json.dumps({"about": about}) + "\n")
        return {}
    whole = text[: text.rfind("\n") + 1]
    try:
        header, *lines = [json.loads(line) for line in whole.splitlines()]
        _same(header.get("about"), about, out)
    except (ValueError, AttributeError):
        raise UserError(f"{out} holds no labels, and is left as it is: choose another --out.") from None
    if whole != text:
        out.write_text(whole)
    return {record["key"]: tuple(record["configuration"]) for record in lines}


def fingerprint(run: Path) -> str:
    """Of the weights that a run trained."""
    return sha256_of(run / TRAINED)[:16]


def _name(configuration: Configuration) -> str:
    return ",".join(map(str, configuration)) or "none"


def _same(result: dict[str, Any] | None, about: dict[str, Any], out: Path) -> None:
    result = result or {}
    if other := [key for key in about if result.get(key) != about[key]]:
        raise UserError(f"{out} was made with another {', '.join(other)}: choose another --out, or remove it.")


def _write(result: dict[str, Any], out: Path) -> None:
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, out)

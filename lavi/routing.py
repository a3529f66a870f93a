"""VISOR's offline steps: which configurations are viable, and which one each training sample needs.

Both ask the same of a trained run: with this configuration, which answers are right, under teacher forcing? Both write
as they go, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from lavi.batch import Batch
from lavi.errors import UserError
from lavi.fusion.visor import Configuration, VisorFusion
from lavi.metrics.answers import right_under_teacher_forcing
from lavi.model import VisionLanguageModel


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
    """All sets of the optional layers, from the cheapest; of more than ``most`` none, all, and a draw of the others."""
    if len(optional) < 31 and 2 ** len(optional) <= most:
        sizes = range(len(optional) + 1)
        return [subset for size in sizes for subset in itertools.combinations(optional, size)]
    draw = random.Random(0)
    found: set[Configuration] = {(), tuple(optional)}
    while len(found) < most:
        found.add(tuple(layer for layer in optional if draw.random() < 0.5))
    return sorted(found, key=lambda one: (len(one), one))


@torch.no_grad()
def right(
    model: VisionLanguageModel, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[str, list[bool]]]:
    """For each sample its key, and which of its answers are right."""
    for batch in batches:
        said = right_under_teacher_forcing(model(batch.to(device)), batch)
        rows: list[list[bool]] = [[] for _ in batch.keys]
        for is_right, answer in zip(said, batch.answers, strict=True):
            rows[answer.row].append(is_right)
        yield from zip(batch.keys, rows, strict=True)


def search(
    model: VisionLanguageModel, batches: Sequence[Batch], out: Path, *, keep: float, most: int, device: torch.device
) -> dict[str, Any]:
    """Score the configurations of a run; viable are those that keep a share ``keep`` of the full one's accuracy.

    Returns:
        What ``out`` holds: ``viable``, a list of layers each, and ``scores``, percent right by configuration.
    """
    fusion = visor_of(model)
    configurations = every_configuration(fusion.refining, most)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"scores": {}}
    _same(found, {"refining": fusion.refining, "samples": sum(map(len, batches))}, out)
    for configuration in track(configurations, description="scoring configurations", transient=True):
        name = _name(configuration)
        if name not in found["scores"]:
            with fusion.going(configuration):
                answers = [one for _, some in right(model, batches, device) for one in some]
            found["scores"][name] = 100 * sum(answers) / max(1, len(answers))
            _write(found, out)
    full = found["scores"][_name(tuple(fusion.refining))]
    found["viable"] = [list(one) for one in configurations if found["scores"][_name(one)] >= keep * full]
    _write(found, out)
    return found


def label(
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    viable: Sequence[Configuration],
    out: Path,
    *,
    keep: float,
    device: torch.device,
    total: int | None = None,
) -> dict[Configuration, int]:
    """Write for each sample the cheapest configuration that has a share ``keep`` of the full one's right answers.

    The paper's rule, with 99 %. Samples that ``out`` holds already are left out.

    Returns:
        How many samples need each configuration.
    """
    fusion = visor_of(model)
    order = sorted(viable, key=lambda one: (len(one), one))
    full = tuple(fusion.refining)
    counts: dict[Configuration, int] = dict.fromkeys(order, 0)
    done = set()
    if out.exists():
        for made in map(json.loads, out.read_text().splitlines()):
            done.add(made["key"])
            if (configuration := tuple(made["configuration"])) not in counts:
                raise UserError(f"{out} was made with other configurations: choose another --out.")
            counts[configuration] += 1
    with open(out, "a") as stream:
        for batch in track(batches, description="labelling", total=total, transient=True):
            if done.issuperset(batch.keys):
                continue
            shares: dict[Configuration, list[float]] = {}
            for configuration in {full, *order}:
                with fusion.going(configuration):
                    shares[configuration] = [sum(row) / max(1, len(row)) for _, row in right(model, [batch], device)]
            for row, key in enumerate(batch.keys):
                if key in done:
                    continue
                enough = keep * shares[full][row]
                chosen = next((one for one in order if shares[one][row] >= enough), order[-1])
                stream.write(json.dumps({"key": key, "configuration": list(chosen)}) + "\n")
                counts[chosen] += 1
                done.add(key)
            stream.flush()
    return counts


def read_viable(file: Path) -> list[Configuration]:
    """The configurations that :func:`search` found.

    Raises:
        UserError: there is no such file, or it is not finished.
    """
    if not file.exists():
        raise UserError(f"there is no file {file}: make it with python -m lavi.visor search.")
    found = json.loads(file.read_text())
    if "viable" not in found:
        raise UserError(f"the search in {file} is not finished: run python -m lavi.visor search once more, it goes on.")
    return [tuple(one) for one in found["viable"]]


def _name(configuration: Configuration) -> str:
    return ",".join(map(str, configuration)) or "none"


def _same(found: dict[str, Any], about: dict[str, Any], out: Path) -> None:
    if any(found.setdefault(key, value) != value for key, value in about.items()):
        raise UserError(f"{out} holds a search of another run or other samples: choose another --out.")


def _write(found: dict[str, Any], out: Path) -> None:
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(found, indent=1))
    os.replace(part, out)

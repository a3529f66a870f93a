"""Is what is asked about what is looked at? Of trained runs on the scenes: where answers come from.

    python benchmarks/relevance.py --checkpoint runs/lab/lavi/2500-steps/seed-0-* --out results.jsonl

Each question is about one thing of a scene. The record says which share of the picture the thing covers, which share of
what the answer depends on (gradient times feature) lies there, and, of LaVi's attention generator, which share of what
the tokens of the answer's position read. A model that looks anywhere has the first share everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from own_records import keep, parser_of, read
from torch import Tensor

from datamodules.scenes import SIDE, SIZES, Scene, Thing, questions
from lavi.batch import Sample, question_about
from lavi.checkpoints.load import load
from lavi.cli.arguments import path, whole_number
from lavi.cli.entry import cli_entry_point
from lavi.inspection.answer import Inspection, inspect_each
from lavi.model import VisionLanguageModel
from lavi.report import console, table, track

SPLIT = "relevance"
"""Scenes of a seed of their own: no split has them."""
BATCH = 40


def asked(count: int) -> Iterator[tuple[Scene, Thing, str, str]]:
    """Scenes of several things, and a question about one of them: its colour or its shape."""
    index = given = 0
    while given < count:
        rng = random.Random(f"{SPLIT}/{index}")
        index += 1
        scene = Scene.draw_from(rng)
        pool = [question for family in ("colour", "shape") for question in questions(scene, family)]
        if len(scene.things) < 2 or not pool:
            continue
        question = rng.choice(pool)
        by = {"shape": question.kind} if question.family == "colour" else {"colour": question.kind}
        (thing,) = scene.matching(**by)
        given += 1
        yield scene, thing, question.text, question.answer


def covered(thing: Thing, grid: tuple[int, int]) -> Tensor:
    """(rows, columns): which share of each cell the square around a thing covers."""
    r = SIZES[thing.size]

    def along(centre: int, cells: int) -> Tensor:
        side = SIDE / cells
        starts = torch.arange(cells) * side
        inside = (starts + side).clamp(max=centre + r) - starts.clamp(min=centre - r)
        return inside.clamp(min=0) / side

    return along(thing.y, grid[0])[:, None] * along(thing.x, grid[1])[None, :]


def shares_on(inspected: Inspection, thing: Thing) -> dict[str, float]:
    """Of one answer: what lies on the thing, of the picture, of the relevance, of the attention."""
    (view,) = inspected.views
    on = covered(thing, view.grid)
    shares = {"picture": float(on.mean()), "relevance": float((view.cells(inspected.relevance) * on).sum())}
    if (attention := inspected.mean_shares) is not None:
        first = inspected.answer_tokens.start - 1  # the token that the answer is told from
        shares["attention"] = float((view.cells(attention[first]) * on).sum())
    return shares


def relevance_on_things(model: VisionLanguageModel, *, count: int) -> dict[str, Any]:
    """The means over questions, with the half-width of their 95 % intervals."""
    every: list[dict[str, float]] = []
    batch: list[tuple[Scene, Thing, str, str]] = []
    for number, one in enumerate(track(asked(count), "looking", total=count), start=1):
        batch.append(one)
        if len(batch) == BATCH or number == count:
            every += _of_batch(model, batch)
            batch = []
    names = list(every[0])
    return {
        name: [mean(one[name] for one in every), 1.96 * stdev(one[name] for one in every) / len(every) ** 0.5]
        for name in names
    }


def _of_batch(model: VisionLanguageModel, batch: Sequence[tuple[Scene, Thing, str, str]]) -> list[dict[str, float]]:
    encoded = []
    for scene, _, text, answer in batch:
        image = scene.image()
        messages = [*question_about([image], text), {"role": "assistant", "content": answer}]
        encoded.append(model.processor.encode(Sample("scene", messages, [image])))
    inspected = inspect_each(model, encoded, [one[2:] for one in batch])
    return [shares_on(one, thing) for one, (_, thing, _, _) in zip(inspected, batch, strict=True)]


def relevance_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = ["run", "share of the picture %", "of what the answer depends on %", "of what is read %", "times"]
    rows = []
    for record in records:
        cells = [
            "{:.1f} ± {:.1f}".format(*(100 * value for value in record[name])) if name in record else "-"
            for name in ("picture", "relevance", "attention")
        ]
        rows.append([record["run"], *cells, f"{record['relevance'][0] / record['picture'][0]:.1f}"])
    return columns, rows


@cli_entry_point
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--checkpoint", nargs="+", type=path, required=True, metavar="RUN", help="trained on scenes")
    parser.add_argument("--count", type=whole_number(2), default=400, help="questions")
    args = read(parser)
    folders: list[Path] = args.checkpoint
    records = keep(({"run": str(one), **relevance_on_things(load(one), count=args.count)} for one in folders), args.out)
    console().print(table(f"{args.count} questions about one of several things", *relevance_table(records)))


if __name__ == "__main__":
    main()

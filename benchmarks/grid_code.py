"""How should LaVi be told where in its image a visual token lies?

    python benchmarks/grid_code.py --out benchmarks/results/grid_code.jsonl      (a quarter of an hour on one core)

A small model is trained from scratch on questions about scenes, with each way of telling: 400 steps of 64 samples,
AdamW at 1e-3, all layers modulated, the built-in tower frozen and its features the same. Held-out answers are scored
under teacher forcing. Stopped, it goes on.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from datamodules.built_in import Examiner, Question, conversation, converse
from datamodules.scenes import SIDE, Scene, questions, sentences
from datamodules.tokenizer import train_tokenizer
from lavi.batch import Batch, Sample
from lavi.cli.arguments import Parser, path
from lavi.cli.entry import cli_entry_point
from lavi.data.collator import EncodedSample
from lavi.efficiency.record import Record, check_writable, current_commit, device_name, read_records, write_records
from lavi.language.token_scores import TokenScores
from lavi.metrics.base import GroupedMean, groups_of
from lavi.metrics.teacher_forcing import correct_under_teacher_forcing
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import AttentionDeltas
from lavi.nn.grid_code import GridCode
from lavi.recipe import Recipe
from lavi.report import console, table, track
from lavi.training.optim import rate_at_step

RECIPE = "recipes/quickstart.yaml"
STEPS, BATCH, RATE, WARMUP = 400, 64, 1e-3, 0.1
SCENES = {"train": 8000, "test": 1500}
FAMILIES = {"corner": 2, "count": 1, "relation": 1}
"""How often each is asked."""


# --- ways of telling --------------------------------------------------------------------------------------------------


class ProjectedWaves(GridCode):
    """Eight waves each of row and column, and a learned matrix from them to Dv, of deviation 0.5 at the start."""

    CYCLES = (0.5, 8.0)
    WAVES = 8

    def __init__(self, width: int) -> None:
        super().__init__(4 * self.WAVES, amplitude=1.0)
        self.amplitude.requires_grad_(False)
        self.matrix = nn.Linear(4 * self.WAVES, width, bias=False)
        nn.init.normal_(self.matrix.weight, std=0.5 * (2 * self.WAVES) ** -0.5)

    def forward(self, windows: Tensor, grids: Tensor, tokens: int, *, prefix: int = 0) -> Tensor:
        code: Tensor = self.matrix(super().forward(windows, grids, tokens, prefix=prefix))
        return code


class CellEmbedding(GridCode):
    """A learned vector for each cell of one grid of 8 x 8, of deviation 0.5 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.amplitude = nn.Parameter(0.5 * torch.randn(64, width))

    def forward(self, windows: Tensor, grids: Tensor, tokens: int, *, prefix: int = 0) -> Tensor:
        return self.amplitude.expand(len(windows), -1, -1)


class RotaryDeltas(AttentionDeltas):
    """Each key is turned by its row and its column, half a cycle over the image to four; values are not."""

    def slots(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        key, value = super().slots(features, grid).chunk(2, dim=-1)
        key = key.unflatten(-1, (self.heads, -1))  # (views, N, heads, d)
        index = torch.arange(features.shape[1])
        position = torch.stack([index // grid[1], index % grid[1]], dim=-1) / torch.tensor(grid)  # (N, 2)
        frequencies = torch.linspace(math.log(math.pi), math.log(8 * math.pi), key.shape[-1] // 4).exp()
        angle = (position[..., None] * frequencies).flatten(1)[:, None]  # (N, 1, d / 2)
        a, b = key.chunk(2, dim=-1)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
        return torch.cat([turned.flatten(-2), value], dim=-1)


CODES: dict[str, type[GridCode] | type[AttentionDeltas] | None] = {
    "none": None,
    "waves, an amplitude a channel": GridCode,
    "waves, a learned matrix": ProjectedWaves,
    "an embedding of each cell": CellEmbedding,
    "keys turned (rotary)": RotaryDeltas,
}
DEFAULT = "waves, an amplitude a channel"
RUNS = [(code, seed) for seed in (0, 1) for code in CODES]


def model_of(code: str, seed: int, tokenizer: Path) -> VisionLanguageModel:
    """The quickstart's model, told in this way."""
    kind = CODES[code]
    changes = [f"seed={seed}", f"model.language.tokenizer={tokenizer}", "model.fusion.every=1"]
    changes.append("model.fusion.grid_code=false")
    if kind is RotaryDeltas:
        changes.append("model.fusion.generator={_target_: grid_code.RotaryDeltas, bottleneck: 64}")
    torch.manual_seed(seed)
    model: VisionLanguageModel = Recipe.load(RECIPE, changes).build("model")
    if kind is not None and issubclass(kind, GridCode):
        model.fusion.grid_code = kind(model.vision.width)
    return model


# --- data -------------------------------------------------------------------------------------------------------------


def corners(scene: Scene) -> Iterator[Question]:
    """What stands in each corner that has something."""
    for thing in scene.things:
        corner = f"{('top', 'bottom')[thing.y >= SIDE // 2]} {('left', 'right')[thing.x >= SIDE // 2]}"
        yield Question("corner", f"what is at the {corner}?", thing.name, corner)


def conversations(split: str, count: int) -> Iterator[Sample]:
    """Scenes with one or two questions each."""
    examiner = Examiner(random.Random(split))
    for index in range(count):
        rng = random.Random(f"{split}/{index}")
        scene = Scene.draw_from(rng)
        pools = {family: list(questions(scene, family)) for family in FAMILIES}
        pools["corner"] = list(corners(scene))
        chosen = converse(pools, examiner, rng, turns=2, weights=list(FAMILIES.values()))
        if not chosen:  # there was nothing to count or to relate
            continue
        messages = conversation(chosen, ["image"], dict.fromkeys(FAMILIES, "all"))["messages"]
        yield Sample(f"{split}-{index}", messages, [scene.image()])


def encoded(model: VisionLanguageModel, split: str) -> list[EncodedSample]:
    """The samples of a split, the tower's features in place of their pixels."""
    samples = track(conversations(split, SCENES[split]), split, total=SCENES[split])
    rows = [model.processor.encode(sample) for sample in samples]
    with torch.no_grad():
        return [replace(row, pixels=model.vision(row.pixels)) for row in rows]


# --- training ---------------------------------------------------------------------------------------------------------


def answered(model: VisionLanguageModel, rows: Sequence[EncodedSample]) -> tuple[Batch, TokenScores]:
    """A batch, and the scores of its trained tokens."""
    batch = model.processor.collate(rows)
    return batch, model.language.token_scores(model.fusion(batch, batch.pixels, model.language), batch.labels)


def shuffled(rows: list[EncodedSample], seed: int) -> Iterator[EncodedSample]:
    """One pass after the other, without end."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def train(model: VisionLanguageModel, rows: list[EncodedSample], *, seed: int, steps: int = STEPS) -> None:
    """All but the tower."""
    parameters = [p for part in (model.fusion, model.language) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at_step(step, steps, warmup=WARMUP))
    drawn = shuffled(rows, seed)
    for _ in track(range(steps), "training", total=steps):
        _, scores = answered(model, list(itertools.islice(drawn, BATCH)))
        optimizer.zero_grad()
        (scores.loss / scores.tokens).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: VisionLanguageModel, rows: list[EncodedSample]) -> dict[str, float]:
    """Percent of answers right, by family."""
    scores = GroupedMean()
    for start in range(0, len(rows), 256):
        batch, said = answered(model, rows[start : start + 256])
        scores.update(correct_under_teacher_forcing(said, batch), groups_of(batch.answers))
    return scores.compute()


def measure(code: str, seed: int, tokenizer: Path, training: list[EncodedSample], test: list[EncodedSample]) -> Record:
    """Train and score one way of telling."""
    model = model_of(code, seed, tokenizer)
    train(model, training, seed=seed)
    record = Record("lavi", text_tokens=0, visual_tokens=model.vision.tokens, visual_tokens_in_language=0, views=1)
    record.accuracy = accuracy(model, test)
    record.knobs = {"code": code, "steps": STEPS, "test_scenes": len(test)}
    record.seed, record.commit, record.recipe = seed, current_commit(), RECIPE
    record.device, record.versions = device_name(torch.device("cpu")), {"torch": torch.__version__}
    return record


def grid_code_table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: of each way of telling the accuracy by family, one number a seed."""
    rows = []
    for code in dict.fromkeys(record.knobs["code"] for record in records):
        own = [record for record in records if record.knobs["code"] == code]
        figures = [" / ".join(f"{r.accuracy[f'family/{family}']:.0f}" for r in own) for family in FAMILIES]
        rows.append([f"{code} (the default)" if code == DEFAULT else code, *figures])
    return ["told by", *(f"{family} %" for family in FAMILIES)], rows


@cli_entry_point
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=path, required=True, help="write the records to this file of JSON lines")
    args = parser.read()
    check_writable(args.out)
    known = {(r.knobs["code"], r.seed) for r in read_records(args.out)} if args.out.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(sentences(), Path(folder))
        model = model_of("none", 0, Path(folder))
        training, test = encoded(model, "train"), encoded(model, "test")
        for code, seed in RUNS:
            if (code, seed) not in known:
                write_records([measure(code, seed, Path(folder), training, test)], args.out)
    console().print(table("Told where a token lies", *grid_code_table(read_records(args.out))))


if __name__ == "__main__":
    main()

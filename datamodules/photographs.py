"""Questions about real photographs: Fashion-MNIST's, laid out alone, two by two or three by three.

    python -m lavi.parts fetch fashion-mnist
    python -m datamodules.photographs --out data/photographs

lays photographs out on tinted canvases, asks one question about each, and writes WebDataset shards. The official test
photographs are in the test split alone, the last 5,000 training photographs in the validation split alone. The same
seed gives the same bytes, whatever the number of processes.

    easy   name        "what is this?"                                    one alone, of any size, anywhere
           existence   "is there a bag?"                                  2 x 2 or 3 x 3
    hard   place       "what is at the top left?"                         2 x 2 or 3 x 3
           count       "how many bags are there?"                         2 x 2 or 3 x 3
           relation    "is the bag left or right of the sandal?"          2 x 2 or 3 x 3, also above or below
           sameness    "are two of a kind?"                               2 x 2

The answer is chosen first, each as often as the others, and the layout to suit it: guessing is at chance. What else is
in the picture is drawn at random. Fashion-MNIST (Zalando SE, MIT licence; arXiv 1708.07747): grey photographs of 28 x
28 pixels in ten kinds.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.built_in import Question, conversation, run_command, write_splits
from datamodules.shards.write import ShardJob
from lavi.cli.entry import cli_entry_point
from lavi.errors import UserError, reason

KINDS = {
    "t-shirt": "t-shirts",
    "pair of trousers": "pairs of trousers",
    "pullover": "pullovers",
    "dress": "dresses",
    "coat": "coats",
    "sandal": "sandals",
    "shirt": "shirts",
    "sneaker": "sneakers",
    "bag": "bags",
    "boot": "boots",
}
"""Fashion-MNIST's ten kinds in its order of labels, with their plurals."""
NAMES = list(KINDS)
ANSWERS = {name: "trousers" if "trousers" in name else name for name in NAMES}
"""What a question for a name is answered."""
NUMBERS = ("zero", "one", "two", "three")
LEVELS = {
    "name": "easy",
    "existence": "easy",
    "place": "hard",
    "count": "hard",
    "relation": "hard",
    "sameness": "hard",
}
TURNS = {
    "train": ("name", "place", "name", "existence", "name", "relation", "name", "place", "count", "sameness"),
    "validation": tuple(LEVELS),
    "test": ("name", "existence", "name", "place", "name", "count", "name", "relation", "name", "sameness"),
}
"""The order in which families take turns. Names come oftenest: nothing else is learned without them."""
SPLITS = {"train": 1, "validation": 2, "test": 3}
HELD_BACK = 5000
"""Training photographs that only the validation split shows."""
CANVASES = (128, 160, 192, 224)
"""Sides of a picture in pixels."""
PIXELS, LABELS = 16, 8
"""Bytes before the values of an idx file of images and of one of labels."""
FETCH = "fetch the photographs with `python -m lavi.parts fetch fashion-mnist`, or name their folder with --source."


# --- the photographs --------------------------------------------------------------------------------------------------


@cache
def photographs(folder: Path, split: str, seed: int) -> list[np.ndarray[Any, Any]]:
    """For each kind its photographs (n, 28, 28) for a split, in an order that the seed decides.

    Raises:
        UserError: they are not there, or not whole; a negative seed.
    """
    file = "t10k" if split == "test" else "train"
    pixels = _read(folder / f"{file}-images-idx3-ubyte", PIXELS, 28, 28)
    labels = _read(folder / f"{file}-labels-idx1-ubyte", LABELS)
    if len(pixels) != len(labels):
        raise UserError(f"{folder} has {len(pixels)} images in {file}-... and {len(labels)} labels: {FETCH}")
    if split != "test":
        part = slice(-HELD_BACK, None) if split == "validation" else slice(None, -HELD_BACK)
        pixels, labels = pixels[part], labels[part]
    if seed < 0:
        raise UserError(f"--seed {seed}: photographs are drawn with a seed of 0 or more.")
    order = np.random.default_rng([seed, SPLITS[split]]).permutation(len(labels))
    return [pixels[order[labels[order] == kind]] for kind in range(len(NAMES))]


def _read(file: Path, header: int, *shape: int) -> np.ndarray[Any, Any]:
    """Values of an idx file, of as many things as it says, each of this shape.

    Raises:
        UserError: it is not there, or not whole.
    """
    try:
        content = file.read_bytes()
        values = np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape)
        if len(values) != (said := int.from_bytes(content[4:8], "big")):
            raise ValueError(f"it has {len(values)} of {said}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): {FETCH}") from None
    return values


# --- layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Kinds by row and column of a square grid, 1 x 1 to 3 x 3, and the question about them."""

    side: int
    kinds: tuple[str, ...]
    question: Question


@dataclass
class Deck:
    """Deals the cards of a pile in random order, all of them before one comes again."""

    cards: Sequence[Any]
    rng: random.Random
    left: list[Any] = field(default_factory=list)

    def deal(self) -> Any:
        if not self.left:
            self.left = self.rng.sample(list(self.cards), len(self.cards))
        return self.left.pop()


def decks(rng: random.Random) -> dict[str, Deck]:
    """For each family what is to be asked and answered."""
    sides = (2, 3)
    cards: dict[str, list[Any]] = {
        "name": NAMES,
        "existence": [(side, kind, answer) for side in sides for kind in NAMES for answer in ("yes", "no")],
        "place": [(side, kind) for side in sides for kind in NAMES],
        "count": [(side, kind, number) for side in sides for kind in NAMES for number in range(len(NUMBERS))],
        "relation": [(side, answer) for side in sides for answer in ("left", "right", "above", "below")],
        "sameness": ["yes", "no"],
    }
    return {family: Deck(pile, rng) for family, pile in cards.items()}


def lay_out(family: str, card: Any, rng: random.Random) -> Layout:
    """A layout of a family whose answer is what the card says."""
    return _LAYOUTS[family](card, rng)


def _name(kind: str, rng: random.Random) -> Layout:
    return Layout(1, (kind,), Question("name", "what is this?", ANSWERS[kind], "name"))


def _existence(card: tuple[int, str, str], rng: random.Random) -> Layout:
    side, kind, answer = card
    number = rng.choice((1, 1, 2)) if answer == "yes" else 0
    return Layout(side, _some(side, kind, number, rng), Question("existence", f"is there a {kind}?", answer, kind))


def _place(card: tuple[int, str], rng: random.Random) -> Layout:
    side, kind = card
    kinds = rng.choices(NAMES, k=side * side)
    position = rng.randrange(side * side)
    kinds[position] = kind
    text = f"what is {position_name(side, position)}?"
    return Layout(side, tuple(kinds), Question("place", text, ANSWERS[kind], "place"))


def _count(card: tuple[int, str, int], rng: random.Random) -> Layout:
    side, kind, number = card
    question = Question("count", f"how many {KINDS[kind]} are there?", NUMBERS[number], kind)
    return Layout(side, _some(side, kind, number, rng), question)


def _relation(card: tuple[int, str], rng: random.Random) -> Layout:
    side, answer = card
    across = answer in ("left", "right")
    before, after = sorted(rng.sample(range(side), 2))  # columns where across, else rows
    if answer in ("right", "below"):
        before, after = after, before
    others = [rng.randrange(side) for _ in range(2)]
    cells = [
        (o * side + line) if across else (line * side + o) for o, line in zip(others, (before, after), strict=True)
    ]
    first, second, *rest = rng.sample(NAMES, len(NAMES))
    kinds = rng.choices(rest, k=side * side)
    kinds[cells[0]], kinds[cells[1]] = first, second
    ends = "left or right of" if across else "above or below"
    text = f"is the {first} {ends} the {second}?"
    return Layout(side, tuple(kinds), Question("relation", text, answer, "x" if across else "y"))


def _sameness(answer: str, rng: random.Random) -> Layout:
    kinds = rng.sample(NAMES, 4)
    if answer == "yes":
        kinds[1] = kinds[0]
        rng.shuffle(kinds)
    return Layout(2, tuple(kinds), Question("sameness", "are two of a kind?", answer, "sameness"))


_LAYOUTS: dict[str, Any] = {
    "name": _name,
    "existence": _existence,
    "place": _place,
    "count": _count,
    "relation": _relation,
    "sameness": _sameness,
}


def _some(side: int, kind: str, number: int, rng: random.Random) -> tuple[str, ...]:
    """A grid with so many of a kind among others, anywhere."""
    others = [name for name in NAMES if name != kind]
    kinds = [kind] * number + rng.choices(others, k=side * side - number)
    rng.shuffle(kinds)
    return tuple(kinds)


def position_name(side: int, position: int) -> str:
    """``at the top left``, ``in the middle``, of a cell counted row by row."""
    rows, columns = (("top", "bottom"), ("left", "right")) if side == 2 else (_ROWS, _COLUMNS)
    row, column = rows[position // side], columns[position % side]
    return "in the middle" if row == column else f"at the {row} {column}"


_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(cells: Sequence[np.ndarray[Any, Any]], side: int, rng: random.Random) -> Image.Image:
    """Photographs (28, 28) on a square canvas, as RGB: one alone of any size from half the canvas, several in a grid.

    Black becomes the tint of the ground, white a light tint.
    """
    canvas = rng.choice(CANVASES)
    grey = Image.new("L", (canvas, canvas))
    step = canvas // side
    for position, pixels in enumerate(cells):
        size = rng.randint(canvas // 2, canvas) if side == 1 else rng.randint(step * 4 // 5, step)
        x, y = (rng.randint(0, step - size) for _ in range(2))
        photograph = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        grey.paste(photograph, (position % side * step + x, position // side * step + y))
    ground = np.array([rng.randint(0, 70) for _ in range(3)])
    ink = np.array([rng.randint(200, 255) for _ in range(3)])
    share = np.asarray(grey, np.float32)[..., None] / 255
    return Image.fromarray((ground + (ink - ground) * share).round().astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """A picture as JPEG of high quality."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_samples(job: ShardJob, *, source: Path, split: str, seed: int, turns: int) -> Iterator[dict[str, Any]]:
    """The samples of one shard, one question each."""
    pools = photographs(source, split, seed)
    piles = decks(random.Random(f"{seed}/{split}/shard/{job.index}"))
    for index in range(job.start, job.stop):
        rng = random.Random(f"{seed}/{SPLITS[split]}/{index}")
        family = TURNS[split][index % len(TURNS[split])]
        layout = lay_out(family, piles[family].deal(), rng)
        cells = [_photograph(pools[NAMES.index(kind)], layout, index, rng) for kind in layout.kinds]
        yield {
            "__key__": f"{split}-{index:06d}",
            "json": conversation([layout.question], ["image"], LEVELS),
            "jpg": jpeg(draw(cells, layout.side, rng)),
        }


def _photograph(pool: np.ndarray[Any, Any], layout: Layout, index: int, rng: random.Random) -> np.ndarray[Any, Any]:
    """One of a kind's: among others any; alone by its number, so that none comes again within twice as many samples."""
    return pool[index // 2 % len(pool) if layout.side == 1 else rng.randrange(len(pool))]


def write_dataset(out: Path, *, source: Path, seed: int, counts: dict[str, int], workers: int, turns: int = 1) -> bool:
    """Write the shards of each split; returns False if the same data are there already.

    Args:
        source: the folder of Fashion-MNIST's four idx files.
        counts: samples of each split.

    Raises:
        UserError: the photographs cannot be read; ``out`` holds something else, or cannot be written.
    """
    for split in counts:
        photographs(source, split, seed)  # what is missing is said before anything is written
    return write_splits(
        out,
        seed=seed,
        counts=counts,
        turns=turns,
        workers=workers,
        name="photographs",
        version=1,
        make_samples=partial(make_samples, source=source),
    )


@cli_entry_point
def main() -> None:
    run_command(
        write_dataset,
        module="datamodules.photographs",
        about=__doc__,
        out=Path("data/photographs"),
        counts={"train": 12000, "validation": 480, "test": 1600},
        thing="picture",
        turns=None,
        source=Path("data/parts/fashion-mnist"),
    )


if __name__ == "__main__":
    main()

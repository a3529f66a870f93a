"""Built-in data: small scenes with known truth, written as ordinary shards.

    python -m datamodules.scenes --out data/scenes

draws train, validation and test scenes (64 x 64 pixels: coloured shapes of two sizes, some with a letter or digit),
asks questions whose answers are known, and writes WebDataset shards with a tokenizer beside them. The same seed gives
the same bytes, whatever the number of processes.

Question families. Easy: colour, shape, existence. Hard: count, relation, comparison, reading, two_images. Answers are
balanced inside each shard (the answer least given so far to the same question is asked first), so that guessing
without the image stays near chance.

With --even, training conversations ask all families alike and also where things are and how large: for those who train
until the hard families are learned (recipes/lab). Without it, easy families are asked oftener, for the first minutes.

With --large, pictures are 128 x 128 and things no larger: seen whole by a tower of 64 x 64, their letters are too small
to be read, and have to be looked for in tiles.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from datamodules.built_in import (
    Examiner,
    Question,
    ask_one,
    conversation,
    converse,
    run_command,
    write_splits,
)
from datamodules.shards.write import ShardJob
from lavi.cli.entry import cli_entry_point

SIDE, LARGE_SIDE = 64, 128
CELLS = 2
"""In a row of a picture of :data:`SIDE`; a larger one has more, as large as these."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 235),
    "yellow": (240, 220, 50),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = {"small": 8, "large": 13}
GLYPHS = "0123456789ACEHKLPRTX"
NUMBERS = ("zero", "one", "two")
LEVELS = {
    "colour": "easy",
    "shape": "easy",
    "existence": "easy",
    "count": "hard",
    "relation": "hard",
    "comparison": "hard",
    "reading": "hard",
    "two_images": "hard",
}
SPLITS = {"train": 1, "validation": 2, "test": 3, "tower": 4}
"""Each split draws its scenes from a seed of its own; ``tower`` trains the built-in vision tower and nothing else."""


TRAINING_LEVELS = {"place": "places", "size": "places", "at": "places"}
"""Families that are asked in training alone, with ``--even``."""
CORNERS = {(0, 0): "top left", (1, 0): "top right", (0, 1): "bottom left", (1, 1): "bottom right"}


@dataclass(frozen=True)
class Thing:
    """One object: its look, and its centre in pixels."""

    colour: str
    shape: str
    size: str
    glyph: str
    x: int
    y: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Some things on a grey ground; no two of the same colour and shape."""

    things: tuple[Thing, ...]
    ground: int
    side: int = SIDE

    @classmethod
    def draw_from(cls, rng: random.Random, *, side: int = SIDE) -> Scene:
        """A random scene of one to four things, in cells of a grid, moved about a little.

        Scenes of one thing teach what its look is called, before others teach to find the thing that a question names.
        """
        count = rng.randint(1, 4)
        looks = [(c, s) for c in COLOURS for s in SHAPES]
        # One scene in three has few colours or few shapes, so that there is something to count.
        few_colours, few_shapes = rng.choice(((True, False), (False, True), *[(False, False)] * 4))
        colours = rng.sample(list(COLOURS), rng.randint(1, 2) if few_colours else len(COLOURS))
        shapes = rng.sample(SHAPES, rng.randint(1, 2) if few_shapes else len(SHAPES))
        allowed = [look for look in looks if look[0] in colours and look[1] in shapes]
        chosen = rng.sample(allowed, min(count, len(allowed)))
        step = SIDE // CELLS
        across = range(side // step)
        cells = rng.sample([(x, y) for x in across for y in across], len(chosen))
        things = []
        for (colour, shape), (cx, cy) in zip(chosen, cells, strict=True):
            size = rng.choice(list(SIZES))
            room = step // 2 - SIZES[size]
            x, y = (c * step + step // 2 + rng.randint(-room, room) for c in (cx, cy))
            glyph = rng.choice(GLYPHS) if size == "large" and rng.random() < 0.6 else ""
            things.append(Thing(colour, shape, size, glyph, x, y))
        return cls(tuple(things), rng.randint(20, 70), side)

    def corner_of(self, thing: Thing) -> str:
        """The quarter of the picture that its centre lies in."""
        return CORNERS[int(thing.x >= self.side // 2), int(thing.y >= self.side // 2)]

    def image(self) -> Image.Image:
        """The scene as a (side, side) RGB image."""
        image = Image.new("RGB", (self.side, self.side), (self.ground,) * 3)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw(pen, thing)
        return image

    def matching(self, *, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """The things of this colour and shape."""
        return [t for t in self.things if colour in (None, t.colour) and shape in (None, t.shape)]


def _draw(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r, ink = thing.x, thing.y, SIZES[thing.size], COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif thing.shape == "square":
        pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=ink)
    elif thing.shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=ink)
    elif thing.shape == "diamond":
        pen.polygon(((x, y - r), (x + r, y), (x, y + r), (x - r, y)), fill=ink)
    else:
        arm = r // 3 + 1
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=ink)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=ink)
    if thing.glyph:
        font = ImageFont.load_default(size=17)
        pen.text((x, y + (4 if thing.shape == "triangle" else 0)), thing.glyph, fill=(0, 0, 0), font=font, anchor="mm")


# --- questions --------------------------------------------------------------------------------------------------------


def questions(scene: Scene, family: str) -> Iterator[Question]:
    """Every question of a family that this scene can answer without doubt."""
    if family == "colour":
        for shape in SHAPES:
            if len(things := scene.matching(shape=shape)) == 1:
                yield Question(family, f"what colour is the {shape}?", things[0].colour, shape)
    elif family == "shape":
        for colour in COLOURS:
            if len(things := scene.matching(colour=colour)) == 1:
                yield Question(family, f"what shape is the {colour} thing?", things[0].shape, colour)
    elif family == "existence":
        for shape in SHAPES:
            answer = "yes" if scene.matching(shape=shape) else "no"
            yield Question(family, f"is there a {shape}?", answer, "shape")
        for colour in COLOURS:
            answer = "yes" if scene.matching(colour=colour) else "no"
            yield Question(family, f"is there anything {colour}?", answer, "colour")
    elif family == "count":
        counted = [("shape", f"{shape}s", scene.matching(shape=shape)) for shape in SHAPES]
        counted += [("colour", f"{colour} things", scene.matching(colour=colour)) for colour in COLOURS]
        for kind in ("shape", "colour"):
            numbers = [(name, len(things)) for k, name, things in counted if k == kind]
            # Only where there are two of something: elsewhere "zero" and "one" would be the only answers.
            if any(number == 2 for _, number in numbers):
                for name, number in numbers:
                    if number < len(NUMBERS):
                        yield Question(family, f"how many {name}?", NUMBERS[number], kind)
    elif family == "relation":
        for a in scene.things:
            for b in scene.things:
                if a.x + 10 <= b.x or b.x + 10 <= a.x:
                    text = f"is the {a.name} left or right of the {b.name}?"
                    yield Question(family, text, "left" if a.x < b.x else "right", "x")
                if a.y + 10 <= b.y or b.y + 10 <= a.y:
                    text = f"is the {a.name} above or below the {b.name}?"
                    yield Question(family, text, "above" if a.y < b.y else "below", "y")
    elif family == "comparison":
        for a in scene.things:
            for b in scene.things:
                if a.size != b.size:
                    text = f"is the {a.name} larger than the {b.name}?"
                    yield Question(family, text, "yes" if a.size == "large" else "no", "larger")
    elif family == "reading":
        for thing in scene.things:
            if thing.glyph:
                yield Question(family, f"what is written on the {thing.name}?", thing.glyph, "glyph")
    elif family == "place":
        for thing in scene.things:
            yield Question(family, f"where is the {thing.name}?", scene.corner_of(thing), "corner")
    elif family == "size":
        for thing in scene.things:
            yield Question(family, f"how large is the {thing.name}?", thing.size, "size")
    elif family == "at":
        for corner in CORNERS.values():
            there = [thing.name for thing in scene.things if scene.corner_of(thing) == corner]
            if len(there) < 2:
                yield Question(family, f"what is {corner}?", there[0] if there else "nothing", "corner")


def questions_of_two(first: Scene, second: Scene) -> Iterator[Question]:
    """Which of two images shows a thing that stands in one of them only."""
    for thing in first.things + second.things:
        inside = [bool(s.matching(colour=thing.colour, shape=thing.shape)) for s in (first, second)]
        if sum(inside) == 1:
            text = f"which image has the {thing.name}?"
            yield Question("two_images", text, "first" if inside[0] else "second", "two")


# --- samples ----------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image) -> bytes:
    """High quality and full colour resolution: at 64 pixels the usual halving of colour blurs the glyphs."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


ONE_IMAGE = tuple(family for family in LEVELS if family != "two_images")
WEIGHTS = {"colour": 4, "shape": 6, "existence": 8}
"""How many times as often as a hard family training conversations ask these: those learned later are asked oftener."""


def _ask(scene: Scene, examiner: Examiner, rng: random.Random, index: int, turns: int, *, even: bool) -> list[Question]:
    """Questions about one scene; where it is only one, the families take turns."""
    families = (*ONE_IMAGE, *(TRAINING_LEVELS if even and turns > 1 else ()))
    pools = {family: list(questions(scene, family)) for family in families}
    if turns == 1:
        return ask_one(pools, examiner, first=index % 8)
    weights = [1 if even else WEIGHTS.get(family, 1) for family in families]
    return converse(pools, examiner, rng, turns=turns, weights=weights)


def make_samples(
    job: ShardJob, *, split: str, seed: int, turns: int, even: bool = False, large: bool = False
) -> Iterator[dict[str, Any]]:
    """The samples of one shard. Every eighth is about two images."""
    examiner = Examiner(random.Random(f"{seed}/{split}/shard/{job.index}"))
    for index in range(job.start, job.stop):
        rng = random.Random(f"{seed}/{SPLITS[split]}/{index}")
        side = LARGE_SIDE if large else SIDE
        scenes = [Scene.draw_from(rng, side=side) for _ in range(2 if index % 8 == 7 else 1)]
        chosen: list[Question] = []
        if len(scenes) == 2:
            pool = list(questions_of_two(*scenes))
            most = turns if even else min(turns, 3)
            while len(chosen) < most and (question := examiner.pick(pool)):
                chosen.append(question)
                pool.remove(question)
        else:
            chosen = _ask(scenes[0], examiner, rng, index, turns, even=even)
        if not chosen:  # Two scenes that hold the same things; a scene alone always has a colour or a count to ask for.
            continue
        sample: dict[str, Any] = {
            "__key__": f"{split}-{index:06d}",
            "json": conversation(chosen, ["image"] * len(scenes), LEVELS | TRAINING_LEVELS),
        }
        names = ["jpg"] if len(scenes) == 1 else ["0.jpg", "1.jpg"]
        yield sample | {name: jpeg(scene.image()) for name, scene in zip(names, scenes, strict=True)}


def sentences(*, even: bool = False) -> Iterator[str]:
    """Questions and answers about such scenes, for the tokenizer."""
    families = (*LEVELS, *(TRAINING_LEVELS if even else ()))
    rng = random.Random("tokenizer")
    for _ in range(400):
        scene, other = Scene.draw_from(rng), Scene.draw_from(rng)
        about_one = [q for family in families for q in questions(scene, family)]
        for question in about_one + list(questions_of_two(scene, other)):
            yield question.text
            yield question.answer


def write_dataset(out: Path, *, even: bool = False, large: bool = False, **settings: Any) -> bool:
    """As :func:`datamodules.built_in.write_splits`.

    Args:
        even: training conversations ask all families alike, and where things are and how large.
        large: pictures of twice the side.
    """
    # The second kind of even data: as many questions about two images as about one.
    more = ({"even": 2} if even else {}) | ({"large": True} if large else {})
    return write_splits(
        out,
        name="scenes",
        version=3,
        make_samples=partial(make_samples, even=even, large=large),
        sentences=partial(sentences, even=even),
        more=more,
        **settings,
    )


@cli_entry_point
def main() -> None:
    counts = {"train": 12000, "validation": 800, "test": 800}
    run_command(
        write_dataset,
        module="datamodules.scenes",
        about=__doc__,
        out=Path("data/scenes"),
        counts=counts,
        thing="scene",
        flags={
            "even": "training asks all question families alike, and where things are and how large",
            "large": f"pictures of {LARGE_SIDE} x {LARGE_SIDE}, things no larger",
        },
    )


if __name__ == "__main__":
    main()

"""Built-in data: short videos of things that move and appear, with known truth, written as ordinary shards.

    python -m datamodules.moving --out data/moving

draws train, validation and test clips (64 x 64 pixels, 16 frames, 2 seconds, mp4) of the shapes of
:mod:`datamodules.scenes`, asks questions whose answers are known, and writes WebDataset shards with a tokenizer beside
them. The same seed gives the same bytes, whatever the number of processes.

Question families. Easy: direction (of a thing that moves), appeared (colour and shape of the thing that was not there
from the start). Hard: order (which of two appeared first), moving (how many things move). All ask for what changes from
frame to frame. Answers are balanced as those of the scenes are.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
from PIL import Image

from datamodules.built_in import (
    Examiner,
    Question,
    ask_one,
    conversation,
    converse,
    run_command,
    write_splits,
)
from datamodules.scenes import CELLS, COLOURS, NUMBERS, SHAPES, SIDE, SIZES, SPLITS, Scene, Thing
from datamodules.shards.write import ShardJob
from lavi.batch import Video
from lavi.cli.entry import cli_entry_point
from lavi.data.timestamps import time_instruction

FRAMES, RATE = 16, 8
"""Frames of a clip, and frames a second."""
CELL = SIDE // CELLS
ROOM = CELL // 2 - SIZES["small"]
"""Pixels by which a thing can be off the centre of its cell; in its own cell it never meets another."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HOW_MANY = (*NUMBERS, "three")
LEVELS = {"direction": "easy", "appeared": "easy", "order": "hard", "moving": "hard"}
APPEARING = range(3, 13)
"""Frames in which a thing may appear: 8 evenly spread frames show a clip without it, too."""
APART = 3
"""Frames between two that appear, so that there is one in between of 8 evenly spread."""


@dataclass(frozen=True)
class Actor:
    """A thing, where it is in the first frame, and what it does."""

    thing: Thing
    direction: str = ""
    """In which it moves from the first frame to the last; empty: it stands still."""
    appears: int = 0
    """The first frame that shows it."""

    @property
    def name(self) -> str:
        return self.thing.name

    def at(self, frame: int) -> Thing:
        """The thing as it is in this frame; one that moves does so through its whole cell."""
        dx, dy = DIRECTIONS.get(self.direction, (0, 0))
        way = round(2 * ROOM * frame / (FRAMES - 1))
        return replace(self.thing, x=self.thing.x + dx * way, y=self.thing.y + dy * way)


@dataclass(frozen=True)
class Play:
    """What happens in a clip: up to three things move, up to two appear, the others stand still."""

    actors: tuple[Actor, ...]
    ground: int

    @classmethod
    def draw_from(cls, rng: random.Random) -> Play:
        """A random play of one to four things, each of its own look and in its own cell."""
        cells = [(x, y) for x in range(CELLS) for y in range(CELLS)]
        movers = rng.randrange(len(HOW_MANY))
        comers = rng.randint(0, min(2, len(cells) - movers))
        count = rng.randint(max(1, movers + comers), len(cells))
        frames = _frames_apart(rng, comers)
        looks = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
        actors = []
        for number, (look, cell) in enumerate(zip(looks, rng.sample(cells, count), strict=True)):
            direction = rng.choice(list(DIRECTIONS)) if number < movers else ""
            appears = frames[number - movers] if movers <= number < movers + comers else 0
            actors.append(Actor(_placed(rng, look, cell, direction), direction, appears))
        return cls(tuple(actors), ground=rng.randint(20, 70))

    def frames(self) -> list[Image.Image]:
        """The clip as (64, 64) RGB images, F of them."""
        shown = ([a.at(frame) for a in self.actors if a.appears <= frame] for frame in range(FRAMES))
        return [Scene(tuple(things), self.ground).image() for things in shown]


def _frames_apart(rng: random.Random, count: int) -> list[int]:
    """In which frames ``count`` things appear."""
    while True:
        frames = [rng.choice(APPEARING) for _ in range(count)]
        if count < 2 or abs(frames[0] - frames[1]) >= APART:
            return frames


def _placed(rng: random.Random, look: tuple[str, str], cell: tuple[int, int], direction: str) -> Thing:
    """A thing in its cell; one that moves, where it has all of the cell before it."""
    away = DIRECTIONS.get(direction, (0, 0))
    x, y = (
        c * CELL + CELL // 2 + (-step * ROOM if step else rng.randint(-ROOM, ROOM))
        for c, step in zip(cell, away, strict=True)
    )
    return Thing(*look, "small", "", x, y)


def questions(play: Play, family: str) -> Iterator[Question]:
    """Every question of a family that this play can answer without doubt."""
    movers = [a for a in play.actors if a.direction]
    comers = [a for a in play.actors if a.appears]
    if family == "direction":
        for actor in movers:
            yield Question(family, f"which way does the {actor.name} move?", actor.direction, "direction")
    elif family == "moving":
        yield Question(family, "how many things move?", HOW_MANY[len(movers)], "moving")
    elif family == "appeared" and len(comers) == 1:
        yield Question(family, "what colour is the thing that appears?", comers[0].thing.colour, "colour")
        yield Question(family, "what shape is the thing that appears?", comers[0].thing.shape, "shape")
    elif family == "order" and len(comers) == 2:
        # Asked once, and not both ways round: in a conversation the first answer would give the second away.
        a, b = comers
        first = a if a.appears < b.appears else b
        yield Question(family, f"which appeared first, the {a.name} or the {b.name}?", first.name, "order")


def mp4(frames: list[Image.Image]) -> bytes:
    """Encode frames of one size; one thread, no date and no version inside, so that bytes are reproducible."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # At a fixed quantiser each frame is as good as the last; two key frames a clip.
        coded = container.add_stream("mpeg4", rate=RATE, options={"flags": "+bitexact", "qmin": "2", "qmax": "2"})
        coded.width, coded.height = frames[0].size
        coded.pix_fmt = "yuv420p"
        coded.codec_context.gop_size = FRAMES // 2
        coded.codec_context.thread_count = 1
        for image in frames:
            container.mux(coded.encode(av.VideoFrame.from_image(image)))
        container.mux(coded.encode(None))
    return stream.getvalue()


def make_samples(job: ShardJob, *, split: str, seed: int, turns: int) -> Iterator[dict[str, Any]]:
    """The samples of one shard."""
    examiner = Examiner(random.Random(f"moving/{seed}/{split}/shard/{job.index}"))
    for index in range(job.start, job.stop):
        rng = random.Random(f"moving/{seed}/{SPLITS[split]}/{index}")
        play = Play.draw_from(rng)
        pools = {family: list(questions(play, family)) for family in LEVELS}
        if turns == 1:
            chosen = ask_one(pools, examiner, first=index % len(LEVELS))
        else:
            chosen = converse(pools, examiner, rng, turns=turns, weights=[1] * len(LEVELS))
        record = conversation(chosen or ask_one(pools, examiner, first=0), ["video"], LEVELS)
        yield {"__key__": f"{split}-{index:06d}", "json": record, "mp4": mp4(play.frames())}


def sentences() -> Iterator[str]:
    """Questions and answers about such clips, for the tokenizer."""
    rng = random.Random("moving/tokenizer")
    for _ in range(800):
        for question in (q for play in [Play.draw_from(rng)] for family in LEVELS for q in questions(play, family)):
            yield question.text
            yield question.answer
    seconds = [(2 * i + 1) / RATE for i in range(FRAMES // 2)]
    yield from [time_instruction(Video([], seconds, FRAMES / RATE))] * 100


write_dataset = partial(write_splits, name="moving", version=1, make_samples=make_samples, sentences=sentences)


@cli_entry_point
def main() -> None:
    counts = {"train": 6000, "validation": 400, "test": 400}
    run_command(
        write_dataset, module="datamodules.moving", about=__doc__, out=Path("data/moving"), counts=counts, thing="clip"
    )


if __name__ == "__main__":
    main()

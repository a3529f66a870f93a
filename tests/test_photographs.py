"""Questions about photographs: true, balanced, one a conversation, and of the right split."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.formats.conversations import Conversations
from datamodules.photographs import (
    ANSWERS,
    KINDS,
    LEVELS,
    NAMES,
    NUMBERS,
    TURNS,
    decks,
    draw,
    lay_out,
    photographs,
    position_name,
    write_dataset,
)
from datamodules.shards.read import read_shard
from datamodules.shards.sources import find_shards
from lavi.errors import UserError

COUNTS = {"train": 80, "validation": 24, "test": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """idx files of photographs that tell their kind (a quarter of their brightness) and their number (the rest)."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, count, first in (("train", 5400, 0), ("t10k", 200, 5400)):
        labels = np.arange(count, dtype=np.uint8) % len(NAMES)
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 8:20, 8:20] = (60 + 20 * labels)[:, None, None]
        pixels[:, 0, :16] = np.unpackbits((np.arange(count) + first).astype(">u2").view(np.uint8)).reshape(count, 16)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "photographs"
    assert write_dataset(out, source=source, seed=0, counts=COUNTS, workers=2)
    return out


def samples(folder: Path) -> list[Any]:
    return [Conversations().decode(raw) for shard in find_shards(str(folder)) for raw in read_shard(shard)]


def numbers(pools: list[Any]) -> set[int]:
    """The numbers that photographs carry."""
    bits = np.concatenate([pool[:, 0, :16] for pool in pools])
    return set(np.packbits(bits, axis=1).view(">u2").ravel().tolist())


def test_test_photographs_are_in_the_test_split_alone(source: Path) -> None:
    shown = {split: numbers(photographs(source, split, 0)) for split in COUNTS}
    assert shown["test"] == set(range(5400, 5600))
    assert shown["validation"] == set(range(400, 5400))
    assert shown["train"] == set(range(400))


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(source: Path, written: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*.tar"))]

    write_dataset(tmp_path / "again", source=source, seed=0, counts=COUNTS, workers=1)
    write_dataset(tmp_path / "other", source=source, seed=1, counts=COUNTS, workers=1)
    assert digests(written) == digests(tmp_path / "again")
    assert not set(digests(written)) & set(digests(tmp_path / "other"))
    assert write_dataset(written, source=source, seed=0, counts=COUNTS, workers=1) is False
    assert not (written / "tokenizer").exists()


def test_a_conversation_is_one_question_about_one_picture_with_its_tags(written: Path) -> None:
    for split in COUNTS:
        asked = [sample.messages for sample in samples(written / split)]
        assert all(len(messages) == 2 for messages in asked)
        families = [answer["family"] for _, answer in asked]
        assert Counter(families) == Counter(TURNS[split][n % len(TURNS[split])] for n in range(COUNTS[split]))
        assert all(answer["level"] == LEVELS[answer["family"]] for _, answer in asked)
        assert set(families) == set(LEVELS)
    assert all(len(sample.images) == 1 for sample in samples(written / "test"))


def true_answer(text: str, side: int, kinds: tuple[str, ...]) -> set[str]:
    """What may be answered to a question by what is laid out, read from its words."""
    words = text.rstrip("?")
    where = {position_name(side, position): position for position in range(side * side)}
    cells: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for position, kind in enumerate(kinds):
        cells[kind].append(divmod(position, side))
    if words == "what is this":
        return {ANSWERS[kinds[0]]}
    if words == "are two of a kind":
        return {"yes" if max(map(len, cells.values())) == 2 else "no"}
    if words.startswith("what is "):
        return {ANSWERS[kinds[where[words.removeprefix("what is ")]]]}
    if words.startswith("is there a "):
        return {"yes" if cells[words.removeprefix("is there a ")] else "no"}
    if words.startswith("how many "):
        (kind,) = (kind for kind, plural in KINDS.items() if words == f"how many {plural} are there")
        return {NUMBERS[len(cells[kind])]}
    for ends, axis in (("left or right of", 1), ("above or below", 0)):
        if ends in words:
            (a,), (b,) = (cells[kind] for kind in words.removeprefix("is the ").split(f" {ends} the "))
            assert a[axis] != b[axis]
            return {ends.split()[0] if a[axis] < b[axis] else ends.split()[2]}
    raise AssertionError(text)


@pytest.mark.parametrize("family", LEVELS)
def test_answers_are_true_and_balanced(family: str) -> None:
    piles, given = decks(random.Random(0)), Counter[str]()
    for index in range(480):
        layout = lay_out(family, piles[family].deal(), random.Random(index))
        assert layout.question.family == family
        assert true_answer(layout.question.text, layout.side, layout.kinds) == {layout.question.answer}
        assert len(layout.kinds) == layout.side**2
        given[layout.question.answer] += 1
    assert max(given.values()) - min(given.values()) <= 1, given
    assert len(given) > 1


def test_positions_have_the_names_that_people_give_them() -> None:
    assert [position_name(2, n) for n in range(4)] == [
        *("at the top left", "at the top right"),
        *("at the bottom left", "at the bottom right"),
    ]
    assert [position_name(3, n) for n in (0, 1, 3, 4, 5, 7)] == [
        *("at the top left", "at the top middle", "at the middle left"),
        *("in the middle", "at the middle right", "at the bottom middle"),
    ]


@pytest.mark.parametrize("side", [1, 2, 3])
def test_each_photograph_lies_whole_in_its_cell(side: int) -> None:
    cells = [np.full((28, 28), 255 if n % 2 else 120, np.uint8) for n in range(side * side)]
    for seed in range(12):
        picture = np.asarray(draw(cells, side, random.Random(seed)).convert("L"), float)
        ground = picture.min()
        step = len(picture) // side
        area = 0.25 if side == 1 else 0.6  # the smallest share of its cell that a photograph may fill
        for position in range(side * side):
            row, column = divmod(position, side)
            cell = picture[row * step : (row + 1) * step, column * step : (column + 1) * step]
            bright = cell > ground + 10
            assert area - 0.02 <= bright.mean() <= 1
            level = np.median(cell[bright])
            assert (level > 0.7 * picture.max()) == (position % 2 == 1 or side == 1)


def test_photographs_that_are_not_there_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte cannot be read .*python -m lavi.parts fetch"):
        write_dataset(tmp_path / "out", source=tmp_path, seed=0, counts=COUNTS, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "end", "said"),
    [
        ("t10k-images-idx3-ubyte", -5, "cannot be read"),
        ("t10k-labels-idx1-ubyte", -1, "199 of 200"),
        (None, None, "seed"),
    ],
)
def test_photographs_that_are_not_whole_are_a_sentence(
    source: Path, tmp_path: Path, file: str | None, end: int | None, said: str
) -> None:
    folder = shutil.copytree(source, tmp_path / "photographs")
    if file is not None:
        (folder / file).write_bytes((folder / file).read_bytes()[:end])
    with pytest.raises(UserError, match=said):
        photographs(folder, "test", -1 if file is None else 0)

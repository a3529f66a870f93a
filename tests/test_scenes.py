"""The built-in data: reproducible, balanced, true, and ordinary."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import refused
from torch import Tensor, nn
from transformers import AutoTokenizer

from datamodules.formats.conversations import Conversations
from datamodules.patches import TowerScenes, patch_labels
from datamodules.scenes import (
    LARGE_SIDE,
    LEVELS,
    SIDE,
    SIZES,
    TRAINING_LEVELS,
    Scene,
    questions,
    questions_of_two,
    write_dataset,
)
from datamodules.shards.read import read_shard
from datamodules.shards.sources import find_shards
from datamodules.tokenizer import train_tokenizer
from lavi.data.preprocessing import SquareResize
from lavi.errors import UserError
from lavi.training.patch_classifier import PatchClassifier

decode = Conversations().decode


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*.tar"))
    }


def samples(folder: Path):  # type: ignore[no-untyped-def]
    return [decode(raw) for shard in find_shards(str(folder)) for raw in read_shard(shard)]


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(scenes: Path, tmp_path: Path) -> None:
    counts = {"train": 240, "validation": 48, "test": 48}
    write_dataset(tmp_path / "again", seed=0, counts=counts, turns=3, workers=1)
    write_dataset(tmp_path / "other", seed=1, counts=counts, turns=3, workers=2)
    assert digests(scenes) == digests(tmp_path / "again")
    assert not set(digests(scenes).values()) & set(digests(tmp_path / "other").values())


@pytest.mark.parametrize("module", ["scenes", "moving", "digits"])
def test_data_that_cannot_be_drawn_is_a_sentence(run, module: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Path("file").touch()
    refused(run(f"datamodules.{module}", "--out", "file"), "file")
    refused(run(f"datamodules.{module}", "--out", "file/deeper"), "be written")
    refused(run(f"datamodules.{module}", "--seed", "x"), "invalid int value")
    for option in ("train", "validation", "test", "turns", "workers") if module != "digits" else ():
        refused(run(f"datamodules.{module}", "--out", "new", f"--{option}", 0), f"--{option}: a whole number from 1")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_tokenizer_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the tokenizer folder .*file cannot be written"):
        train_tokenizer(["red"], tmp_path / "file")


def test_what_is_there_is_kept(scenes: Path, tmp_path: Path) -> None:
    counts = {"train": 240, "validation": 48, "test": 48}
    assert write_dataset(scenes, seed=0, counts=counts, turns=3, workers=1) is False
    with pytest.raises(UserError, match="holds other data"):
        write_dataset(scenes, seed=5, counts=counts, turns=3, workers=1)


def test_answers_are_balanced_so_that_guessing_is_chance(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", seed=3, counts={"train": 2000, "validation": 8, "test": 8}, turns=6, workers=2)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples(tmp_path / "d" / "train"):
        for said in sample.messages[1::2]:
            answers[said["family"]][said["content"]] += 1
    assert set(answers) == set(LEVELS)
    for family, given in answers.items():
        even = given.total() / len(given)
        likeliest = max(given.values())
        # A quarter above even, and two standard deviations where a family has many answers and few questions.
        assert likeliest < 1.25 * even + 2 * even**0.5, (
            f"{family}: the likeliest answer, {likeliest} of {given.total()}"
        )


def test_splits_share_no_scene(scenes: Path) -> None:
    seen = [{s.images[0].tobytes() for s in samples(scenes / split)} for split in ("train", "validation", "test")]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_every_family_is_asked_and_two_images_come_as_two(scenes: Path) -> None:
    for sample in samples(scenes / "test"):
        family = sample.messages[1]["family"]
        assert len(sample.images) == (2 if family == "two_images" else 1)
        assert sample.messages[1]["level"] == LEVELS[family]
    assert {s.messages[1]["family"] for s in samples(scenes / "test")} == set(LEVELS)


def test_answers_are_true() -> None:
    """Checked in another way than they are drawn: by what is in the picture."""
    for seed in range(60):
        scene, other = (Scene.draw_from(random.Random(f"{seed}/{i}")) for i in (0, 1))
        names = {t.name: t for t in scene.things}
        for q in [q for family in LEVELS for q in questions(scene, family)]:
            words = q.text.rstrip("?").split()
            if q.family == "existence":
                assert (q.answer == "yes") == any(words[-1] in name.split() for name in names)
            elif q.family == "reading":
                assert names[" ".join(words[-2:])].glyph == q.answer
            elif q.family == "comparison":
                a, b = names[" ".join(words[2:4])], names[" ".join(words[-2:])]
                assert (q.answer == "yes") == (SIZES[a.size] > SIZES[b.size])
            elif q.family == "relation":
                a, b = names[" ".join(words[2:4])], names[" ".join(words[-2:])]
                true = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
                assert true[q.answer]
        for q in questions_of_two(scene, other):
            name = " ".join(q.text.rstrip("?").split()[-2:])
            assert name in {t.name for t in (scene if q.answer == "first" else other).things}


def test_patch_labels_name_what_the_patch_shows() -> None:
    scene = Scene.draw_from(random.Random(5))
    labels = patch_labels(scene, 8)
    for thing in scene.things:
        patch = min(thing.y // 8, 7) * 8 + min(thing.x // 8, 7)
        assert labels["size"][patch] == 1 + list(SIZES).index(thing.size)
        centre = labels["centre"][patch]
        assert centre.tolist() == pytest.approx([thing.x / SIDE, thing.y / SIDE])
    empty = labels["colour"] == 0
    assert empty.any()
    assert torch.equal(empty, labels["centre"].isnan().any(-1))


class Still(nn.Module):
    """A tower whose features are its pixels."""

    width = 4

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def classified(features: Tensor, glyphs: list[int]) -> float:
    torch.manual_seed(0)
    classifier = PatchClassifier(Still(), classes={"glyph": 3}, centres=True)  # type: ignore[arg-type]
    classifier.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    shown = torch.tensor(glyphs) > 0
    centre = torch.where(shown[:, None], 0.5, torch.nan)
    batch = {"pixels": features[None], "glyph": torch.tensor([glyphs]), "centre": centre[None]}
    return float(classifier.training_step(batch, 0))


def test_a_letter_on_one_patch_counts_as_much_as_all_empty_ones() -> None:
    """Twice as many empty patches change nothing; without any letter, or any empty patch, there is a loss, too."""
    letter, empty = torch.randn(1, 4), torch.randn(3, 4)
    once = classified(torch.cat([letter, empty]), [2, 0, 0, 0])
    assert classified(torch.cat([letter, empty, empty]), [2] + [0] * 6) == pytest.approx(once)
    assert classified(letter, [2]) + classified(empty, [0] * 3) == pytest.approx(once)


def test_training_may_ask_all_families_alike_and_where_things_are(tmp_path: Path) -> None:
    """The held-out questions stay as they are."""
    counts = {"train": 80, "validation": 16, "test": 48}
    for name, even in (("even", True), ("usual", False)):
        write_dataset(tmp_path / name, seed=0, counts=counts, turns=6, workers=1, even=even)
    asked = Counter(m["family"] for s in samples(tmp_path / "even" / "train") for m in s.messages if "family" in m)
    assert set(asked) == {*LEVELS, *TRAINING_LEVELS}
    usual = Counter(m["family"] for s in samples(tmp_path / "usual" / "train") for m in s.messages if "family" in m)
    assert asked["relation"] / asked.total() > 1.5 * usual["relation"] / usual.total()
    about_two = [s for s in samples(tmp_path / "even" / "train") if len(s.images) == 2]
    assert max(len(s.messages) // 2 for s in about_two) > 3
    assert digests(tmp_path / "even" / "test") == digests(tmp_path / "usual" / "test")
    tokens = [
        AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer").tokenize("where is the red circle? top left")
        for name in ("even", "usual")
    ]
    assert len(tokens[0]) == 8 < len(tokens[1])
    with pytest.raises(UserError, match="holds other data"):
        write_dataset(tmp_path / "even", seed=0, counts=counts, turns=6, workers=1)


@pytest.mark.parametrize("side", [SIDE, LARGE_SIDE])
def test_where_things_are_is_true(side: int) -> None:
    asked = set()
    for seed in range(40):
        scene = Scene.draw_from(random.Random(f"places/{seed}"), side=side)
        assert scene.image().size == (side, side)
        half = side // 2
        things = {thing.name: thing for thing in scene.things}
        for question in (q for family in TRAINING_LEVELS for q in questions(scene, family)):
            words = question.text.rstrip("?").split()
            if question.family == "at":
                rows, columns = words[2], words[3]
                inside = [
                    t.name
                    for t in scene.things
                    if (t.y < half) == (rows == "top") and (t.x < half) == (columns == "left")
                ]
                assert [question.answer] == (inside or ["nothing"])
                asked.add(question.answer == "nothing")
                continue
            thing = things[" ".join(words[-2:])]
            if question.family == "size":
                assert question.answer == thing.size
            else:
                assert (
                    question.answer
                    == f"{'top' if thing.y < half else 'bottom'} {'left' if thing.x < half else 'right'}"
                )
    assert asked == {True, False}


def test_large_pictures_have_things_of_the_usual_size_none_across_two_tiles(tmp_path: Path) -> None:
    counts = {"train": 8, "test": 16}
    write_dataset(tmp_path, seed=0, counts=counts, turns=6, workers=1, large=True)
    assert {image.size for s in samples(tmp_path / "test") for image in s.images} == {(LARGE_SIDE, LARGE_SIDE)}
    tiles = set()
    for seed in range(40):
        for thing in Scene.draw_from(random.Random(seed), side=LARGE_SIDE).things:
            across, down = ((at - SIZES[thing.size], at + SIZES[thing.size] - 1) for at in (thing.x, thing.y))
            assert across[0] // SIDE == across[1] // SIDE
            assert down[0] // SIDE == down[1] // SIDE
            tiles.add((across[0] // SIDE, down[0] // SIDE))
    assert len(tiles) == 4


def test_the_tower_s_scenes_go_on_where_they_were_and_are_plain_data() -> None:
    data = TowerScenes(SquareResize(16), grid=2, batch_size=2)
    batches = iter(data.train_dataloader())
    first = [data.on_after_batch_transfer(next(batches), 0) for _ in range(3)]
    again = TowerScenes(SquareResize(16), grid=2, batch_size=2)
    again.load_state_dict(data.state_dict())
    fourth = next(iter(again.train_dataloader()))
    assert torch.equal(fourth["pixels"], next(batches)["pixels"])
    assert not torch.equal(fourth["pixels"], first[0]["pixels"])
    data.trainer = object()  # type: ignore[assignment]
    copied = pickle.loads(pickle.dumps(data.train_dataloader().dataset))  # type: ignore[attr-defined]
    assert torch.equal(copied[3]["pixels"], fourth["pixels"])

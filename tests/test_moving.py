"""The built-in videos: reproducible, true in what is seen, balanced, and ordinary shards."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import moving
from datamodules.moving import FRAMES, HOW_MANY, LEVELS, RATE, Play, make_samples, mp4, questions, write_dataset
from datamodules.scenes import COLOURS
from datamodules.shards.read import read_shard
from datamodules.shards.sources import find_shards
from datamodules.shards.write import ShardJob
from lavi.data.frame_sampling import FrameSampling
from lavi.data.videos import read_video
from lavi.errors import UserError

COUNTS = {"train": 24, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "moving"
    assert write_dataset(folder, seed=0, counts=COUNTS, turns=3, workers=2)
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    return [raw for shard in find_shards(str(folder)) for raw in read_shard(shard)]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*.tar"))
    }


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(clips: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", seed=0, counts=COUNTS, turns=3, workers=1)
    write_dataset(tmp_path / "other", seed=1, counts=COUNTS, turns=3, workers=1)
    assert len(digests(clips)) == 24
    assert digests(clips) == digests(tmp_path / "again")
    assert not set(digests(clips).values()) & set(digests(tmp_path / "other").values())


def test_what_is_there_is_kept(clips: Path) -> None:
    assert write_dataset(clips, seed=0, counts=COUNTS, turns=3, workers=1) is False
    with pytest.raises(UserError, match="holds other data"):
        write_dataset(clips, seed=5, counts=COUNTS, turns=3, workers=1)


def test_splits_share_no_clip(clips: Path) -> None:
    seen = [{raw["mp4"] for raw in samples(clips / split)} for split in COUNTS]
    assert [len(videos) for videos in seen] == list(COUNTS.values())
    assert len(set.union(*seen)) == sum(COUNTS.values())


def test_a_sample_is_a_video_and_questions_about_it(clips: Path) -> None:
    families = set()
    for raw in samples(clips / "train") + samples(clips / "test"):
        messages = json.loads(raw["json"])["messages"]
        assert [part["type"] for part in messages[0]["content"]] == ["video", "text"]
        assert [part["type"] for said in messages[2::2] for part in said["content"]] == ["text"] * (
            len(messages) // 2 - 1
        )
        asked = [said["content"][-1]["text"] for said in messages[::2]]
        assert len(set(asked)) == len(asked)
        assert all(said["level"] == LEVELS[said["family"]] for said in messages[1::2])
        families |= {said["family"] for said in messages[1::2]}
        video = read_video(raw["mp4"], FrameSampling(frames=8))
        assert [frame.size for frame in video.frames] == [(64, 64)] * 8
        assert video.duration == pytest.approx(FRAMES / RATE)
    assert families == set(LEVELS)
    assert {len(json.loads(raw["json"])["messages"]) for raw in samples(clips / "test")} == {2}


def centres(frames: list[np.ndarray], colour: str) -> list[tuple[float, float] | None]:
    """Where the pixels of a colour are, on average: (x, y) of each frame; None where there are none."""
    centres_of_frames: list[tuple[float, float] | None] = []
    for pixels in frames:
        near = np.abs(pixels.astype(int) - COLOURS[colour]).max(axis=-1) < 45
        centres_of_frames.append(
            (float(near.nonzero()[1].mean()), float(near.nonzero()[0].mean())) if near.sum() > 20 else None
        )
    return centres_of_frames


def test_answers_are_true_in_what_8_frames_show() -> None:
    """Checked in another way than they are drawn: by where the colours are in the decoded frames."""
    held: Counter[str] = Counter()
    for seed in range(120):
        play = Play.draw_from(random.Random(seed))
        colours = [actor.thing.colour for actor in play.actors]
        if len(set(colours)) < len(colours):
            continue
        video = read_video(mp4(play.frames()), FrameSampling(frames=8))
        seen = {colour: centres([np.asarray(frame) for frame in video.frames], colour) for colour in colours}
        first = {c: next(i for i, centre in enumerate(seen[c]) if centre) for c in colours}
        ways = {c: np.subtract(seen[c][-1], seen[c][first[c]]) for c in colours}  # type: ignore[arg-type]
        for q in (q for family in LEVELS for q in questions(play, family)):
            words = q.text.replace(",", "").rstrip("?").split()
            if q.family == "direction":
                x, y = ways[words[4]]
                across, along = ("right" if x > 0 else "left", abs(x)), ("down" if y > 0 else "up", abs(y))
                assert q.answer == max(across, along, key=lambda way: way[1])[0]
            elif q.family == "moving":
                assert q.answer == HOW_MANY[sum(np.abs(way).max() > 4 for way in ways.values())]
            elif q.family == "order":
                earlier, later = sorted((words[4], words[8]), key=lambda colour: first[colour])
                assert first[earlier] < first[later]
                assert q.answer.split()[0] == earlier
            elif q.kind == "colour":
                assert [c for c in colours if first[c]] == [q.answer]
            held[q.family] += 1
    assert min(held[family] for family in LEVELS) > 5


def test_answers_are_balanced_so_that_guessing_is_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "mp4", lambda frames: b"")
    monkeypatch.setattr(Play, "frames", lambda play: [])
    for turns in (1, 4):
        answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for sample in make_samples(ShardJob(0, 0, 3000), split="train", seed=0, turns=turns):
            messages = sample["json"]["messages"]
            for asked, said in zip(messages[::2], messages[1::2], strict=True):
                text, answer = asked["content"][-1]["text"], said["content"]
                kind = text.split()[1] if said["family"] == "appeared" else ""
                if said["family"] == "order":  # of 30 names, what counts is whether the first one named is right
                    answer = "first" if text.index(answer) < text.index(" or ") else "second"
                answers[said["family"], kind][answer] += 1
        assert {family for family, _ in answers} == set(LEVELS)
        assert [len(answers[key]) for key in sorted(answers)] == [6, 5, 4, 4, 2]
        for key, given in answers.items():
            even = given.total() / len(given)
            assert max(given.values()) < 1.15 * even + 2 * even**0.5, (key, given)

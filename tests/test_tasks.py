"""Benchmarks: read as they are published, answered once, kept, compared."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import answering, small
from PIL import Image
from task_files import TASK, WRITERS, dump, pictures, videos

from datamodules.questions import QuestionFile
from lavi.batch import Sample, Video, text_of
from lavi.config import files
from lavi.data.frame_sampling import FrameSampling
from lavi.efficiency.record import read_records
from lavi.errors import UserError
from lavi.evaluation.answer_tasks import answer_task
from lavi.evaluation.compare_runs import run_names
from lavi.evaluation.predictions import Answered, Part, PredictionFile, read_predictions, routes_of
from lavi.evaluation.tasks import FOLDER, Task, UnreadableError
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.base import Prediction

REPOSITORY = Path(__file__).parents[1]
ANSWERS: dict[str, list[tuple[str, list[str], str]]] = {
    # The last question of each: how its prompt ends, its references, its family.
    "vqav2": [("How many?\nAnswer the question using a single word or phrase.", ["red"] * 10, "other")],
    "gqa": [("Is it?\nAnswer the question using a single word or phrase.", ["no"], "query")],
    "vizwiz": [("'Unanswerable'.\nAnswer the question using a single word or phrase.", ["unanswerable"] * 10, "other")],
    "textvqa": [("what does it say?\nAnswer the question using a single word or phrase.", ["stop"] * 10, "all")],
    "pope": [("Is there a dog?\nAnswer the question using a single word or phrase.", ["no"], "coco_pope_random")],
    "mme": [("Is it 2?\nAnswer the question using a single word or phrase.", ["No"], "count")],
    "scienceqa": [("Which?\nA. iron\nB. wood\nAnswer with the option's letter", ["B", "wood"], "natural science")],
    "mmbench": [("Which?\nA. wood\nB. iron\nAnswer with the option's letter", ["A", "wood"], "nature")],
    "seed": [("A. one\nB. two\nC. three\nD. four\nAnswer", ["C", "three"], "1")],
    "docvqa": [("what date?\nAnswer the question", ["1/8/93", "8 Jan"], "all")],
    "infovqa": [("what share?\nAnswer", ["10%"], "all")],
    "chartqa": [("How many?\nAnswer the question with a single word.", ["14"], "test_human")],
    "ocrbench": [("what?", ["x+1"], "HME100k")],
    "mmmu": [("See <image 1>.\nA. $6\nB. $7\nAnswer", ["B", "$7"], "Accounting")],
    "coco_captions": [("caption for the provided image.", [f"A dog number {n}." for n in range(5)], "all")],
    "flickr30k": [("caption for the provided image.", [f"A dog number {n}." for n in range(5)], "all")],
    "msvd_qa": [("what is it?\nAnswer", ["a dog"], "all")],
    "msrvtt_qa": [("what is it?\nAnswer", ["a dog"], "all")],
    "activitynet_qa": [("what is it?\nAnswer", ["a dog"], "all")],
    "egoschema": [("What?\nA. C does 0.\nB. C does 1.", ["A", "C does 0."], "all")],
    "mvbench": [("What?\nA. yes\nB. no\nAnswer", ["B", "no"], "state_change")],
    "video_mme": [("How many?\nA. one\nB. two\nC. three\nD. four\nAnswer", ["C", "three"], "short")],
    "next_qa": [("why is it?\nA. one\nB. two\nC. three\nD. four\nE. five\nAnswer", ["E", "five"], "CW")],
}
COUNTS = {"vqav2": 2, "gqa": 2, "pope": 6, "mme": 2, "chartqa": 2, "ocrbench": 2, "mmbench": 2, "mvbench": 3}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def samples_of(name: str, folder: Path) -> list[Sample]:
    WRITERS[name](folder)
    questions = Task.load(name).questions
    return [questions.sample(record, folder) for record in questions.records(folder)]


def test_every_task_has_a_fixture() -> None:
    assert sorted(WRITERS) == sorted(ANSWERS) == sorted(file.stem for file in (REPOSITORY / FOLDER).glob("*.yaml"))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("here")
def test_a_benchmark_is_read_as_it_is_published(name: str, tmp_path: Path) -> None:
    samples = samples_of(name, tmp_path / name)
    assert len(samples) == COUNTS.get(name, 1)
    question, answer = samples[-1].messages
    ((words, references, family),) = ANSWERS[name]
    assert words in text_of(question["content"])
    assert not text_of(question["content"]).startswith(("\n", "nan"))
    assert (list(answer["references"]), answer["family"]) == (references, family)
    assert len(samples[-1].images) == (2 if name == "mmmu" else 1)
    if isinstance(video := samples[-1].images[0], Video):
        assert 1 <= len(video.frames) <= 32


@pytest.mark.usefixtures("here")
def test_what_is_asked_of_one_image_belongs_together(tmp_path: Path) -> None:
    for name in ("vqav2", "gqa", "pope", "mme"):
        assert len({sample.key for sample in samples_of(name, tmp_path / name)}) == 1
    (clip, frames, whole) = samples_of("mvbench", tmp_path / "mvbench")
    assert isinstance(clip.images[0], Video)
    assert isinstance(whole.images[0], Video)
    assert clip.images[0].duration == pytest.approx(1.0)
    assert whole.images[0].duration == pytest.approx(2.0)
    assert isinstance(frames.images[0], Video)
    assert [round(second, 2) for second in frames.images[0].seconds] == [0.0, 0.33, 0.67]  # of a folder, 3 a second
    (first, copy) = samples_of("mmbench", tmp_path / "mmbench")
    assert first.key == copy.key == "7"
    assert [sample.messages[-1]["level"] for sample in (first, copy)] == ["first", "copy"]


def question_file(**changes: Any) -> QuestionFile:
    settings: dict[str, Any] = {"file": "q.json", "prompt": "{question}", "answer": "answer", "image": "{image}"}
    return QuestionFile(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "record", "words"),
    [
        ({"answer": "anser"}, {}, "has no field 'anser': did you mean 'answer'"),
        ({"prompt": "{qestion}"}, {}, "has no field 'qestion': did you mean 'question'"),
        (
            {"options": ["a", "b"], "prompt": "{options}"},
            {"a": "x", "b": "y"},
            "'red' is no letter of the options 'x', 'y'",
        ),
        (
            {"options": ["a", "b"], "prompt": "{options}", "answer_is": "index"},
            {"a": "1", "b": "2", "answer": 2},
            "2 is no index of the options",
        ),
        ({"prompt": "{question:d}"}, {}, "cannot be filled"),
    ],
)
def test_a_task_that_does_not_fit_its_file_is_a_sentence(
    changes: dict[str, Any], record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    dump(tmp_path / "q.json", [{"question": "what?", "answer": "red", "image": "a.jpg"} | record])
    pictures(tmp_path, "a.jpg")
    source = question_file(**changes)
    with pytest.raises(UserError, match=words):
        source.sample(next(iter(source.records(tmp_path))), tmp_path)


def test_frames_in_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(tmp_path / "clip" / f"frame{number}.png")
    dump(tmp_path / "q.json", [{"question": "what?", "answer": "red", "clip": "clip"}])
    source = question_file(image=None, video="{clip}", frames=FrameSampling(frames=12))
    (sample,) = [source.sample(record, tmp_path) for record in source.records(tmp_path)]
    (video,) = sample.images
    assert isinstance(video, Video)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [20 * number for number in range(12)]


def test_a_clip_that_ends_behind_its_video_ends_with_it(tmp_path: Path) -> None:
    """MVBench has such; one that begins behind it cannot be seen."""
    videos(tmp_path, "a.mp4")  # two seconds
    dump(tmp_path / "q.json", [{"question": "?", "answer": "red", "start": start, "end": 9} for start in (1, 5)])
    source = question_file(image=None, video="a.mp4", clip=["start", "end"])
    seen, not_seen = source.records(tmp_path)
    (video,) = source.sample(seen, tmp_path).images
    assert isinstance(video, Video)
    assert (video.duration, video.seconds[0]) == (pytest.approx(1.0), pytest.approx(0.0, abs=0.13))
    with pytest.raises(UnreadableError, match="lies outside"):
        source.sample(not_seen, tmp_path)


@pytest.mark.parametrize(("name", "words"), [("gone.jpg", "gone.jpg"), ("q.json", "is not an image")])
def test_a_picture_that_cannot_be_read_leaves_its_question(name: str, words: str, tmp_path: Path) -> None:
    """It is asked of nobody, and still counts: with what would have been right."""
    dump(tmp_path / "q.json", [{"question": "what?", "answer": "red", "image": name}])
    source = question_file()
    with pytest.raises(UnreadableError, match=words) as caught:
        source.sample(next(iter(source.records(tmp_path))), tmp_path)
    assert caught.value.sample.messages[-1]["references"] == ["red"]


@pytest.mark.parametrize(
    ("answer", "options", "answer_is", "letter"),
    [("a", ["b", "a", "c"], "text", "B"), ("a", ["b", "a", "c"], "letter", "A"), ("1", ["2", "1"], "index", "B")],
)
def test_what_an_answer_is_is_said_and_not_guessed(
    answer: str, options: list[str], answer_is: str, letter: str, tmp_path: Path
) -> None:
    dump(tmp_path / "q.json", [{"question": "which?", "answer": answer, "options": options}])
    source = question_file(image=None, options="options", prompt="{options}", answer_is=answer_is)
    (sample,) = [source.sample(record, tmp_path) for record in source.records(tmp_path)]
    assert sample.messages[-1]["references"][0] == letter


@pytest.mark.parametrize(
    ("options", "answer", "answer_is", "shown", "letter"),
    [
        (["x", None, "y", "nan"], "C", "letter", "A. x\nC. y", "C"),
        (["x", None, "y", "nan"], "2", "index", "A. x\nC. y", "C"),
        (["", "x", "y"], "y", "text", "B. x\nC. y", "C"),
        (["x", "y", None, None], "B", "letter", "A. x\nB. y", "B"),
    ],
)
def test_an_empty_option_leaves_the_others_their_letters(
    options: list[Any], answer: str, answer_is: str, shown: str, letter: str, tmp_path: Path
) -> None:
    dump(tmp_path / "q.json", [{"answer": answer, "options": options}])
    source = question_file(image=None, options="options", prompt="{options}", answer_is=answer_is)
    (sample,) = [source.sample(record, tmp_path) for record in source.records(tmp_path)]
    assert sample.messages[0]["content"][0]["text"] == shown
    assert sample.messages[-1]["references"][0] == letter


def test_an_option_that_is_not_there_is_not_the_right_one(tmp_path: Path) -> None:
    dump(tmp_path / "q.json", [{"answer": "B", "options": ["x", None, "y"]}])
    source = question_file(image=None, options="options", prompt="{options}")
    with pytest.raises(UserError, match="'B' is no letter of the options"):
        source.sample(next(iter(source.records(tmp_path))), tmp_path)


@pytest.mark.parametrize(
    ("answer", "references"),
    [("[2006, 2010]", ["[2006, 2010]"]), (["red", "blue"], ["red", "blue"]), ("[red", ["[red"]), (3, ["3"])],
)
def test_an_answer_in_brackets_is_one_answer(answer: Any, references: list[str], tmp_path: Path) -> None:
    dump(tmp_path / "q.json", [{"question": "when?", "answer": answer}])
    source = question_file(image=None)
    (sample,) = [source.sample(record, tmp_path) for record in source.records(tmp_path)]
    assert sample.messages[-1]["references"] == references


def test_json_lines_may_be_one_and_a_mapping_of_answers_is_no_question(tmp_path: Path) -> None:
    """POPE's lines are in a file that ends in .json; EgoSchema's answers are one object."""
    question = {"question_id": 1, "question": "is there a dog?", "answer": "no"}
    (tmp_path / "q.json").write_text(json.dumps(question) + "\n")
    (record,) = question_file().records(tmp_path)
    assert record["question"] == "is there a dog?"
    (tmp_path / "q.json").write_text(json.dumps({"a": 3, "b": 1}) + "\n")
    assert [(one["key"], one["value"]) for one in question_file().records(tmp_path)] == [("a", 3), ("b", 1)]


def test_a_line_without_fields_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "what?"}\n[1, 2]\n')
    with pytest.raises(UserError, match=r"q\.jsonl:2 is no record with fields: \[1, 2\]"):
        list(question_file(file="q.jsonl").records(tmp_path))


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.tsv", "q.parquet"])
def test_a_file_of_questions_that_was_cut_or_is_no_text_is_a_sentence(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if file.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list([{"question": "what?" * 50, "answer": str(n)} for n in range(500)]).to_parquet(file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        file.write_bytes(b'{"question": "\xff\xfe", "answer": "\xff"}\n')
    with pytest.raises(UserError, match=rf"q\{file.suffix} (cannot be read to its end|is no text in UTF-8)"):
        list(question_file(file=name, image=None).records(tmp_path))


def test_questions_are_counted_without_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of scienceqa those with a picture, of mme all: as many as are asked; a limit is not exceeded."""
    for name in WRITERS:
        WRITERS[name](tmp_path / name)
        source = Task.load(name).questions
        asked = len(list(source.records(tmp_path / name)))
        assert source.count(tmp_path / name) == asked
        assert source.count(tmp_path / name, limit=1) == 1
    read: list[Any] = []
    monkeypatch.setattr("datamodules.questions._parquet", lambda file, columns: read.append(columns) or iter([{}]))
    Task.load("mme").questions.count(tmp_path / "mme")
    assert read == [[]]


def test_files_that_are_missing_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        list(question_file().records(tmp_path / "none"))
    with pytest.raises(UserError, match=r"there is no .*q\.json"):
        list(question_file().records(tmp_path))
    dump(tmp_path / "q.json", {"data": []})
    with pytest.raises(UserError, match="not one question"):
        list(question_file(within="data").records(tmp_path))
    with pytest.raises(UserError, match="say by 'options'"):
        question_file(prompt="{options}")
    with pytest.raises(UserError, match="there is no task"):
        Task.load("gqaa")


# --- whole evaluations ------------------------------------------------------------------------------------------------


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A task of 22 questions about 7 pictures, one of which is broken."""
    folder = tmp_path / "tasks" / "colours"
    pictures(folder, *(f"{n}.jpg" for n in range(7)))
    (folder / "6.jpg").write_bytes(b"no image")
    shapes = ("circle", "square", "triangle", "diamond")
    rows = [
        {"question": " ".join(shapes[: 1 + n % 3]), "answers": ["red"], "image": f"{n % 7}.jpg", "kind": shapes[n % 2]}
        for n in range(22)
    ]
    dump(folder / "q.json", rows)
    (tmp_path / "colours.yaml").write_text(TASK)
    return tmp_path


@pytest.fixture
def trained(run: Any, tiny_recipe: Path) -> Path:
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "out")[0] == 0
    return Path("out")


def evaluate(run: Any, colours: Path, *more: Any, out: str = "scored") -> tuple[str, Path]:
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", out, "--no-timing"]
    status, printed, problems = run("lavi.evaluate", "--checkpoint", "out", *where, *more)
    assert status == 0, problems
    return printed, Path(out) / "out" / "colours.jsonl"


def test_a_task_is_answered_and_kept(run: Any, trained: Path, colours: Path) -> None:
    printed, file = evaluate(run, colours)
    head, answers = read_predictions(file)
    assert [one.index for one in answers] == list(range(22))
    assert head["decoding"] == {"max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.0}
    assert {"torch", "transformers"} <= set(head["versions"])
    broken = [one for one in answers if one.error]
    assert [one.index for one in broken] == [6, 13, 20]
    assert all(one.prediction.answer == "" and one.prediction.score == 0 for one in broken)
    assert all(one.prediction.references == ("red",) for one in answers)
    assert all("what colour is the circle" in one.prompt for one in answers if not one.error)
    assert "of 22 questions" in printed
    assert "3 could not be asked and count as wrong, the first of them:" in printed
    (record,) = read_records(file.parent / "tasks.jsonl")
    right = sum(one.prediction.score for one in answers)
    assert record.accuracy["all"] == pytest.approx(100 * right / 22)
    assert set(record.accuracy) == {"all", "level/all", "family/circle", "family/square"}
    assert set(record.accuracy_intervals) == set(record.accuracy)
    assert record.flops_of_samples["vision_encoder"] > 0
    assert (record.knobs["task"], record.knobs["unreadable"]) == ("colours", 3)
    assert not list(file.parent.glob("*.part-*"))


def test_batches_do_not_change_an_answer(build: Any, colours: Path) -> None:
    """Of a model whose answers depend on what it sees: prompts of several lengths, one broken picture."""
    model, task = answering(build, LaViFusion(every=1, generator=small())), Task.load(str(colours / "colours.yaml"))

    def answers(batch_size: int) -> list[Answered]:
        kept = PredictionFile(colours / f"of-{batch_size}.jsonl", {})
        folder, device = colours / "tasks" / "colours", torch.device("cpu")
        answer_task(model, task, folder, kept.part(0), done=set(), device=device, batch_size=batch_size)
        return kept.answered()

    one = answers(1)
    assert one == answers(8) == answers(3)
    assert len({answered.prediction.answer for answered in one}) > 3


def test_what_was_answered_is_not_answered_again(run: Any, trained: Path, colours: Path) -> None:
    """What could not be asked is, when its picture has come."""
    _, file = evaluate(run, colours)
    before = file.read_text()
    printed, _ = evaluate(run, colours)
    assert "answered before" not in printed
    assert file.read_text() == before
    pictures(colours / "tasks" / "colours", "6.jpg")
    printed, _ = evaluate(run, colours)
    assert "could not be asked" not in printed
    answers = {line for line in file.read_text().splitlines() if '"error": ""' in line}
    assert len(answers) == 22
    assert answers > {line for line in before.splitlines() if '"error": ""' in line}
    before = file.read_text()
    printed, _ = evaluate(run, colours)
    assert "answered before" in printed
    assert file.read_text() == before
    assert not list(file.parent.glob("*.part-*"))
    status, _, problems = run(
        "lavi.evaluate", "--checkpoint", "out", "--tasks", colours / "colours.yaml", "--data", colours / "tasks",
        "--out", "scored", "--no-timing", "--limit", 4,
    )  # fmt: skip
    assert status == 2
    assert "answers of before --limit changed (from None to 4): answer anew with --again" in problems
    evaluate(run, colours, "--limit", 4, "--again")
    assert len(read_predictions(file)[1]) == 4


def test_a_picture_that_was_missing_is_asked_about_when_it_is_there(run: Any, trained: Path, colours: Path) -> None:
    """Of an evaluation that was stopped; a whole one says what is missing. Nothing readable is no evaluation."""
    for file in (colours / "tasks" / "colours").glob("*.jpg"):
        file.rename(file.with_suffix(".gone"))
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", "scored", "--no-timing"]
    status, _, problems = run("lavi.evaluate", "--checkpoint", "out", *where)
    assert status == 2
    assert "not one question could be asked" in problems
    for file in (colours / "tasks" / "colours").glob("*.gone"):
        file.rename(file.with_suffix(".jpg"))
    _, scored = evaluate(run, colours)
    assert sum(bool(one.error) for one in read_predictions(scored)[1]) == 3


def test_other_questions_are_another_task(run: Any, trained: Path, colours: Path) -> None:
    evaluate(run, colours)
    file = colours / "tasks" / "colours" / "q.json"
    file.write_text(file.read_text().replace("triangle", "cross"))
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", "scored", "--no-timing"]
    status, _, problems = run("lavi.evaluate", "--checkpoint", "out", *where)
    assert status == 2
    assert "answers of before the files of questions changed" in problems


def test_runs_of_one_name_are_told_apart_by_the_folders_above_them() -> None:
    assert run_names([Path("a/seed-0"), Path("b/seed-0")]) == ["a-seed-0", "b-seed-0"]
    assert run_names([Path("a/one"), Path("b/two")]) == ["one", "two"]
    with pytest.raises(UserError, match="named twice"):
        run_names([Path("a/one"), Path("a/one")])


ODD = "a\u2028b\u0085c\r\n\ud800d"
"""Characters that some take for ends of lines, and half of one."""


def test_answers_of_any_characters_are_read_again(tmp_path: Path) -> None:
    kept = PredictionFile(tmp_path / "a.jsonl", {"task": ODD})
    answers = [
        Answered(n, Prediction(ODD, (ODD, "x"), "0", question=ODD), ODD, 3, routes=[((1, 2), 2)]) for n in (0, 1)
    ]
    part = kept.part(0)
    part.add(answers[:1])
    part.add(answers[1:])
    kept.part(0)  # begun again: nothing is lost
    assert [one.prediction.answer.replace("?", "\ud800") for one in kept.answered()] == [ODD, ODD]
    assert [one.routes for one in kept.answered()] == [[((1, 2), 2)]] * 2
    kept.finish(kept.answered())
    assert len(read_predictions(kept.file)[1]) == 2


def test_a_batch_that_was_cut_short_is_answered_again_whole(tmp_path: Path) -> None:
    """With its routes: they are counted once."""
    kept = PredictionFile(tmp_path / "a.jsonl", {})
    batch = [Answered(n, Prediction("x", ("y",), "0"), "p", 3, routes=[("both", 2)] if not n else []) for n in (0, 1)]
    part = kept.part(0)
    part.add(batch)
    whole = part.file.read_bytes()
    for length in range(len(whole) - 1, 3, -7):
        part.file.write_bytes(whole[:length])
        again = kept.part(0)
        assert kept.answered() == []
        again.add(batch)
        assert routes_of(kept.answered()) == {"both": 2}


def test_an_answer_is_kept_before_why_there_was_none(tmp_path: Path) -> None:
    """Whichever part they are in: a repaired picture may be asked about by another process than before."""
    kept = PredictionFile(tmp_path / "a.jsonl", {})
    failed = Answered(0, Prediction("", ("y",), "0", score=0.0), "", 0, error="it was missing")
    said = Answered(0, Prediction("y", ("y",), "0", score=1.0), "p", 3)
    kept.part(0).add([said])
    kept.part(1).add([failed])
    assert kept.answered() == [said]
    other = PredictionFile(tmp_path / "b.jsonl", {})
    other.part(0).add([failed])
    other.part(1).add([said])
    assert other.answered() == [said]


def test_routes_are_kept_with_an_answer_that_is_not_given_again(
    build: Any, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that could not be asked is asked again: what it held would be lost."""
    model, counts = build(LaViFusion(every=2, generator=small())), Counter[str]()
    monkeypatch.setattr(LaViFusion, "route_counts", counts)

    def answer(batch: Any, *, max_new_tokens: int) -> list[str]:
        counts["one"] += len(batch)
        return ["red"] * len(batch)

    monkeypatch.setattr(model, "answer", answer)
    task, part = Task.load(str(colours / "colours.yaml")), Part(colours / "a.part-0.jsonl", {})
    folder = colours / "tasks" / "colours"
    answer_task(model, task, folder, part, done=set(), device=torch.device("cpu"), batch_size=2)
    answered = PredictionFile(colours / "a.jsonl", {}).answered()
    assert [one.index for one in answered if one.error] == [6, 13, 20]
    assert not any(one.routes for one in answered if one.error)
    assert routes_of(answered) == {"one": 19}


def test_what_was_scored_is_kept_when_a_later_task_fails(run: Any, trained: Path, colours: Path) -> None:
    """Its questions are there, and not one picture."""
    (colours / "later.yaml").write_text((colours / "colours.yaml").read_text().replace("name: colours", "name: later"))
    (colours / "tasks" / "later").mkdir()
    shutil.copy(colours / "tasks" / "colours" / "q.json", colours / "tasks" / "later")
    tasks = [str(colours / f"{name}.yaml") for name in ("colours", "later")]
    status, _, problems = run(
        "lavi.evaluate", "--checkpoint", "out", "--tasks", *tasks, "--data", colours / "tasks", "--out", "scored"
    )
    assert status == 2
    assert "not one question could be asked" in problems
    (record,) = read_records(Path("scored/out/tasks.jsonl"))
    assert record.knobs["task"] == "colours"


def test_tasks_of_one_name_would_share_a_file(run: Any, trained: Path, colours: Path) -> None:
    task = str(colours / "colours.yaml")
    status, _, problems = run(
        "lavi.evaluate", "--checkpoint", "out", "--tasks", task, task, "--data", colours / "tasks"
    )
    assert status == 2
    assert "two tasks are called 'colours'" in problems


def test_another_prompt_is_another_task(run: Any, trained: Path, colours: Path) -> None:
    evaluate(run, colours)
    (colours / "colours.yaml").write_text(TASK.replace("what colour is", "which colour has"))
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", "scored", "--no-timing"]
    status, _, problems = run("lavi.evaluate", "--checkpoint", "out", *where)
    assert status == 2
    assert "answers of before the task's own file changed" in problems


def test_a_run_whose_recipe_was_changed_is_another_model(run: Any, trained: Path, colours: Path) -> None:
    """Its weights are the same, and it asks otherwise."""
    evaluate(run, colours)
    recipe = Path("out/recipe.yaml")
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["chat_template"] = "vicuna"
    recipe.write_text(yaml.safe_dump(settings))
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", "scored", "--no-timing"]
    status, _, problems = run("lavi.evaluate", "--checkpoint", "out", *where)
    assert status == 2
    assert "answers of before the model's recipe changed" in problems


def test_one_command_at_a_time_answers_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would take each other's parts away."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    one, other = (PredictionFile(tmp_path / "a.jsonl", {"task": "a"}) for _ in range(2))
    with one.locked(), pytest.raises(UserError, match=r"another process is answering into .*a\.jsonl"), other.locked():
        pass
    with other.locked():
        pass
    assert not list(tmp_path.iterdir())


def test_batches_are_counted_as_they_are_written(tmp_path: Path) -> None:
    kept = PredictionFile(tmp_path / "a.jsonl", {"task": "a"})
    assert kept.batches() == 0
    parts = [kept.part(rank) for rank in range(2)]
    assert kept.batches() == 0
    for number, part in enumerate([*parts, parts[0]], start=1):
        part.add([])
        assert kept.batches() == number
    with open(parts[1].file, "a") as stream:
        stream.write("[")  # not whole yet
    assert kept.batches() == 3


def test_a_mistake_that_a_process_meets_is_a_sentence(run: Any, trained: Path, colours: Path) -> None:
    (colours / "colours.yaml").write_text(TASK.replace("answer: ", "answer: not-"))
    status, _, problems = run(
        "lavi.evaluate", "--checkpoint", "out", "--tasks", colours / "colours.yaml", "--data", colours / "tasks",
        "--processes", 2, "--no-timing",
    )  # fmt: skip
    assert status == 2
    assert "Traceback" not in problems
    assert "not-" in problems


def test_a_prompt_that_fills_the_context_shortens_no_other_answer(build: Any, colours: Path) -> None:
    model, task = answering(build, LaViFusion(every=1, generator=small())), Task.load(str(colours / "colours.yaml"))
    folder, device = colours / "tasks" / "colours", torch.device("cpu")

    def answers(name: str, batch_size: int) -> list[Answered]:
        kept = PredictionFile(colours / f"{name}.jsonl", {})
        answer_task(model, task, folder, kept.part(0), done=set(), device=device, batch_size=batch_size)
        return kept.answered()

    lengths = sorted({one.text_tokens for one in answers("as-it-is", 8) if not one.error})
    room = model.room_behind
    model.room_behind = lambda length: 1 if length == lengths[-1] else room(length)  # of the longest prompts
    alone, together = answers("alone", 1), answers("together", 8)
    assert alone == together
    longest = [len(one.prediction.answer) for one in alone if one.text_tokens == lengths[-1]]
    others = [len(one.prediction.answer) for one in alone if one.text_tokens < lengths[-1] and not one.error]
    assert max(longest) < max(others)


def test_an_evaluation_that_is_killed_gives_the_file_of_one_go(
    run: Any, trained: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times, at random bytes of what was to be written."""
    _, whole = evaluate(run, colours, "--batch-size", 2, out="whole")
    rng = random.Random(0)
    add = Part.add

    def die(self: Part, answers: Any) -> None:
        if rng.random() < 0.4:
            line = json.dumps([one.row() for one in answers])
            with open(self.file, "a") as stream:
                stream.write(line[: rng.randrange(len(line))])
            raise KeyboardInterrupt
        add(self, answers)

    monkeypatch.setattr(Part, "add", die)
    where = ["--tasks", colours / "colours.yaml", "--data", colours / "tasks", "--out", "cut", "--no-timing"]
    kills = 0
    file = Path("cut/out/colours.jsonl")
    while not file.is_file():
        status, _, _ = run("lavi.evaluate", "--checkpoint", "out", *where, "--batch-size", 2)
        kills += status != 0
        assert kills < 100
    assert kills >= 3
    assert file.read_text() == whole.read_text()


@pytest.mark.slow
def test_a_process_that_is_killed_ten_times_gives_the_file_of_one_go(run: Any, trained: Path, colours: Path) -> None:
    """By the system, at random times, two processes answering."""
    _, whole = evaluate(run, colours, "--batch-size", 1, out="whole")
    rng, file = random.Random(0), Path("cut/out/colours.jsonl")
    command = [sys.executable, "-m", "lavi.evaluate", "--checkpoint", "out", "--tasks", str(colours / "colours.yaml")]
    command += [
        "--data",
        str(colours / "tasks"),
        "--out",
        "cut",
        "--no-timing",
        "--batch-size",
        "1",
        "--processes",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for _ in range(10):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(8, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert file.read_text() == whole.read_text()


def test_several_processes_give_the_file_of_one(run: Any, trained: Path, colours: Path) -> None:
    _, alone = evaluate(run, colours, "--batch-size", 4, out="alone")
    _, shared = evaluate(run, colours, "--batch-size", 4, "--processes", 2, out="shared")
    assert shared.read_text() == alone.read_text()


def test_two_runs_are_compared_and_timed(run: Any, tiny_recipe: Path, trained: Path, colours: Path) -> None:
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "other", "seed=1")[0] == 0
    status, printed, problems = run(
        "lavi.evaluate", "--checkpoint", "out", "other", "--tasks", colours / "colours.yaml",
        "--data", colours / "tasks", "--limit", 5,
    )  # fmt: skip
    assert status == 0, problems
    assert "points above out (95 % interval; p)" in printed
    assert "ms prefill, median" in printed
    assert Path("out/tasks/colours.jsonl").is_file()
    assert Path("other/tasks/colours.jsonl").is_file()


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "a.jsonl", {"task": "a"})
    (tmp_path / "a.part-0.jsonl").write_text('{"task": "a"}\n{"index": 1}\n')
    with pytest.raises(UserError, match=r"a\.part-0\.jsonl:2 is no answer"):
        file.answered()
    (tmp_path / "a.part-0.jsonl").write_text(json.dumps({"task": "b"}) + "\n")
    with pytest.raises(UserError, match=r"before the task's own file changed \(from b to a\)"):
        file.answered()

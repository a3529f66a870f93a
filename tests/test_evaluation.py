"""What a score is of: the right questions, images and answers, of each sample once, and nothing kept of it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ask, image
from PIL import Image

from lavi.batch import Batch, CachedVisual, Layout, Sample, Video
from lavi.errors import UserError
from lavi.evaluation.controls import with_images_of_others, with_noise
from lavi.evaluation.scoring import PromptSizes, Scores, prompts_of
from lavi.evaluation.scoring import evaluate as evaluate_with
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.answers import ExactMatch
from lavi.model import VisionLanguageModel

CPU = torch.device("cpu")
IMAGE = {"type": "image"}


def evaluate(model: VisionLanguageModel, samples: Iterable[Sample]) -> Scores:
    """The share of answers that match exactly."""
    return evaluate_with(model, samples, metric=ExactMatch(), device=CPU)


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def two_turns(key: str, first: int, second: int) -> Sample:
    """Two questions, each about an image of its own; the second answer is given in parts."""
    messages = [
        {"role": "user", "content": [IMAGE, said("what colour?")]},
        {"role": "assistant", "content": f"c{first}", "family": "colour"},
        {"role": "user", "content": [said("and "), IMAGE, said("this?")]},
        {"role": "assistant", "content": [said(f"c{second}")], "family": "other", "level": "hard"},
    ]
    return Sample(key, messages, [image(first), image(second)])


@pytest.fixture
def seeing(build, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:  # type: ignore[no-untyped-def]
    """A model that answers with the number of the last image it sees, and ``nothing`` where it sees none."""
    model = build(LaViFusion(every=2))
    number = {float(model.vision.preprocessing(image(seed)).sum()): seed for seed in range(100)}
    asked: list[str] = []
    model.asked = asked

    def answer(batch: Batch, **_: Any) -> list[str]:
        asked.extend(model.chat.tokenizer.decode(row) for row in batch.input_ids)
        visible: list[str] = ["nothing"] * len(batch)
        for slot, view in zip(batch.image_slots, batch.pixels, strict=True):
            visible[slot.row] = f"c{number[float(view.sum())]}"
        return visible

    monkeypatch.setattr(model, "answer", answer)
    return model


def test_a_prompt_has_what_was_said_and_shown_before_its_answer() -> None:
    sample = two_turns("s", 1, 2)
    (first, red), (second, blue) = prompts_of(sample)
    assert [len(prompt.messages) for prompt in (first, second)] == [1, 3]
    assert [list(prompt.images) for prompt in (first, second)] == [sample.images[:1], sample.images]
    assert red == (("c1",), "colour", "all", "what colour?")
    assert blue == (("c2",), "other", "hard", "and this?")
    unmarked = Sample("u", [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}], [image(1)])
    assert [list(prompt.images) for prompt, _ in prompts_of(unmarked)] == [unmarked.images]


def test_scores_and_controls_are_of_the_right_images(seeing: VisionLanguageModel) -> None:
    """Who names the image it sees has all answers right, none with the images of others, none without."""
    samples = [two_turns(f"s{n}", 2 * n, 2 * n + 1) for n in range(5)] + [ask("hello?", answer="nothing", key="text")]
    scores = evaluate(seeing, samples)
    assert scores.accuracy == pytest.approx(
        {
            "all": 100.0,
            "family/all": 100,
            "family/colour": 100,
            "family/other": 100,
            "level/all": 100,
            "level/hard": 100,
        }
    )
    for control in scores.controls.values():
        assert control["family/colour"] == control["family/other"] == 0
        assert control["family/all"] == 100  # it asked about no image
    assert (scores.samples, scores.answers, scores.shuffled_answers) == (6, 11, 11)
    assert (scores.metric, scores.label) == ("ExactMatch", "right")


def test_a_wrong_answer_counts_as_wrong(seeing: VisionLanguageModel) -> None:
    samples = [ask(1, "what?", answer="c1"), ask(2, "what?", answer="C2 "), ask(3, "what?", answer="c4")]
    assert evaluate(seeing, samples).accuracy["all"] == pytest.approx(200 / 3)


def test_no_prompt_holds_its_answer(seeing: VisionLanguageModel) -> None:
    samples = [ask(n, "what?", answer=f"answer {n} is it") for n in range(3)]
    evaluate(seeing, samples)
    assert len(seeing.asked) == 9  # type: ignore[arg-type]
    assert not any("is it" in prompt for prompt in seeing.asked)  # type: ignore[union-attr]


def test_a_prompt_that_fills_the_context_is_answered_alone(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it there is room for a short answer; the others keep theirs."""
    asked: list[tuple[int, int, int]] = []

    def answer(batch: Batch, *, max_new_tokens: int) -> list[str]:
        asked.append((len(batch), batch.input_ids.shape[1], max_new_tokens))
        return ["a"] * len(batch)

    monkeypatch.setattr(seeing, "answer", answer)
    far = "circle is blue what red square is yes no green"  # so long that an answer is not cut behind it
    needed = len(seeing.processor.chat.tokenizer(far, add_special_tokens=False)["input_ids"]) + 4
    context, short = seeing.language.context_length, ask("what?", answer=far)
    long = ask("circle " * 240, answer=far)
    length = seeing.processor.encode(next(prompts_of(long))[0], prompt=True).length
    assert context - needed < length < context
    evaluate(seeing, [short, long, short])
    alone = [one for one in asked if one[1] == length]
    assert set(alone) == {(1, length, context - length + 1)}
    assert {tokens for _, columns, tokens in asked if columns < length} == {needed}


def test_a_short_truth_near_the_end_of_the_context_shortens_no_longer_one(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room behind it for its own answer, and not for that of its neighbour, before it or behind it."""
    asked: list[tuple[int, int]] = []

    def answer(batch: Batch, *, max_new_tokens: int) -> list[str]:
        asked.append((batch.input_ids.shape[1], max_new_tokens))
        return ["a"] * len(batch)

    monkeypatch.setattr(seeing, "answer", answer)
    tokenizer = seeing.processor.chat.tokenizer
    far = "circle is blue what red square is yes no green"
    needed = len(tokenizer(far, add_special_tokens=False)["input_ids"]) + 4
    own = len(tokenizer("red", add_special_tokens=False)["input_ids"]) + 4

    def room(words: int) -> int:
        prompt, _ = next(prompts_of(ask("circle " * words, answer="red")))
        return seeing.room_behind(seeing.processor.encode(prompt, prompt=True).length)

    words = next(words for words in range(250, 0, -1) if room(words) >= own)
    assert own <= room(words) < needed
    filling = ask("circle " * words, answer="red")
    evaluate(seeing, [ask("what?", answer=far), filling, ask("what?", answer=far)])
    longest = max(columns for columns, _ in asked)
    assert {tokens for columns, tokens in asked if columns < longest} == {needed}


def test_a_sample_that_cannot_be_encoded_is_left_out_and_counted(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the images of another do not fit: then of the control alone."""
    kind = type(seeing.processor.preprocessing)
    usual = kind.__call__

    def preprocess(self: Any, picture: Image.Image) -> torch.Tensor:
        if picture.width == 7:
            raise ZeroDivisionError("of width 7")
        return usual(self, picture)

    monkeypatch.setattr(kind, "__call__", preprocess)
    broken = Sample("broken", ask(0, "what?", answer="c0").messages, [Image.new("RGB", (7, 7))])
    scores = evaluate(seeing, [ask(1, "what?", answer="c1"), broken, ask(2, "what?", answer="c2")])
    assert (scores.samples, scores.answers, scores.shuffled_answers) == (2, 2, 2)
    assert scores.left_out == {"of width 7": 1}
    assert scores.accuracy["all"] == 100
    count_visual_tokens = seeing.processor.count_visual_tokens
    monkeypatch.setattr(
        seeing.processor,
        "count_visual_tokens",
        lambda layout: 240 * (layout.size == (90, 90)) or count_visual_tokens(layout),
    )
    large = Sample("large", ask(0, "what?", answer="c0").messages, [image(1).resize((90, 90))])
    wordy = ask(2, "circle " * 100, answer="c2", key="wordy")
    monkeypatch.setattr(seeing, "answer", lambda batch, **_: ["c0"] * len(batch))
    scores = evaluate(seeing, [large, wordy])
    assert (scores.answers, scores.shuffled_answers) == (2, 1)


def test_a_score_is_of_at_least_one_question(seeing: VisionLanguageModel) -> None:
    with pytest.raises(UserError, match="not one question to score"):
        evaluate(seeing, [])


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 17])
def test_every_sample_gets_the_images_of_another(count: int) -> None:
    """Of one with as many, of the same kinds; also the last of a window that is left alone."""
    samples = [ask(n, "what?", answer="a", key=f"one{n}") for n in range(count)]
    samples += [two_turns(f"two{n}", 100 + n, 200 + n) for n in range(count)]
    samples += [Sample(f"v{n}", samples[0].messages, [Video([image(300 + n)])]) for n in range(count)]
    own = {sample.key: sample.images for sample in samples}
    exchanged = list(with_images_of_others(samples, window=4))
    assert sorted(sample.key for sample in exchanged) == sorted(own)
    for sample in exchanged:
        assert sample.images not in (own[sample.key], [])
        assert [type(one) for one in sample.images] == [type(one) for one in own[sample.key]]
        assert sample.images in own.values()


def test_a_sample_whose_images_nobody_can_take_is_left_out() -> None:
    text = ask("what?", answer="a", key="text")
    samples = [text, ask(1, "what?", answer="a", key="one"), two_turns("two", 1, 2)]
    assert list(with_images_of_others(samples)) == [text]


def test_noise_on_images_has_the_deviation_that_is_named() -> None:
    """In each pixel and colour; of a video in each frame its own; of features on the image that they were made of."""
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    cached = CachedVisual(torch.zeros(1, 16, 8), Layout(), lambda: grey)
    sample = Sample("s", [], [grey, Video([grey, grey], seconds=[0.0, 1.0]), cached])
    still, video, of_cache = with_noise(sample, 0.1, seed=3).images
    assert isinstance(video, Video)
    assert video.seconds == [0.0, 1.0]
    pictures = [np.asarray(one, dtype=float) for one in (still, *video.frames, of_cache)]
    for pixels in pictures:
        assert pixels.shape == (48, 64, 3)
        assert pixels.std() == pytest.approx(25.5, rel=0.05)
        assert pixels.mean() == pytest.approx(128, abs=1.5)
    assert all((one != other).any() for one, other in itertools.combinations(pictures, 2))
    again, other = (with_noise(sample, 0.1, seed=seed).images[0] for seed in (3, 4))
    assert (np.asarray(again) == pictures[0]).all()
    assert (np.asarray(other) != pictures[0]).any()
    white = with_noise(Sample("s", [], [Image.new("RGB", (64, 48), (255, 255, 255))]), 0.1, seed=0)
    assert 230 < np.asarray(white.images[0]).mean() < 255  # cut at white, not wrapped to black


def test_noise_is_as_strong_on_large_images_as_on_small_ones() -> None:
    """Drawn at the size that a tower sees: made smaller, a large image keeps it."""
    for size in ((32, 32), (64, 48), (640, 480), (1600, 900)):
        sample = Sample("s", [], [Image.new("RGB", size, (128, 128, 128))])
        (shown,) = with_noise(sample, 0.1, seed=0, cells=(32, 32)).images
        assert isinstance(shown, Image.Image)
        assert shown.size == size
        seen = np.asarray(shown.resize((32, 32), Image.Resampling.BOX), dtype=float)
        assert 0.8 * 25.5 < seen.std() < 1.05 * 25.5


def test_noisy_images_are_a_control_beside_the_others(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(batch: Batch, **_: Any) -> list[str]:
        answers = ["nothing"] * len(batch)
        for slot, view in zip(batch.image_slots, batch.pixels, strict=True):
            answers[slot.row] = "even" if float(view.std(dim=(1, 2)).max()) < 1e-3 else "rough"
        return answers

    monkeypatch.setattr(seeing, "answer", answer)
    plain = [Image.new("RGB", (16, 16), (60, 60, 60))]
    samples = [Sample(str(n), ask(0, "what?", answer="even").messages, plain) for n in range(3)]
    scores = evaluate_with(seeing, samples, metric=ExactMatch(), device=CPU, noise=[0.25, 0.5])
    assert scores.accuracy["all"] == 100
    assert {name: control["all"] for name, control in scores.controls.items()} == {
        "shuffled images": 100,
        "no image": 0,
        "noise of 0.25": 0,
        "noise of 0.5": 0,
    }
    assert scores.control_intervals.keys() == scores.controls.keys()


def test_a_model_sees_noise_on_a_large_image_as_on_a_small_one(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    deviations: list[float] = []

    def answer(batch: Batch, **_: Any) -> list[str]:
        deviations.extend(float(view.std()) for view in batch.pixels)
        return ["a"] * len(batch)

    monkeypatch.setattr(seeing, "answer", answer)
    _, rows, columns = seeing.vision.pixel_shape
    for size in ((columns, rows), (20 * columns, 20 * rows)):
        flat = Sample("s", ask(0, "what?", answer="a").messages, [Image.new("RGB", size, (128, 128, 128))])
        evaluate_with(seeing, [flat], metric=ExactMatch(), device=CPU, noise=[0.1])
    small, large = (one for one in deviations if one > 1e-3)
    assert large > 0.6 * small  # making it smaller smooths a little; noise of single pixels would be a twentieth


def test_what_noise_cannot_be_put_on_is_left_out_of_that_control_and_counted(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample has its own noise, the same whatever was left out before it."""
    shown: list[torch.Tensor] = []

    def answer(batch: Batch, **_: Any) -> list[str]:
        shown.extend(batch.pixels)
        return ["even"] * len(batch)

    def broken() -> Image.Image:
        raise UserError("gone")

    monkeypatch.setattr(seeing, "answer", answer)
    plain = Image.new("RGB", (16, 16), (60, 60, 60))
    features = seeing.vision(torch.zeros(1, *seeing.vision.pixel_shape)).detach()
    layout = seeing.processor.encode(ask(0, "what?", answer="even")).layouts[0]
    cached = CachedVisual(features, layout, broken)
    samples = [Sample(str(n), ask(0, "what?", answer="even").messages, [plain]) for n in range(2)]
    scores = evaluate_with(seeing, samples, metric=ExactMatch(), device=CPU, noise=[0.25])
    alone, shown[:] = list(shown), []
    odd = Sample("odd", samples[0].messages, [cached])
    with_odd = evaluate_with(seeing, [odd], metric=ExactMatch(), device=CPU, noise=[0.25])
    assert (scores.left_out, scores.controls["noise of 0.25"]["all"]) == ({}, 100)
    assert with_odd.left_out == {"noise of 0.25: gone": 1}
    assert with_odd.controls["noise of 0.25"] == {}
    noisy = [view for view in alone if float(view.std(dim=(1, 2)).max()) > 1e-3]
    assert len(noisy) == 2
    assert not torch.equal(noisy[0], noisy[1])


class Counted:
    """How many samples are there at most at a time, when one is drawn after the other."""

    def __init__(self, count: int, size: tuple[int, int] = (8, 8)) -> None:
        self.count, self.size = count, size
        self.alive = self.most = 0

    def __iter__(self) -> Iterator[Sample]:
        for number in range(self.count):
            picture = Image.new("RGB", self.size)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(picture, self.gone)
            yield Sample(str(number), ask(0, "what?", answer="a").messages, [picture])
            del picture

    def gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize(("size", "most"), [((8, 8), 66), ((8000, 4000), 6)], ids=["small", "large"])
def test_nothing_is_kept_of_a_sample_that_was_scored(
    seeing: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], most: int
) -> None:
    """However many there are; of large images fewer are held at a time."""
    monkeypatch.setattr(seeing, "answer", lambda batch, **_: ["a"] * len(batch))
    pixels = torch.zeros(seeing.vision.pixel_shape)
    monkeypatch.setattr(type(seeing.processor.preprocessing), "__call__", lambda self, image: pixels)
    samples = Counted(200 if most > 10 else 20, size)
    assert evaluate(seeing, samples).samples == samples.count
    assert samples.most <= most


def test_the_typical_prompt_is_the_median_one(build) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2))
    samples = [ask(1, "what? " * times, answer="a") for times in (1, 1, 2, 3, 30)]
    sizes = PromptSizes()
    lengths = []
    for sample in samples:
        ready = model.processor.encode(next(prompts_of(sample))[0], prompt=True)
        lengths.append(len(ready.encoded.ids))
        sizes.add(ready)
    assert sizes.typical(model.vision.tokens).text == lengths[2] < max(lengths)

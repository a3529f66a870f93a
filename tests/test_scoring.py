"""How prompts are answered and counted, and which one is typical of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ask, small

from lavi.batch import Batch, Layout, Sample
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.evaluation.controls import SHUFFLED
from lavi.evaluation.scoring import AnswerLimits, PromptSizes, Scorer, Scores
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.answers import ExactMatch


def sizes_of(*prompts: tuple[int, list[Layout]]) -> PromptSizes:
    """Of prompts of so many ids and these images."""
    sizes = PromptSizes()
    for length, layouts in prompts:
        prompt: Any = SimpleNamespace(encoded=SimpleNamespace(ids=[0] * length), layouts=layouts)
        sizes.add(prompt)
    return sizes


def picture(height: int, width: int, views: int = 1) -> Layout:
    return Layout(views=views, size=(height, width))


def film(frames: int) -> Layout:
    return Layout(views=frames, video=True)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([(5, [picture(10, 40)]), (9, [picture(30, 20)]), (70, [picture(20, 90)])], Scenario(9, image=(40, 20))),
        ([(5, [film(4)]), (7, [film(8)]), (9, [film(90)])], Scenario(7, frames=8)),
        # two of three show a film; one of two does not make it typical
        ([(5, [film(4)]), (7, [film(8)]), (9, [picture(30, 20)])], Scenario(7, frames=6)),
        ([(4, [film(4)]), (8, [picture(30, 20)])], Scenario(6, image=(20, 30))),
        ([(5, [picture(9, 9, 5)] * 2), (7, [picture(9, 9)] * 3), (9, [])], Scenario(7, visual_tokens=3 * 16)),
        ([(5, []), (7, []), (9, [picture(9, 9)])], Scenario(7, visual_tokens=0)),
    ],
    ids=["images", "films", "mostly films", "as many images as films", "several images", "mostly none"],
)
def test_the_typical_prompt(prompts: list[tuple[int, list[Layout]]], expected: Scenario) -> None:
    assert sizes_of(*prompts).typical(16) == expected


@pytest.fixture
def scorer(build: Any) -> Scorer:
    """Of a model that always says red; it remembers the batches that it was asked."""
    real = build(LaViFusion(every=2, generator=small()))
    batches: list[tuple[Batch, int]] = []

    def answer(batch: Batch, *, max_new_tokens: int) -> list[str]:
        batches.append((batch, max_new_tokens))
        return ["red"] * len(batch)

    model: Any = SimpleNamespace(
        processor=real.processor,
        room_behind=lambda length: 100,
        fusion=SimpleNamespace(route_counts=Counter()),
        answer=answer,
        batches=batches,
    )
    return Scorer(model, ExactMatch(), torch.device("cpu"), ExactMatch(), limits=AnswerLimits(batch_size=2))


def test_prompts_are_answered_so_many_at_a_time_and_padded_on_the_left(scorer: Scorer) -> None:
    for number, words in enumerate(("what?", "what is very very red?", "which?", "is it?", "so?")):
        assert scorer.add(ask(number, words, answer="red" if number else "blue", key=str(number)))
    scorer.finish()
    scorer.finish()
    batches = [batch for batch, _ in scorer.model.batches]  # type: ignore[union-attr]
    assert [batch.keys for batch in batches] == [["0", "1"], ["0", "1"], ["2", "3"], ["2", "3"], ["4"], ["4"]]
    assert [len(batch.image_slots) for batch in batches] == [2, 0, 2, 0, 1, 0]
    assert all(stop == batch.input_ids.shape[1] for batch in batches for _, stop in batch.spans)
    lengths = {answer: len(scorer.model.processor.chat.tokenizer(answer)["input_ids"]) for answer in ("red", "blue")}
    room = [tokens for _, tokens in scorer.model.batches]  # type: ignore[union-attr]
    assert room == [max(lengths.values()) + 4] * 2 + [lengths["red"] + 4] * 4
    assert scorer.prompts == 5
    assert scorer.metric.compute()["all"] == scorer.metric_without_images.compute()["all"] == 80.0  # type: ignore[union-attr]
    assert scorer.sizes.images == [1] * 5


class StartsRight(ExactMatch):
    """An answer may go on."""

    wants_whole_answers = True

    def score(self, answer: str, references: Sequence[str]) -> float:
        return float(answer.startswith(references[0]))


def test_answers_that_may_still_become_right_are_not_cut(scorer: Scorer) -> None:
    scorer.metric = StartsRight()
    scorer.add(ask("what?", answer="red"))
    scorer.finish()
    assert {tokens for _, tokens in scorer.model.batches} == {64}  # type: ignore[union-attr]
    scorer.limits = AnswerLimits(max_new_tokens=200)
    scorer.add(ask("what?", answer="red"))
    scorer.finish()
    assert scorer.model.batches[-1][1] == 100  # type: ignore[union-attr]  # what the context has room for


def test_an_answer_is_as_long_as_the_true_one_however_long_that_is(scorer: Scorer) -> None:
    """What is longer than usual is not wrong from the start."""
    truth = "red square " * 20
    scorer.add(ask("what?", answer=truth))
    scorer.finish()
    length = len(scorer.model.processor.chat.tokenizer(truth)["input_ids"])
    assert length > 30
    assert {tokens for _, tokens in scorer.model.batches} == {length + 4}  # type: ignore[union-attr]


def test_what_cannot_be_asked_is_counted_by_cause(scorer: Scorer) -> None:
    class Known(UserError):
        cause = "known"

    def encode(sample: Sample, *, prompt: bool) -> Any:
        assert prompt
        raise {"a": Known("in detail"), "b": KeyError("odd")}[sample.key]

    scorer.model = SimpleNamespace(processor=SimpleNamespace(encode=encode))  # type: ignore[assignment]
    for key in "aba":
        assert not scorer.add(ask("what?", answer="red", key=key))
    (odd,) = scorer.left_out.keys() - {"known"}
    assert "odd" in odd
    assert scorer.left_out == {"known": 2, odd: 1}
    assert scorer.prompts == 0


def test_an_error_while_answering_names_the_samples(scorer: Scorer) -> None:
    def answer(batch: Batch, *, max_new_tokens: int) -> list[str]:
        raise RuntimeError("out of memory")

    scorer.model.answer = answer  # type: ignore[method-assign, assignment]
    scorer.add(ask("what?", answer="red", key="a"))
    with pytest.raises(RuntimeError) as error:
        scorer.add(ask("what?", answer="red", key="b"))
    assert error.value.__notes__ == ["It was in samples a, b ..."]


@pytest.mark.parametrize(
    ("label", "shuffled", "words"),
    [
        ("right", 5, "75.0 % right of 5 answers in 3 samples"),
        ("WordOverlap", 4, f"75.0 % WordOverlap of 5 answers (in the control with {SHUFFLED} 4) in 3 samples"),
    ],
)
def test_scores_name_their_metric_and_their_numbers(label: str, shuffled: int, words: str) -> None:
    scores = Scores("M", label, {"all": 75.0}, {}, Counter(), 3, 5, shuffled, Counter(), Scenario(5))
    assert str(scores) == words


def test_samples_of_one_key_are_several(scorer: Scorer) -> None:
    """Keys may begin anew in each shard; intervals draw samples."""
    for _ in range(2):
        assert scorer.add(ask(1, "what colour is the circle?", answer="red", key="000001"))
    scorer.finish()
    assert [one.sample for one in scorer.metric.predictions()] == ["0", "1"]

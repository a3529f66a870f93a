"""Metrics of answers, their mean by family and level, and a metric of one's own in a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics.utilities.data import dim_zero_cat

from lavi.batch import IGNORE, Answer, Batch
from lavi.errors import UserError
from lavi.language.token_scores import scores_of
from lavi.metrics.answers import ExactMatch
from lavi.metrics.base import AnswerMetric, GroupedMean, Prediction, groups_of
from lavi.metrics.teacher_forcing import answer_probabilities, correct_under_teacher_forcing, token_probabilities
from lavi.recipe import Recipe


class WordOverlap(AnswerMetric):
    """Share of the words of either that an answer and the truth have in common."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        ours, theirs = set(answer.split()), set(" ".join(references).split())
        return len(ours & theirs) / max(1, len(ours | theirs))


def batch_of(labels: torch.Tensor, answers: list[Answer]) -> Batch:
    rows, columns = labels.shape
    return Batch(labels, labels, torch.ones_like(labels), torch.zeros(0), [(0, columns)] * rows, [], answers)


def test_an_answer_is_correct_where_each_of_its_tokens_is_the_likeliest() -> None:
    """By the logits one column before, whatever is predicted elsewhere in its row."""
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE, 3, 3], [IGNORE, IGNORE, IGNORE, 2, 1, 0]])
    answers = [Answer(0, 1, 3, "colour", "easy"), Answer(0, 4, 6, "count", "easy"), Answer(1, 3, 6, "count", "hard")]
    batch = batch_of(labels, answers)
    foretold = one_hot(labels.roll(-1, 1).clamp(min=0), 4).float()
    assert correct_under_teacher_forcing(scores_of(foretold, batch.labels), batch) == [True, True, True]
    wrong = {(0, 0): [False, True, True], (0, 1): [False, True, True], (0, 3): [True, False, True]}
    wrong |= {(0, 4): [True, False, True], (1, 2): [True, True, False], (1, 4): [True, True, False]}
    wrong |= {(0, 2): [True] * 3, (0, 5): [True] * 3, (1, 0): [True] * 3, (1, 5): [True] * 3}
    for index, expected in wrong.items():
        logits = foretold.clone()
        logits[index] = logits[index].roll(1)
        assert correct_under_teacher_forcing(scores_of(logits, batch.labels), batch) == expected
    assert groups_of(answers) == [("colour", "easy"), ("count", "easy"), ("count", "hard")]
    first_token = foretold.clone()
    first_token[0, 0] = first_token[0, 0].roll(1)
    backwards = batch_of(labels, answers[::-1])
    assert correct_under_teacher_forcing(scores_of(first_token, batch.labels), backwards) == [True, True, False]
    assert correct_under_teacher_forcing(scores_of(foretold, batch.labels), batch_of(labels, [])) == []


def test_the_probability_of_an_answer_is_that_of_all_of_its_tokens() -> None:
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE, 3]])
    answers = [Answer(0, 1, 3, "colour", "easy"), Answer(0, 4, 5, "count", "easy")]
    probabilities = torch.full((1, 5, 4), 0.1)
    for column, (token, probability) in {0: (1, 0.5), 1: (2, 0.25), 3: (3, 0.7)}.items():
        probabilities[0, column] = (1 - probability) / 3
        probabilities[0, column, token] = probability
    scores, batch = scores_of(probabilities.log(), labels), batch_of(labels, answers)
    assert answer_probabilities(scores, batch) == pytest.approx([0.125, 0.7])
    assert token_probabilities(scores, batch) == pytest.approx([0.125**0.5, 0.7])


def test_means_are_of_all_scores_by_level_and_by_family() -> None:
    metric = GroupedMean()
    assert metric.compute() == {}
    metric.update([], [])
    assert metric.compute() == {}
    metric.update([True, False, 1.0], [("colour", "easy"), ("colour", "easy"), ("count", "hard")])
    metric.update([0.25], [("colour", "hard")])
    expected = {"all": 56.25, "family/colour": 125 / 3, "family/count": 100.0, "level/easy": 50.0, "level/hard": 62.5}
    assert metric.compute() == pytest.approx(expected)
    assert list(metric.compute()) == sorted(expected)
    with pytest.raises(ValueError, match="zip"):
        metric.update([True, False], [("colour", "easy")])


def test_the_group_of_all_is_counted_once() -> None:
    """Where data name no families: the mean over all is not counted again as that of a family."""
    metric = GroupedMean()
    metric.update([1, 0], [("all", "all"), ("colour", "all")])
    assert metric.compute() == {"all": 50.0, "family/all": 100.0, "family/colour": 0.0, "level/all": 50.0}


def test_ranks_that_have_different_families_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = GroupedMean(), GroupedMean()
    mine.update([True], [("colour", "easy")])
    other.update([False, True], [("count", "easy"), ("colour", "hard")])
    for state in ("group_ids", "scores"):  # what torchmetrics makes of "cat"
        setattr(mine, state, torch.cat([*getattr(mine, state), *getattr(other, state)]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(into: list[dict[int, str]], own: dict[int, str]) -> None:
        into[:] = [own, other.group_names]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    # torchmetrics would gather by itself: what is counted here is what it hands to compute
    assert GroupedMean.compute(mine) == pytest.approx(
        {
            "all": 200 / 3,
            "family/colour": 100.0,
            "family/count": 0.0,
            "level/easy": 50.0,
            "level/hard": 100.0,
        }
    )


def test_scores_of_ranks_are_laid_end_to_end() -> None:
    metric, other = GroupedMean(), GroupedMean()
    metric.update([True, False], [("colour", "easy"), ("count", "easy")])
    other.update([True], [("colour", "easy")])
    metric.merge_state(other)
    assert metric.compute()["family/colour"] == 100.0
    assert metric.compute()["all"] == pytest.approx(200 / 3)
    assert {metric._reductions[state] for state in ("group_ids", "scores")} == {dim_zero_cat}


def test_a_rank_without_scores_exchanges_tensors_of_the_same_types() -> None:
    """Else ranks would wait for each other, or read what the others sent as other numbers."""

    def types_of(metric: GroupedMean) -> list[Any]:
        sent: list[Any] = []

        def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
            sent.append((tensor.dtype, tensor.ndim))
            return [tensor]

        metric.sync(gather, distributed_available=lambda: True)
        return sent

    full = GroupedMean()
    full.update([True, False], [("colour", "easy"), ("count", "easy")])
    assert types_of(GroupedMean()) == types_of(full) == [(torch.long, 1), (torch.float32, 1)]


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Red", 1), (" red\n", 1), ("RED", 1), ("red.", 0), ("re d", 0), ("", 0), ("blue", 0)],
)
def test_an_answer_matches_whatever_its_case_and_outer_blanks(answer: str, score: float) -> None:
    metric = ExactMatch()
    assert metric.score(answer, ["red"]) == metric.score(answer, ["blues", " ReD "]) == score
    assert metric.score("", [""]) == 1
    assert metric.score("STRASSE", ["straße"]) == 0
    assert (metric.name, metric.label) == ("ExactMatch", "right")


def test_answers_are_scored_against_their_own_truths() -> None:
    metric = WordOverlap()
    metric.update([Prediction("a red circle", ("red circle",), "0", "colour", "easy")])
    metric.update([Prediction("two", ("three",), "1", "count", "hard")])
    assert metric.compute() == pytest.approx(
        {"all": 100 / 3, "family/colour": 200 / 3, "family/count": 0.0, "level/easy": 200 / 3, "level/hard": 0.0}
    )
    assert (metric.name, metric.label, metric.headline, metric.wants_whole_answers) == ("WordOverlap", "", "all", True)


def test_a_prediction_is_of_no_group_until_it_is_told() -> None:
    plain = Prediction("red", ("red",), "0")
    assert (plain.family, plain.level, plain.question) == ("all", "all", "")
    assert math.isnan(plain.score)
    assert math.isnan(plain.grade)


def test_whole_answers_of_ranks_are_laid_end_to_end() -> None:
    metric = WordOverlap()
    metric.update([Prediction("a red circle", ("red circle",), "0", "colour", "easy")])
    alone = metric.predictions()
    metric.sync(lambda tensor, group=None: [tensor, tensor], distributed_available=lambda: True)
    assert metric.predictions() == 2 * alone
    assert metric._reductions["rows"] is dim_zero_cat


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_a_score_is_a_number_from_0_to_1(score: float) -> None:
    metric = WordOverlap()
    metric.score = lambda answer, references: score  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"WordOverlap.score gives {score} for the answer 'x' and the truth 'y'"):
        metric.update([Prediction("x", ("y",), "0")])


def test_a_metric_of_ones_own_is_named_in_a_recipe_and_scores_a_run(run, tiny_recipe: Path) -> None:  # type: ignore[no-untyped-def]
    """Its sentence, its record and its table carry its name; its groups are those of the exact match."""
    from lavi.efficiency.record import read_records

    named = "data.metric={_target_: test_answers.WordOverlap}"
    assert run("lavi.fit", "--recipe", tiny_recipe, "--run", "out", named, "trainer.max_steps=3")[0] == 0
    status, out, err = run("lavi.evaluate", "--checkpoint", "out", "--limit", 4)
    assert status == 2
    assert "--trust" in err
    status, out, err = run("lavi.evaluate", "--checkpoint", "out", "--limit", 4, "--trust")
    assert status == 0, err
    assert " % WordOverlap of " in out
    assert "held-out score (%)" in out
    (record,) = read_records(Path("out/evaluation.jsonl"))
    assert record.knobs["metric"] == "WordOverlap"
    assert 0 <= record.accuracy["all"] <= 100


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("lavi.metrics.base.GroupedMean", r"'data\.metric' must be AnswerMetric \| None, not lavi\.metrics"),
        ("lavi.metrics.base.AnswerMetric", "it is only a contract: name a class that meets it"),
    ],
)
def test_what_scores_no_answers_is_refused(tiny_recipe: Path, metric: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe.load(tiny_recipe, [f"data.metric={{_target_: {metric}}}"])

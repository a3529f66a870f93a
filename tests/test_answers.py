"""Which answers are right, and their share by family and level."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot
from torchmetrics.utilities.data import dim_zero_cat

from lavi.batch import IGNORE, Answer, Batch
from lavi.metrics.answers import FamilyAccuracy, groups, is_right, right_under_teacher_forcing


def batch_of(labels: torch.Tensor, answers: list[Answer]) -> Batch:
    rows, columns = labels.shape
    return Batch(labels, labels, torch.ones_like(labels), torch.zeros(0), [(0, columns)] * rows, [], answers)


def test_an_answer_is_right_where_each_of_its_tokens_is_the_likeliest() -> None:
    """By the logits one column before, whatever is said elsewhere in its row."""
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE, 3, 3], [IGNORE, IGNORE, IGNORE, 2, 1, 0]])
    answers = [Answer(0, 1, 3, "colour", "easy"), Answer(0, 4, 6, "count", "easy"), Answer(1, 3, 6, "count", "hard")]
    batch = batch_of(labels, answers)
    foretold = one_hot(labels.roll(-1, 1).clamp(min=0), 4).float()
    assert right_under_teacher_forcing(foretold, batch) == [True, True, True]
    wrong = {(0, 0): [False, True, True], (0, 1): [False, True, True], (0, 3): [True, False, True]}
    wrong |= {(0, 4): [True, False, True], (1, 2): [True, True, False], (1, 4): [True, True, False]}
    wrong |= {(0, 2): [True] * 3, (0, 5): [True] * 3, (1, 0): [True] * 3, (1, 5): [True] * 3}
    for place, expected in wrong.items():
        logits = foretold.clone()
        logits[place] = logits[place].roll(1)
        assert right_under_teacher_forcing(logits, batch) == expected
    assert groups(answers) == [("colour", "easy"), ("count", "easy"), ("count", "hard")]


def test_shares_are_of_all_answers_by_level_and_by_family() -> None:
    metric = FamilyAccuracy()
    assert metric.compute() == {}
    metric.update([], [])
    assert metric.compute() == {}
    metric.update([True, False, True], [("colour", "easy"), ("colour", "easy"), ("count", "hard")])
    metric.update([True], [("colour", "hard")])
    expected = {"all": 75.0, "family/colour": 200 / 3, "family/count": 100.0, "level/easy": 50.0, "level/hard": 100.0}
    assert metric.compute() == pytest.approx(expected)
    assert list(metric.compute()) == sorted(expected)
    with pytest.raises(ValueError, match="zip"):
        metric.update([True, False], [("colour", "easy")])


def test_ranks_that_saw_different_families_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = FamilyAccuracy(), FamilyAccuracy()
    mine.update([True], [("colour", "easy")])
    other.update([False, True], [("count", "easy"), ("colour", "hard")])
    mine.seen = torch.cat([*mine.seen, *other.seen])  # type: ignore[assignment]  # what torchmetrics makes of "cat"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(into: list[dict[int, str]], own: dict[int, str]) -> None:
        into[:] = [own, other.names]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    # torchmetrics would gather by itself: what is counted here is what it hands to compute
    assert FamilyAccuracy.compute(mine) == pytest.approx(
        {
            "all": 200 / 3,
            "family/colour": 100.0,
            "family/count": 0.0,
            "level/easy": 50.0,
            "level/hard": 100.0,
        }
    )


def test_what_ranks_saw_is_laid_end_to_end() -> None:
    metric = FamilyAccuracy()
    metric.update([True, False], [("colour", "easy"), ("count", "easy")])
    other = FamilyAccuracy()
    other.update([True], [("colour", "easy")])
    metric.merge_state(other)
    assert metric.compute()["family/colour"] == 100.0
    assert metric.compute()["all"] == pytest.approx(200 / 3)
    assert metric._reductions["seen"] is dim_zero_cat


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Red", True), (" red\n", True), ("RED", True), ("red.", False), ("re d", False), ("", False), ("blue", False)],
)
def test_an_answer_is_right_but_for_case_and_outer_blanks(answer: str, right: bool) -> None:
    assert is_right(answer, "red") == is_right(answer, " ReD ") == right
    assert is_right("", "")

"""The loss, the schedule, what trains, and the metric."""

from __future__ import annotations

import pytest
import torch
from conftest import ask, collate

from lavi.batch import IGNORE
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.answers import FamilyAccuracy, groups, right_under_teacher_forcing
from lavi.module import VisionLanguageModule, summed_loss


def test_each_token_weighs_the_same_however_rows_are_batched(build) -> None:
    model = build(ConcatFusion())
    samples = [ask(1, "what?", answer="red"), ask("which image?", answer="the first of the two images")]
    with torch.no_grad():
        batch = collate(model, samples)
        together, tokens = summed_loss(model(batch), batch.labels)
        apart = [summed_loss(model(b), b.labels) for b in (collate(model, [s]) for s in samples)]
    assert int(tokens) == sum(int(n) for _, n in apart)
    torch.testing.assert_close(together, sum(loss for loss, _ in apart))


def test_parts_that_are_not_named_are_frozen(build) -> None:
    module = VisionLanguageModule(build(LaViFusion(bottleneck=16)), learning_rate={"fusion": 1e-3})
    trained = {name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"fusion"}
    module.train()
    assert not module.model.vision.training
    assert not module.model.language.training
    assert module.model.fusion.training
    batch = collate(module.model, [ask(1, "what?", answer="red")])
    assert not module.model.features(batch.pixels).requires_grad
    with pytest.raises(UserError, match="did you mean 'language'"):
        VisionLanguageModule(module.model, learning_rate={"langauge": 1e-3})


def test_accuracy_counts_whole_answers_by_family(build) -> None:
    model = build(ConcatFusion())
    batch = collate(model, [ask(1, "what?", answer="red"), ask(2, "what?", answer="the first of all")])
    logits = torch.nn.functional.one_hot(batch.labels.clamp(min=0).roll(-1, 1), len(model.chat.tokenizer)).float()
    assert right_under_teacher_forcing(logits, batch) == [True, True]
    wrong = logits.clone()
    wrong[1, batch.answers[1].stop - 2] = 0  # its end token alone
    assert right_under_teacher_forcing(wrong, batch) == [True, False]
    metric = FamilyAccuracy()
    metric.update([True, False, True], [("colour", "easy"), ("colour", "easy"), ("count", "hard")])
    metric.update([False], [("count", "hard")])
    expected = {"all": 50.0, "family/colour": 50.0, "family/count": 50.0, "level/easy": 50.0, "level/hard": 50.0}
    assert metric.compute() == expected
    assert groups(batch.answers) == [("all", "all")] * 2
    metric.reset()
    assert metric.compute() == {}


def test_a_token_is_judged_by_the_logits_before_it() -> None:
    labels = torch.tensor([[IGNORE, 3, 1, IGNORE, 2]])
    foretold = torch.zeros(1, 5, 4)
    for column in (1, 2, 4):  # at the column before, all mass on the label
        foretold[0, column - 1, labels[0, column]] = 50.0
    loss, tokens = summed_loss(foretold, labels)
    assert (float(loss), int(tokens)) == (pytest.approx(0.0, abs=1e-5), 3)

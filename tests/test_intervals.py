"""How sure a score is, and whether a language model keeps its language."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import awaken, small

from lavi.efficiency.comparison import side_by_side
from lavi.efficiency.record import Record
from lavi.errors import UserError
from lavi.evaluation.intervals import intervals
from lavi.evaluation.perplexity import Perplexity, compare_perplexity, read_texts
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.metrics.base import Prediction

TEXTS = ["what colour is the circle?", "red", "is there a square above the blue cross? no"]


def answers(scores: list[float], *, each: int = 1, family: str = "f", level: str = "easy") -> list[Prediction]:
    """One sample a score, with so many answers of that score."""
    return [
        Prediction("", (), str(n), family, level, question=str(m), score=score)
        for n, score in enumerate(scores)
        for m in range(each)
    ]


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    scored = answers([1.0] * 240 + [0.0] * 80)
    low, high = intervals(scored)["all"]
    half = 1.96 * 100 * math.sqrt(0.75 * 0.25 / 320)
    assert low == pytest.approx(75 - half, abs=0.5)
    assert high == pytest.approx(75 + half, abs=0.5)
    assert intervals(scored) == intervals(scored)


def test_answers_about_one_image_are_drawn_together() -> None:
    """Four answers a sample that agree are worth one: the interval does not shrink."""
    rng = random.Random(0)
    scores = [float(rng.random() < 0.5) for _ in range(200)]
    assert intervals(answers(scores, each=4)) == intervals(answers(scores))
    separate = [replace(answer, sample=str(n)) for n, answer in enumerate(answers(scores, each=4))]
    (one, many) = (np.diff(intervals(scored)["all"])[0] for scored in (answers(scores, each=4), separate))
    assert many == pytest.approx(one / 2, rel=0.15)


def test_each_group_has_its_own_interval() -> None:
    scored = answers([1.0] * 30, family="a") + answers([0.0] * 30, family="b", level="hard")
    by_group = intervals(scored)
    assert by_group["family/a"] == by_group["level/easy"] == [100.0, 100.0]
    assert by_group["family/b"] == by_group["level/hard"] == [0.0, 0.0]
    assert list(by_group) == ["all", "family/a", "family/b", "level/easy", "level/hard"]


def test_many_samples_are_drawn_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = answers([float(n % 3 == 0) for n in range(50)])
    whole = intervals(scored, draws=101)
    monkeypatch.setattr("lavi.evaluation.intervals.BLOCK", 50 * 7)
    assert intervals(scored, draws=101) == whole


def test_a_table_shows_intervals_and_perplexity_where_there_are_some() -> None:
    record = Record("lavi", 9, 64, 0, 1, accuracy={"all": 75.0, "family/a": 50.0}, controls={"no image": {"all": 30.0}})
    _, rows = side_by_side([record], None)
    assert ["held-out accuracy (%)", "75.0"] in rows
    assert not any("perplexity" in row[0] for row in rows)
    record.accuracy_intervals = {"all": [71.04, 79.0]}
    record.control_intervals = {"no image": {"all": [26.0, 34.0]}}
    record.knobs["perplexity"] = {"before": 45.123456, "after": 45.2, "tokens": 9}
    _, rows = side_by_side([record], None)
    assert ["held-out accuracy (%)", "75.0 (71.0-79.0)"] in rows
    assert ["a (%)", "50.0"] in rows
    assert ["control, no image: held-out accuracy (%)", "30.0 (26.0-34.0)"] in rows
    assert ["perplexity on text, before training", "45.1235"] in rows
    assert ["perplexity on text, after training", "45.2000"] in rows


# --- perplexity -------------------------------------------------------------------------------------------------------


class OneLanguage:
    """A recipe whose language model is a copy of what a model began with."""

    def __init__(self, language: Any) -> None:
        self.language, self.settings = language, {"model": {"language": {}}}

    def component(self, section: str) -> type:
        return type(self)

    def build(self, section: str) -> Any:
        assert section == "model.language"
        return self.language


def perplexities(build: Any, fusion: Any, change: Any = None, **config: Any) -> Perplexity:
    model = build(fusion, **config)
    before = copy.deepcopy(build(ConcatFusion(), **config).language)
    awaken(model.fusion)
    if change:
        change(model)
    recipe: Any = OneLanguage(before)
    return compare_perplexity(recipe, model, TEXTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lavi_on_a_frozen_language_model_keeps_its_language_to_the_last_bit(build: Any, dtype: str) -> None:
    result = perplexities(build, LaViFusion(every=2, generator=small()), dtype=dtype)
    assert result.after == result.before
    assert result.before > 1


def test_perplexity_is_of_each_text_alone_and_notices_a_change(build: Any) -> None:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.language.layers[1].mlp.down_proj.weight.add_(0.1)

    result = perplexities(build, LaViFusion(every=2, generator=small()), change)
    assert result.after != result.before
    language = build(ConcatFusion()).language
    losses, tokens = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([language.tokenizer(text).input_ids])
        if ids.shape[1] > 1:
            losses += float(language.hf(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert result.tokens == tokens
    assert result.before == pytest.approx(math.exp(losses / tokens), rel=1e-5)


def test_texts_are_read_and_a_file_without_any_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline more\n\n\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt") == ["one line more", "two"]
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"b\.txt holds no text"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("c.txt", "gone.txt"):
        with pytest.raises(UserError, match=rf"the texts .*{name} cannot be read"):
            read_texts(tmp_path / name)

"""VISOR's offline steps on a model whose right answers are known: what is viable, and what each sample needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ask, collate

from lavi.batch import Batch
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.language.token_scores import TokenScores, scores_of
from lavi.visor import offline
from lavi.visor.files import read_viable
from lavi.visor.fusion import VisorFusion
from lavi.visor.router import RouterLabels

CPU = torch.device("cpu")
COSTS = [(), (1,), (3,), (1, 3)]
"""The configurations, from the cheapest."""


class Scripted:
    """Stands for a trained model: under each configuration it is as sure of each sample's answer as the script says."""

    def __init__(self, real: Any, sure: dict[tuple[int, ...], dict[str, float]]) -> None:
        self.fusion, self.real, self.sure = real.fusion, real, sure
        self.read: list[tuple[int, ...]] = []

    def token_scores(self, batch: Batch) -> TokenScores:
        way = self.fusion.forced_route
        self.read.append(way)
        logits = torch.full((*batch.labels.shape, 50), -50.0)
        for answer in batch.answers:
            share = self.sure[way][batch.keys[answer.row]]
            for column in range(answer.start, answer.stop):
                label = int(batch.labels[answer.row, column]) % 50
                batch.labels[answer.row, column] = label
                # all of the tokens together have the probability ``share``
                each = share ** (1 / (answer.stop - answer.start))
                logits[answer.row, column - 1, label] = torch.tensor(each).log()
                logits[answer.row, column - 1, (label + 1) % 50] = torch.tensor(1 - each).log()
        return scores_of(logits, batch.labels)


@pytest.fixture
def real(build) -> Any:  # type: ignore[no-untyped-def]
    return build(VisorFusion(cross_attention=[0, 2], self_attention=[1, 3]))


def batches(model: Any, *groups: str) -> list[Batch]:
    return [collate(model, [ask("what?", answer="red", key=key) for key in keys]) for keys in groups]


def labels(file: Path) -> dict[str, tuple[int, ...]]:
    _, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["key"]: tuple(record["configuration"]) for record in lines}


SURE = {  # of samples a to e, under each configuration
    (): dict(zip("abcde", (0.9, 0.2, 0.2, 0.1, 0.6), strict=True)),
    (1,): dict(zip("abcde", (0.9, 0.8, 0.2, 0.1, 0.5), strict=True)),
    (3,): dict(zip("abcde", (0.9, 0.9, 0.7, 0.1, 0.2), strict=True)),
    (1, 3): dict(zip("abcde", (0.9, 0.9, 0.9, 0.2, 0.8), strict=True)),
}


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        # where the full configuration is wrong (d), the cheapest is as good
        ("right", {"a": (), "b": (1,), "c": (3,), "d": (), "e": ()}),
        # 0.75 times as sure as the full one
        ("likely", {"a": (), "b": (1,), "c": (3,), "d": (1, 3), "e": ()}),
    ],
)
def test_a_label_is_the_cheapest_configuration_that_is_good_enough(
    real: Any, tmp_path: Path, by: Any, expected: dict[str, tuple[int, ...]]
) -> None:
    model, out = Scripted(real, SURE), tmp_path / "labels.jsonl"
    groups = batches(real, "ab", "cde")
    counts = offline.label(model, groups, COSTS[::-1], out, about={}, keep=0.75, by=by, device=CPU)  # type: ignore[arg-type]
    assert labels(out) == expected
    assert counts == {way: list(expected.values()).count(way) for way in COSTS}
    assert list(counts) == COSTS


def test_labels_know_the_samples_that_they_were_made_of(real: Any, tmp_path: Path) -> None:
    """Keys alone do not tell the samples of one folder from those of another."""
    out = tmp_path / "labels.jsonl"
    batch = collate(real, [ask("what?", answer="red", key="a"), ask("what is this?", answer="red", key="b")])
    offline.label(Scripted(real, SURE), [batch], COSTS, out, about={}, keep=0.75, device=CPU)  # type: ignore[arg-type]
    known, logits = RouterLabels(out, COSTS), torch.zeros(2, len(COSTS))
    assert known.loss(batch.keys, batch.text_lengths, logits) > 0
    other = collate(real, [ask("what is this?", answer="red", key=key) for key in "ab"])
    with pytest.raises(UserError, match=r"labels sample a, which had .*labels of other data"):
        known.loss(other.keys, other.text_lengths, logits)


@pytest.mark.parametrize("groups", [("abca",), ("ab", "ca")])
def test_samples_of_one_key_would_share_a_label(real: Any, tmp_path: Path, groups: tuple[str, ...]) -> None:
    """As of two folders that were packed each by itself."""
    given = batches(real, *groups)
    with pytest.raises(UserError, match="two samples have the key 'a'"):
        offline.label(  # type: ignore[arg-type]
            Scripted(real, SURE), given, COSTS, tmp_path / "labels.jsonl", about={}, keep=0.75, by="likely", device=CPU
        )


def test_labels_are_of_viable_configurations_and_as_good_as_the_full_one_all_the_same(
    real: Any, tmp_path: Path
) -> None:
    """Where the full one is not viable itself, it still says what is enough; the dearest is the last resort."""
    out = tmp_path / "labels.jsonl"
    offline.label(
        Scripted(real, SURE),  # type: ignore[arg-type]
        batches(real, "abcde"),
        [[], [1]],
        out,
        about={},
        keep=0.75,
        by="likely",
        device=CPU,
    )
    assert labels(out) == {"a": (), "b": (1,), "c": (1,), "d": (1,), "e": ()}


@pytest.mark.parametrize(("keep", "viable"), [(0.5, COSTS), (0.75, COSTS[1:]), (0.8, COSTS[3:])])
def test_viable_is_what_keeps_enough_of_the_full_accuracy(
    real: Any, tmp_path: Path, keep: float, viable: list[tuple[int, ...]]
) -> None:
    """Right are 2, 3, 3 and 4 of five: a half and three quarters of what the full one gets right are enough, too."""
    out = tmp_path / "viable.json"
    offline.search(
        Scripted(real, SURE),  # type: ignore[arg-type]
        batches(real, "ab", "cde"),
        out,
        about={"run": "x"},
        keep=keep,
        most=256,
        device=CPU,
    )
    result = json.loads(out.read_text())
    assert [tuple(one) for one in result["viable"]] == viable
    assert result["scores"] == {"none": 40.0, "1": 60.0, "3": 60.0, "1,3": 80.0}


def test_a_search_goes_on_behind_the_last_batch_it_scored(real: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    settings: dict[str, Any] = {"about": {"run": "x"}, "keep": 0.75, "most": 256, "device": CPU}

    def stopped() -> Iterator[Batch]:
        yield batches(real, "ab")[0]
        raise KeyboardInterrupt

    offline.search(Scripted(real, SURE), batches(real, "ab", "cde"), whole, **settings)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        offline.search(Scripted(real, SURE), stopped(), cut, **settings)  # type: ignore[arg-type]
    assert "viable" not in json.loads(cut.read_text())
    model = Scripted(real, SURE)
    result = offline.search(model, batches(real, "ab", "cde"), cut, **settings)  # type: ignore[arg-type]
    assert model.read == COSTS  # each configuration once, on the second batch alone
    assert result == json.loads(cut.read_text()) == json.loads(whole.read_text())
    assert (result["samples"], result["answers"]) == (5, 5)
    again = offline.search(model, [], cut, **settings | {"keep": 0.8})  # type: ignore[arg-type]
    assert [tuple(one) for one in again["viable"]] == COSTS[3:]


def test_a_search_goes_on_behind_the_last_batch_that_it_scored(real: Any, tmp_path: Path) -> None:
    out, model = tmp_path / "viable.json", Scripted(real, SURE)
    settings: dict[str, Any] = {"about": {"run": "x"}, "keep": 0.75, "most": 256, "device": CPU}

    def stopped() -> Iterator[Batch]:
        yield batches(real, "ab")[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offline.search(model, stopped(), out, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not finished"):
        read_viable(out)
    model.read.clear()
    result = offline.search(model, batches(real, "ab", "cde"), out, **settings)  # type: ignore[arg-type]
    assert sorted(model.read) == sorted(COSTS)  # the second batch alone
    assert result["scores"] == {"none": 40.0, "1": 60.0, "3": 60.0, "1,3": 80.0}
    assert (result["samples"], result["answers"]) == (5, 5)
    assert [tuple(one) for one in read_viable(out)] == COSTS[1:]
    model.read.clear()
    assert offline.search(model, batches(real, "abcde"), out, **settings) == result  # type: ignore[arg-type]
    assert not model.read
    with pytest.raises(UserError, match="made with another run"):
        offline.search(model, [], out, **settings | {"about": {"run": "y"}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="made with another most"):
        offline.search(model, [], out, **settings | {"most": 9})  # type: ignore[arg-type]


def test_labelling_goes_on_where_it_was_stopped(real: Any, tmp_path: Path) -> None:
    out, model = tmp_path / "labels.jsonl", Scripted(real, SURE)
    settings: dict[str, Any] = {"about": {"run": "x"}, "keep": 0.75, "by": "right", "device": CPU}
    offline.label(model, batches(real, "ab"), COSTS, out, **settings)  # type: ignore[arg-type]
    whole = out.read_text()
    out.write_text(whole + '{"key": "c", "config')
    model.read.clear()
    counts = offline.label(model, batches(real, "ab", "cde"), COSTS, out, **settings)  # type: ignore[arg-type]
    assert sorted(model.read) == sorted(COSTS)  # the second batch alone
    assert out.read_text().startswith(whole)
    assert set(labels(out)) == set("abcde")
    assert sum(counts.values()) == 5
    with pytest.raises(UserError, match="made with another run"):
        offline.label(model, [], COSTS, out, **settings | {"about": {"run": "y"}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="made with another keep"):
        offline.label(model, [], COSTS, out, **settings | {"keep": 0.5})  # type: ignore[arg-type]


def test_labels_are_by_right_answers_unless_something_else_is_asked_for(real: Any, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    model: Any = Scripted(real, SURE)
    offline.label(model, batches(real, "abcde"), COSTS, out, about={"run": "x"}, keep=0.75, device=CPU)
    assert labels(out)["d"] == ()
    about = json.loads(out.read_text().splitlines()[0])["about"]
    assert about == {"run": "x", "by": "right", "keep": 0.75, "configurations": [list(way) for way in COSTS]}


def test_a_label_is_for_one_question(real: Any, tmp_path: Path) -> None:
    (several,) = batches(real, "ab")
    several.answers = [answer._replace(row=0) for answer in several.answers]
    with pytest.raises(UserError, match="a label is for one question"):
        offline.label(
            Scripted(real, SURE),  # type: ignore[arg-type]
            [several],
            COSTS,
            tmp_path / "labels.jsonl",
            about={},
            keep=1.0,
            device=CPU,
        )


@pytest.mark.parametrize(("most", "count"), [(256, 16), (16, 16), (15, 15), (7, 7), (3, 3), (2, 2)])
def test_configurations_are_all_sets_or_a_draw_with_both_ends(most: int, count: int) -> None:
    result = offline.every_configuration([2, 5, 7, 9], most)
    assert len(result) == len(set(result)) == count
    assert result == sorted(result, key=len)
    assert {(), (2, 5, 7, 9)} <= set(result)
    assert all(one == tuple(sorted(one)) and set(one) <= {2, 5, 7, 9} for one in result)
    singles = [(layer,) for layer in (2, 5, 7, 9)]
    assert set(singles[: most - 2]) <= set(result)


def test_many_optional_layers_are_drawn_from_at_all_sizes() -> None:
    result = offline.every_configuration(list(range(40)), 200)
    assert len(result) == 200
    assert len({len(one) for one in result}) > 30


def test_only_a_run_with_optional_layers_and_no_router_is_searched(build, real: Any) -> None:
    assert offline.visor_of(real) is real.fusion
    for fusion, words in (
        (ConcatFusion(), "ConcatFusion.* has no optional layers"),
        (VisorFusion(cross_attention=2, self_attention=0), "has no optional layers"),
        (
            VisorFusion(cross_attention=[0], self_attention=[1], configurations=[[], [1]], router="token"),
            "has a router already",
        ),
    ):
        with pytest.raises(UserError, match=words):
            offline.visor_of(build(fusion))


def test_right_and_likely_are_told_sample_by_sample(real: Any) -> None:
    model = Scripted(real, SURE)
    with real.fusion.force_route((1,)):
        result = dict(offline.answer_correct(model, batches(real, "ab", "cde"), CPU))  # type: ignore[arg-type]
        shares = dict(offline.answer_probability(model, batches(real, "ab", "cde"), CPU))  # type: ignore[arg-type]
    assert result == {"a": [True], "b": [True], "c": [False], "d": [False], "e": [True]}
    assert shares == {key: [pytest.approx(share, rel=1e-4)] for key, share in SURE[(1,)].items()}


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    from lavi.checkpoints.trained_weights import TRAINED

    (tmp_path / TRAINED).write_bytes(b"one")
    first = offline.fingerprint(tmp_path)
    assert len(first) == 16
    (tmp_path / TRAINED).write_bytes(b"other")
    assert offline.fingerprint(tmp_path) != first


def test_one_right_answer_of_one_is_all(real: Any, tmp_path: Path) -> None:
    model: Any = Scripted(real, SURE)
    result = offline.search(model, batches(real, "a"), tmp_path / "viable.json", about={}, keep=1.0, most=8, device=CPU)
    assert set(result["scores"].values()) == {100.0}

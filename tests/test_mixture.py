"""Several streams as one: in which shares, and from where it goes on; on streams of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules.batches import Drawn
from datamodules.mixture import DRAWS, MixedStream, Mixture
from lavi.errors import UserError

SLOT: Any = SimpleNamespace(index=0)


class Numbers:
    """Counts from a position on; after every third record an epoch is complete."""

    def __init__(self, samples: int | None = None) -> None:
        self.samples = samples

    def records(self, slot: Any, position: Any) -> Iterator[tuple[Any, Any]]:
        assert slot.index >= 0  # a stream reads what is this slot's
        at = position if isinstance(position, int) else 0
        while True:
            at += 1
            yield at, at
            if at % 3 == 0:
                yield at, None


def mixed(shares: list[float], seed: int = 0) -> MixedStream:
    streams: Any = {name: Numbers() for name in "abc"[: len(shares)]}
    return MixedStream(streams, shares, seed=seed)


def test_shares_are_weights_or_sizes_evened_out_by_the_temperature() -> None:
    sources: Any = {"small": "x", "large": "y"}
    streams: Any = {"small": Numbers(4), "large": Numbers(36)}
    assert Mixture(sources=sources).shares(streams) == [0.1, 0.9]
    assert Mixture(sources=sources, temperature=2).shares(streams) == [0.25, 0.75]
    weighted = Mixture(sources=sources, weights={"large": 1, "small": 3})
    assert weighted.shares(streams) == [0.75, 0.25]
    assert weighted.shares({"small": Numbers(), "large": Numbers()}) == [0.75, 0.25]  # type: ignore[dict-item]
    with pytest.raises(UserError, match="'large' has no index that counts its samples: set weights"):
        Mixture(sources=sources).shares({"small": Numbers(4), "large": Numbers()})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sources": {}}, "needs 'sources'"),
        ({"weights": {"a": 1, "c": 1}}, "must name the same: 'b'"),
        ({"weights": {"a": 1}}, "must name the same: 'b'"),
        ({"weights": {"a": 1, "b": 1, "bb": 1}}, "'bb', did you mean 'b'"),
        ({"weights": {"a": 1, "b": 0}}, "must be above 0"),
        ({"temperature": 0}, "must be above 0"),
    ],
    ids=str,
)
def test_mixtures_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mixture(**{"sources": {"a": "x", "b": "y"}} | settings)


def test_each_source_comes_in_its_share_and_in_its_own_order() -> None:
    draws = [drawn for drawn in islice(mixed([0.2, 0.5, 0.3]).records(SLOT), 8000) if drawn.raw is not None]
    counts = Counter(drawn.source for drawn in draws)
    assert [counts[name] / len(draws) for name in "abc"] == pytest.approx([0.2, 0.5, 0.3], abs=0.02)
    for name in "abc":
        own = [drawn.raw for drawn in draws if drawn.source == name]
        assert own == list(range(1, len(own) + 1))
    assert [drawn.drawn for drawn in draws] == list(range(1, len(draws) + 1))


def test_the_end_of_a_sources_epoch_is_told_and_is_no_draw() -> None:
    draws = list(islice(mixed([0.5, 0.5]).records(SLOT), 200))
    for before, after in pairwise(draws):
        if after.raw is None:
            assert after.drawn == before.drawn
            index = "ab".index(after.source)
            assert after.positions[index] % 3 == 0
    assert sum(drawn.raw is None for drawn in draws) > 20


@pytest.mark.parametrize("number", [1, 7, DRAWS - 1, DRAWS, DRAWS + 1, 2 * DRAWS + 5])
def test_a_mixture_goes_on_from_any_place(number: int) -> None:
    stream = mixed([0.2, 0.5, 0.3])
    whole = [drawn for drawn in islice(stream.records(SLOT), 2 * number + 3000) if drawn.raw is not None]
    last = whole[number - 1]
    rest = [drawn for drawn in islice(stream.records(SLOT, last.drawn, last.positions), 1000) if drawn.raw is not None]
    assert rest == whole[number : number + len(rest)]


def test_readers_and_seeds_draw_otherwise() -> None:
    def sources(stream: MixedStream, index: int) -> list[str]:
        slot: Any = SimpleNamespace(index=index)
        return [drawn.source for drawn in islice(stream.records(slot), 100)]

    first = sources(mixed([0.5, 0.5]), 0)
    assert first == sources(mixed([0.5, 0.5]), 0)
    assert first != sources(mixed([0.5, 0.5]), 1)
    assert first != sources(mixed([0.5, 0.5], seed=1), 0)
    draws = [drawn.source for drawn in islice(mixed([0.5, 0.5]).records(SLOT), 4 * DRAWS) if drawn.raw is not None]
    assert draws[:DRAWS] != draws[DRAWS : 2 * DRAWS]


def test_one_stream_is_simply_its_own() -> None:
    stream = mixed([1.0])
    draws: list[Drawn] = list(islice(stream.records(SLOT), 5))
    assert [drawn.raw for drawn in draws] == [1, 2, 3, None, 4]
    assert len(stream.start) == 1

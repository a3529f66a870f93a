"""Several sets of shards as one stream, in set shares.

    train:
      _target_: datamodules.mixture.Mixture
      sources: {captions: data/captions, chat: "data/chat/{000..031}.tar", clips: s3://bucket/clips/}
      weights: {captions: 1, chat: 2, clips: 1}     # or, without weights, by size
      temperature: 2                                # shares to the power 1/2: the small ones come oftener

Each source goes through its own epochs; the next sample's source is drawn. A draw is a function of (seed, reader, its
number) alone, so that a mixture goes on where it stopped, like a single stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from datamodules.shards.read import Raw, ShardStream, Slot, StreamPosition
from lavi.config.types import Positive
from lavi.errors import UserError, nearest

DRAWS = 1024
"""So many draws come from one seed: to go on anywhere costs no more than these."""


class Mixture:
    """Names, places and shares of sources.

    Args:
        sources: a name, and the shards: a folder, a brace pattern, a list of them.
        weights: how often each is drawn, relative to the others; none: as often as it has samples.
        temperature: shares are taken to the power 1 / temperature: 1 leaves them, more evens them out.

    Raises:
        UserError: no sources, weights of others, or numbers that are not above 0.
    """

    def __init__(
        self,
        *,
        sources: dict[str, str | list[str]],
        weights: dict[str, Positive] | None = None,
        temperature: Positive = 1.0,
    ) -> None:
        if not sources:
            raise UserError("a mixture needs 'sources': a name and a shard folder for each.")
        if weights is not None and (odd := set(weights) ^ set(sources)):
            name = sorted(odd)[0]
            raise UserError(f"a mixture's weights and sources must name the same: '{name}', {nearest(name, sources)}")
        if min([temperature, *(weights or {}).values()]) <= 0:
            raise UserError("a mixture's weights and its temperature must be above 0: leave a source out instead.")
        self.sources, self.weights, self.temperature = sources, weights, temperature

    def shares(self, streams: Mapping[str, ShardStream]) -> list[float]:
        """Of each source, adding up to 1.

        Raises:
            UserError: no weights, and a source that has no index to count its samples.
        """
        sizes = [stream.samples if self.weights is None else self.weights[name] for name, stream in streams.items()]
        for name, size in zip(streams, sizes, strict=True):
            if not size:
                raise UserError(f"the mixture's source '{name}' has no index that counts its samples: set weights.")
        powers = [float(size or 0) ** (1 / self.temperature) for size in sizes]
        return [power / sum(powers) for power in powers]


class Drawn(NamedTuple):
    """One record of a mixture, and where the mixture stands behind it."""

    drawn: int
    places: tuple[StreamPosition, ...]
    source: str
    raw: Raw | None
    """None: an epoch of the source is complete."""


@dataclass(frozen=True)
class MixedStream:
    """Records of several streams; of one, simply its own."""

    streams: dict[str, ShardStream]
    shares: list[float]
    seed: int = 0

    @property
    def start(self) -> tuple[StreamPosition, ...]:
        return tuple(StreamPosition() for _ in self.streams)

    def records(self, slot: Slot, drawn: int = 0, places: tuple[StreamPosition, ...] = ()) -> Iterator[Drawn]:
        """Without end, from a place on."""
        at = list(places or self.start)
        names = list(self.streams)
        running = [stream.records(slot, place) for stream, place in zip(self.streams.values(), at, strict=True)]
        for chosen in self._choices(slot, drawn):
            raw = None
            while raw is None:
                at[chosen], raw = next(running[chosen])
                drawn += raw is not None
                yield Drawn(drawn, tuple(at), names[chosen], raw)

    def _choices(self, slot: Slot, first: int) -> Iterator[int]:
        """Which source each sample is from, from number ``first`` on."""
        while True:
            batch, inside = divmod(first, DRAWS)
            draw = random.Random(f"{self.seed}/{slot.index}/draws/{batch}")
            yield from draw.choices(range(len(self.shares)), self.shares, k=DRAWS)[inside:]
            first = (batch + 1) * DRAWS

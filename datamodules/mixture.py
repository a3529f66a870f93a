"""Several sets of shards as one stream, in set shares.

    train:
      _target_: datamodules.mixture.Mixture
      sources: {captions: data/captions, chat: "data/chat/{000..031}.tar", clips: s3://bucket/clips/}
      weights: {captions: 1, chat: 2, clips: 1}     # or, without weights, by size
      temperature: 2                                # shares to the power 1/2: the small ones come oftener

Each source goes through its own epochs; the next sample's source is drawn. A draw is a function of (seed, reader, its
number) alone, so that a mixture resumes exactly where it stopped, like a single stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from datamodules.batches import Drawn, TrainingRecords
from datamodules.shards.read import ShardStream, Slot, StreamPosition
from lavi.config.types import Positive
from lavi.errors import UserError, nearest

DRAWS = 1024
"""Draws that come from one seed: to go on anywhere costs no more than these."""


class Mixture:
    """Sets of shards and their shares.

    Args:
        sources: a name, and the shards: a folder, a brace pattern, a list of them.
        weights: how often each is drawn, relative to the others; None: as often as it has samples.
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
        """The share of each source; together they are 1.

        Raises:
            UserError: no weights, and a source that has no index to count its samples.
        """
        sizes = [stream.samples if self.weights is None else self.weights[name] for name, stream in streams.items()]
        for name, size in zip(streams, sizes, strict=True):
            if not size:
                raise UserError(f"the mixture's source '{name}' has no index that counts its samples: set weights.")
        powers = [float(size or 0) ** (1 / self.temperature) for size in sizes]
        return [power / sum(powers) for power in powers]


@dataclass(frozen=True)
class MixedStream(TrainingRecords):
    """Records of several streams; of a single one, its own."""

    streams: dict[str, ShardStream]
    shares: list[float]
    seed: int = 0

    @property
    def start(self) -> tuple[StreamPosition, ...]:
        return tuple(StreamPosition() for _ in self.streams)

    def records(self, slot: Slot, drawn: int = 0, positions: tuple[StreamPosition, ...] = ()) -> Iterator[Drawn]:
        current = list(positions or self.start)
        names = list(self.streams)
        running = [stream.records(slot, start) for stream, start in zip(self.streams.values(), current, strict=True)]
        for index in self._choices(slot, drawn):
            raw = None
            while raw is None:
                current[index], raw = next(running[index])
                drawn += raw is not None
                yield Drawn(drawn, tuple(current), names[index], raw)

    def _choices(self, slot: Slot, first: int) -> Iterator[int]:
        """The index of each sample's source, from sample number ``first`` on."""
        while True:
            batch, inside = divmod(first, DRAWS)
            rng = random.Random(f"{self.seed}/{slot.index}/draws/{batch}")
            yield from rng.choices(range(len(self.shares)), self.shares, k=DRAWS)[inside:]
            first = (batch + 1) * DRAWS

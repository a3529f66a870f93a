"""The rules by which a sample is used or left out, and the count of those that are not used.

Training, validation, scoring, pictures of samples and VISOR's offline steps all read through one :class:`Encoder`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

from datamodules.formats.base import SampleFormat
from datamodules.shards.read import BrokenSample, Raw, check_intact
from lavi.batch import Sample
from lavi.data.collator import EncodedSample
from lavi.data.processor import Processor, TooLong
from lavi.errors import UserError

log = logging.getLogger("lavi")

Result = TypeVar("Result")


class Skip(NamedTuple):
    """A sample that is not used, or as many as a shard lacks."""

    key: str
    cause: str
    samples: int = 1


@dataclass
class Skipped:
    """Samples that are not used, counted by cause; above a share of broken ones, reading stops and says why."""

    max_share: float
    used: int = 0
    """Samples that were used."""
    broken: int = 0
    """Samples that cannot be read; only of these there is a largest share."""
    causes: Counter[str] = field(default_factory=Counter)
    """Of all samples that are not used."""
    fresh: list[Skip] = field(default_factory=list)
    """Those that :meth:`take` has not returned yet."""
    last: str = ""
    """Key and cause of the last broken sample."""

    def add(self, key: str, cause: str, *, lost: int = 1) -> None:
        """Count one broken sample, or as many as were ``lost``.

        Raises:
            UserError: more are broken than the share, beyond what chance explains.
        """
        self.broken += lost
        self.last = f"sample '{key}': {cause}"
        self.leave_out(key, cause, lost=lost)
        self._check_share(spare=lost)

    def leave_out(self, key: str, cause: str, *, lost: int = 1) -> None:
        """Count a sample that is sound and not used: of these there may be any share."""
        self.causes[cause] += lost
        self.fresh.append(Skip(key, cause, lost))

    def check_any_used(self, name: str) -> None:
        """Called behind a pass over the data.

        Raises:
            UserError: not one sample could be used.
        """
        if not self.used:
            raise UserError(f"none of the {self.causes.total()} samples {name} can be used: {self}.")

    def check(self) -> None:
        """Called behind a pass over the data: check the share again, also of samples that were lost together.

        Raises:
            UserError: more are broken than the share, beyond what chance explains.
        """
        self._check_share(spare=1)

    def _check_share(self, *, spare: int) -> None:
        """A reader may have read little yet, and broken samples do not lie evenly: ``spare`` of them are allowed."""
        expected = self.max_share * (self.used + self.broken)
        if self.broken > expected + 4 * math.sqrt(expected) + spare:
            raise UserError(
                f"{self.broken} of {self.used + self.broken} samples are broken, more than data.max_skipped="
                f"{self.max_share:g} allows; the last is {self.last}. Mend or remove them, or raise it."
            )

    def take(self) -> list[Skip]:
        """Those added since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def __str__(self) -> str:
        return "; ".join(f"{count} x {cause}" for cause, count in self.causes.most_common(3)) or "there is none"


@dataclass(frozen=True)
class Encoder:
    """Raw samples to encoded ones, and the rules by which a sample is used.

    Args:
        format: decodes raw samples.
        too_long: leave out a conversation that is longer than the context, or cut its last turns off.
    """

    processor: Processor
    format: SampleFormat
    too_long: Literal["skip", "cut"] = "skip"

    def __call__(self, raw: Raw, skipped: Skipped, source: str = "") -> EncodedSample | None:
        """Encode a raw sample; one that cannot be used is counted in ``skipped``, and None."""
        used = self.used(raw, skipped, self.processor.encode)
        return None if used is None else replace(used[1], source=source)

    def sample(self, raw: Raw, skipped: Skipped) -> Sample | None:
        """The same without encoding its images: the part of the sample that is used."""
        used = self.used(raw, skipped, self.processor.measure)
        return None if used is None else used[0]

    def used(self, raw: Raw, skipped: Skipped, encode: Callable[[Sample], Result]) -> tuple[Sample, Result] | None:
        """The part of a sample that is used, with ``encode`` of it; one that cannot be used is counted, and None."""
        key = raw["__key__"]
        try:
            check_intact(raw)
            used = self._fitting(self.format.decode(raw), encode)
        except BrokenSample as error:
            skipped.add(error.key, error.cause, lost=error.lost)
        except TooLong as error:
            skipped.leave_out(key, error.cause)
        except UserError as error:
            skipped.add(key, str(error).rstrip("."))
        except MemoryError:
            raise
        # A sample comes from elsewhere: whatever it does to a decoder, a template or a tokenizer, it is one sample.
        except Exception as error:
            log.debug("sample '%s'", key, exc_info=True)
            skipped.add(key, f"it cannot be read ({type(error).__name__}: {error})".replace("\n", " ")[:200])
        else:
            skipped.used += 1
            return used
        return None

    def _fitting(self, sample: Sample, encode: Callable[[Sample], Result]) -> tuple[Sample, Result]:
        while True:
            try:
                return sample, encode(sample)
            except TooLong:
                shorter = without_last_turn(sample) if self.too_long == "cut" else None
                if shorter is None:
                    raise
                sample = shorter


def without_last_turn(sample: Sample) -> Sample | None:
    """A conversation up to the answer before its last, with the images it still speaks of; None if none is left."""
    return sample.until(sample.answers[-2] + 1) if len(sample.answers) > 1 else None

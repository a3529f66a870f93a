"""The contract of readers of formats: how a raw sample of a shard becomes a conversation."""

from __future__ import annotations

from abc import ABC, abstractmethod

from datamodules.shards.read import Raw
from lavi.batch import Sample


class SampleFormat(ABC):
    """Decodes raw samples. A recipe names it as ``data.format``; a subclass needs :meth:`decode` alone.

    Readers are other processes: an instance is picklable.
    """

    types: tuple[str, ...] = ()
    """Types of members (``cls`` of ``KEY.cls``) that are read besides ``json``, ``txt``, images and videos."""

    @abstractmethod
    def decode(self, raw: Raw) -> Sample:
        """The sample of ``{"__key__": str, "json": bytes, "jpg": bytes, ...}``: its members, by type.

        Raises:
            Exception: it cannot be read. That is one broken sample: its key and the error are counted and logged.
        """

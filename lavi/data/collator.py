"""Encoded samples to a batch: padding on one side, and where each image and each answer stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate

from lavi.batch import IGNORE, Answer, Batch, ImageSlot, Layout
from lavi.data.chat import Encoded
from lavi.errors import UserError


@dataclass
class EncodedSample:
    """One sample, encoded; pixels (views, C, H, W)."""

    key: str
    encoded: Encoded
    pixels: Tensor
    layouts: list[Layout]
    length: int
    """Text and visual tokens in the language model's sequence."""
    source: str = ""
    """Where it was read, for counts."""
    is_filler: bool = False
    """It keeps a rank in step with the others: it has no labels, and no answer is scored."""
    backbone_features: Tensor | None = None
    """(views, N, Dv): read in the place of pixels."""


def collate(rows: Sequence[EncodedSample | Sequence[EncodedSample]], *, pad_id: int, pad_left: bool = False) -> Batch:
    """Pad to one batch; on the left for decoding, so that all rows end together. A row may hold several samples."""
    packs = [[row] if isinstance(row, EncodedSample) else list(row) for row in rows]
    widths = [sum(len(ready.encoded.ids) for ready in pack) for pack in packs]
    width = max(widths)
    ids = torch.full((len(packs), width), pad_id)  # (B, T)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    slots, answers = [], []
    conversations: list[list[tuple[int, int]]] = []
    open_questions: list[list[int]] = []
    for row, pack in enumerate(packs):
        at = width - widths[row] if pad_left else 0
        conversations.append([])
        open_questions.append([])
        for ready in pack:
            stop = at + len(ready.encoded.ids)
            ids[row, at:stop] = torch.tensor(ready.encoded.ids)
            mask[row, at:stop] = True
            columns = zip(ready.encoded.image_columns, ready.layouts, strict=True)
            slots += [ImageSlot(row, at + column, layout) for column, layout in columns]
            if not ready.is_filler:
                labels[row, at:stop] = torch.tensor(ready.encoded.labels)
                turns = ready.encoded.turns
                answers += [Answer(row, at + t.start, at + t.stop, t.family, t.level) for t in turns]
            conversations[-1].append((at, stop))
            open_questions[-1].append(at + ready.encoded.open_question)
            at = stop
    each = [ready for pack in packs for ready in pack]
    return Batch(
        ids,
        labels,
        mask,
        _in_one([ready.pixels for ready in each]),
        spans=[(row[0][0], row[-1][1]) for row in conversations],
        image_slots=slots,
        answers=answers,
        keys=[ready.key for ready in each],
        packed=conversations if len(each) > len(packs) else None,
        open_questions=open_questions,
        backbone_features=_features_in_one(each),
    )


def _features_in_one(samples: list[EncodedSample]) -> Tensor | None:
    """(views, N, Dv) of all samples; None where they bring pixels.

    Raises:
        UserError: some bring features, and others pixels.
    """
    features = [one for sample in samples if (one := sample.backbone_features) is not None]
    if features and any(len(sample.pixels) for sample in samples):
        raise UserError(
            "a batch has images with cached features and images without: cache those of all sources of a split."
        )
    longest = max((of_one.shape[1] for of_one in features), default=0)  # at native resolution they differ
    padded = [pad(of_one, (0, 0, 0, longest - of_one.shape[1])) for of_one in features]
    return torch.cat(padded) if padded else None


def _in_one(pixels: list[Tensor]) -> Tensor:
    """(views, C, H, W) of all samples.

    In a loader's worker ``default_collate`` joins them in memory that the main process shares; joined elsewhere, they
    would be copied there once more.
    """
    views = [view for of_one in pixels for view in of_one]
    together: Tensor = default_collate(views) if views else pixels[0]
    return together

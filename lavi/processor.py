"""Samples to a batch: the chat's ids and labels, the tower's own preprocessing, padding on one side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lavi.batch import IGNORE, Answer, Batch, ImagePlace, Layout, Sample, Video
from lavi.chat import Chat, Encoded
from lavi.errors import UserError
from lavi.video import told_times
from lavi.vision.base import VisionBackbone
from lavi.vision.tiles import Tiling


@dataclass
class Ready:
    """One sample, encoded; pixels (views, C, H, W)."""

    key: str
    encoded: Encoded
    pixels: Tensor
    layouts: list[Layout]
    length: int
    """Text and visual tokens in the language model's sequence."""
    source: str = ""
    """Where it was read, for counts."""
    stands_in: bool = False
    """It keeps a rank in step and must not count: no label is kept, no answer scored."""


class TooLong(UserError):
    """A conversation that the context does not hold.

    Args:
        text, visual: its tokens.
        context: the most that there may be.
    """

    def __init__(self, text: int, visual: int, context: int) -> None:
        super().__init__(
            f"the conversation has {text} text and {visual} visual tokens, more than the context of {context}: shorten "
            "it, or raise model.context_length."
        )
        self.cause = f"longer than the context of {context} tokens (data.too_long=cut keeps its first turns)"
        """The same words for all such conversations, to count them by."""


@dataclass
class Processor:
    """Turns samples into batches; a model makes one for its tokenizer and its tower.

    Args:
        chat: tokenizer and template.
        vision: the backbone, whose own preprocessing the views get.
        tiling: how an image becomes views.
        tokens_of: visual tokens of an image that stand in the sequence: 0 unless the fusion puts them there.
        context_length: the most tokens a conversation may have, its visual tokens included.
        timestamps: say behind each video how long it is and when its frames are shown.
    """

    chat: Chat
    vision: VisionBackbone
    tiling: Tiling
    tokens_of: Callable[[Layout], int]
    context_length: int
    timestamps: bool = False

    def encode(self, sample: Sample, *, prompt: bool = False) -> Ready:
        """Encode one sample, as a whole or (``prompt``) up to the answer it waits for.

        Raises:
            TooLong: it is longer than the context.
            UserError: as :meth:`lavi.chat.Chat.encode`.
        """
        encoded, length = self.measure(sample, prompt=prompt)
        alone = len(sample.images) == 1
        views = [self.tiling.views(image, self.vision, alone=alone) for image in sample.images]
        seen = [pixels for pixels, _ in views]
        pixels = seen[0] if len(seen) == 1 else torch.cat([torch.zeros(0, *self.vision.pixel_shape), *seen])
        return Ready(sample.key, encoded, pixels, [layout for _, layout in views], length)

    def measure(self, sample: Sample, *, prompt: bool = False) -> tuple[Encoded, int]:
        """The words of a sample, encoded, and its text and visual tokens in all; no pixel is touched.

        Raises:
            UserError: as :meth:`encode`.
        """
        messages = sample.messages
        if self.timestamps:
            messages = told_times(messages, [one for one in sample.images if isinstance(one, Video)])
        to_ids = self.chat.encode_prompt if prompt else self.chat.encode
        encoded = to_ids(messages, images=len(sample.images))
        alone = len(sample.images) == 1
        visual = sum(self.tokens_of(self.tiling.layout(image, self.vision, alone=alone)) for image in sample.images)
        length = len(encoded.ids) + visual
        if length > self.context_length:
            raise TooLong(len(encoded.ids), visual, self.context_length)
        return encoded, length

    def collate(self, rows: Sequence[Ready | Sequence[Ready]], *, pad_left: bool = False) -> Batch:
        """Pad to one batch; on the left for decoding, so that all rows end together. A row may hold several samples."""
        packs = [[row] if isinstance(row, Ready) else list(row) for row in rows]
        widths = [sum(len(ready.encoded.ids) for ready in pack) for pack in packs]
        width = max(widths)
        ids = torch.full((len(packs), width), self.chat.pad_id)  # (B, T)
        labels = torch.full_like(ids, IGNORE)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        places, answers = [], []
        conversations: list[list[tuple[int, int]]] = []
        for row, pack in enumerate(packs):
            at = width - widths[row] if pad_left else 0
            conversations.append([])
            for ready in pack:
                stop = at + len(ready.encoded.ids)
                ids[row, at:stop] = torch.tensor(ready.encoded.ids)
                mask[row, at:stop] = True
                columns = zip(ready.encoded.image_columns, ready.layouts, strict=True)
                places += [ImagePlace(row, at + column, layout) for column, layout in columns]
                if not ready.stands_in:
                    labels[row, at:stop] = torch.tensor(ready.encoded.labels)
                    turns = ready.encoded.turns
                    answers += [Answer(row, at + t.start, at + t.stop, t.family, t.level) for t in turns]
                conversations[-1].append((at, stop))
                at = stop
        each = [ready for pack in packs for ready in pack]
        return Batch(
            ids,
            labels,
            mask,
            _in_one([ready.pixels for ready in each]),
            spans=[(row[0][0], row[-1][1]) for row in conversations],
            places=places,
            answers=answers,
            keys=[ready.key for ready in each],
            sources=[ready.source for ready in each],
            packed=conversations if len(each) > len(packs) else None,
        )


def _in_one(pixels: list[Tensor]) -> Tensor:
    """(views, C, H, W) of all samples.

    In a loader's worker ``default_collate`` joins them in memory that the main process shares; joined elsewhere, they
    would be copied there once more.
    """
    views = [view for of_one in pixels for view in of_one]
    together: Tensor = default_collate(views) if views else pixels[0]
    return together

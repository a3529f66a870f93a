"""Samples to a batch: the chat's ids and labels, the tower's own preprocessing, padding on one side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lavi.batch import IGNORE, Answer, Batch, ImagePlace, Layout, Sample
from lavi.chat import Chat, Encoded
from lavi.errors import UserError
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


@dataclass
class Processor:
    """Turns samples into batches; a model makes one for its tokenizer and its tower.

    Args:
        chat: tokenizer and template.
        vision: the backbone, whose own preprocessing the views get.
        tiling: how an image becomes views.
        tokens_of: visual tokens of an image that stand in the sequence: 0 unless the fusion puts them there.
        context_length: the most tokens a conversation may have, its visual tokens included.
    """

    chat: Chat
    vision: VisionBackbone
    tiling: Tiling
    tokens_of: Callable[[Layout], int]
    context_length: int

    def encode(self, sample: Sample, *, prompt: bool = False) -> Ready:
        """Encode one sample, as a whole or (``prompt``) up to the answer it waits for.

        Raises:
            UserError: it is longer than the context.
        """
        to_ids = self.chat.encode_prompt if prompt else self.chat.encode
        encoded = to_ids(sample.messages, images=len(sample.images))
        alone = len(sample.images) == 1
        views = [self.tiling.views(image, self.vision, alone=alone) for image in sample.images]
        visual = sum(self.tokens_of(layout) for _, layout in views)
        length = len(encoded.ids) + visual
        if length > self.context_length:
            raise UserError(
                f"the conversation has {len(encoded.ids)} text and {visual} visual tokens, more than the context of "
                f"{self.context_length}: shorten it, or raise model.context_length."
            )
        pixels = torch.cat([torch.zeros(0, *self.vision.pixel_shape), *(pixels for pixels, _ in views)])
        return Ready(sample.key, encoded, pixels, [layout for _, layout in views], length)

    def collate(self, ready: Sequence[Ready], *, pad_left: bool = False) -> Batch:
        """Pad to one batch; on the left for decoding, so that all rows end together."""
        width = max(len(r.encoded.ids) for r in ready)
        ids = torch.full((len(ready), width), self.chat.pad_id)
        labels = torch.full((len(ready), width), IGNORE)
        mask = torch.zeros(len(ready), width, dtype=torch.bool)
        spans, places, answers = [], [], []
        for row, r in enumerate(ready):
            length = len(r.encoded.ids)
            start = width - length if pad_left else 0
            ids[row, start : start + length] = torch.tensor(r.encoded.ids)
            labels[row, start : start + length] = torch.tensor(r.encoded.labels)
            mask[row, start : start + length] = True
            spans.append((start, start + length))
            columns = zip(r.encoded.image_columns, r.layouts, strict=True)
            places += [ImagePlace(row, start + column, layout) for column, layout in columns]
            answers += [Answer(row, start + t.start, start + t.stop, t.family, t.level) for t in r.encoded.turns]
        pixels = torch.cat([r.pixels for r in ready])
        return Batch(ids, labels, mask, pixels, spans, places, answers, keys=[r.key for r in ready])

"""Samples to a batch: the chat's ids and labels, the tower's own preprocessing, padding on one side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lavi.batch import IGNORE, Answer, Batch, ImagePlace, Sample
from lavi.chat import Chat, Encoded
from lavi.errors import UserError


@dataclass
class Ready:
    """One sample, encoded; pixels (images, C, H, W)."""

    key: str
    encoded: Encoded
    pixels: Tensor


@dataclass
class Processor:
    """Turns samples into batches; a model makes one for its tokenizer and its tower.

    Args:
        chat: tokenizer and template.
        preprocess: one image to (C, H, W).
        pixel_shape: (C, H, W) of one view.
        context_length: the most tokens a conversation may have, its visual tokens included.
        tokens_per_image: visual tokens of one image that stand in the sequence: 0 unless the fusion puts them there.
    """

    chat: Chat
    preprocess: Callable[[Image.Image], Tensor]
    pixel_shape: tuple[int, int, int]
    context_length: int
    tokens_per_image: int = 0

    def encode(self, sample: Sample, *, prompt: bool = False) -> Ready:
        """Encode one sample, as a whole or (``prompt``) up to the answer it waits for.

        Raises:
            UserError: it is longer than the context.
        """
        to_ids = self.chat.encode_prompt if prompt else self.chat.encode
        encoded = to_ids(sample.messages, images=len(sample.images))
        visual = len(sample.images) * self.tokens_per_image
        if len(encoded.ids) + visual > self.context_length:
            raise UserError(
                f"the conversation has {len(encoded.ids)} text and {visual} visual tokens, more than the context of "
                f"{self.context_length}: shorten it, or raise model.context_length."
            )
        views = [self.preprocess(image) for image in sample.images]
        pixels = torch.stack(views) if views else torch.zeros(0, *self.pixel_shape)
        return Ready(sample.key, encoded, pixels)

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
            places += [ImagePlace(row, start + column) for column in r.encoded.image_columns]
            answers += [Answer(row, start + t.start, start + t.stop, t.family, t.level) for t in r.encoded.turns]
        pixels = torch.cat([r.pixels for r in ready])
        return Batch(ids, labels, mask, pixels, spans, places, answers, keys=[r.key for r in ready])

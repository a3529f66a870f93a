"""One sample encoded: the chat's ids and labels, the tower's own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lavi.batch import Batch, CachedVisual, Layout, Sample, Video, Visual, is_video
from lavi.data.chat import Chat, Encoded
from lavi.data.collator import EncodedSample, collate
from lavi.data.image_numbers import number_images
from lavi.data.preprocessing import Preprocessing
from lavi.data.tiling import Tiling
from lavi.data.timestamps import add_timestamps
from lavi.errors import UserError, one_line


class TooLong(UserError):
    """A conversation that the context does not hold.

    Args:
        text, visual: its tokens.
        context: the most that there may be.
    """

    def __init__(self, text: int, visual: int, context: int) -> None:
        self.what = f"the conversation has {text} text and {visual} visual tokens, more than the context of {context}"
        """What is wrong; what can be done about it depends on where the conversation comes from."""
        super().__init__(f"{self.what}: shorten it, or raise model.context_length.")
        self.cause = f"longer than the context of {context} tokens (data.too_long=cut keeps its first turns)"
        """The same words for all such conversations, to count them by."""


@contextmanager
def one_bad_sample(report: Callable[[str], object]) -> Iterator[None]:
    """Within it, an error is reported by its cause and passes: a sample comes from elsewhere, and whatever it does to a
    decoder, a template or a tower, it is one sample. Want of memory is no sample's fault.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        report(getattr(error, "cause", one_line(error)))


def check_company(visuals: Sequence[CachedVisual]) -> None:
    """Whether the images of a conversation, or of its beginning, are cut as they were when their features were made.

    Raises:
        UserError: one was alone and is not, or the other way round, and the tiling cuts it otherwise then.
    """
    if any(visual.alone not in (None, len(visuals) == 1) for visual in visuals):
        raise UserError(
            "the features of an image are of another cut than these turns show it in (alone, or beside others): name "
            "data with pixels."
        )


@dataclass
class Processor:
    """Turns samples into batches; a model makes one for its tokenizer and its tower.

    Args:
        chat: tokenizer and template.
        preprocessing: the vision backbone's own, for each view.
        tiling: how an image becomes views.
        count_visual_tokens: visual tokens of an image that stand in the sequence: 0 unless the fusion puts them there.
        context_length: the most tokens a conversation may have, its visual tokens included.
        timestamps: say behind each video how long it is and when its frames are shown.
        image_numbers: say before each of several images which it is.
    """

    chat: Chat
    preprocessing: Preprocessing
    tiling: Tiling
    count_visual_tokens: Callable[[Layout], int]
    context_length: int
    timestamps: bool = False
    image_numbers: bool = False

    def encode(self, sample: Sample, *, prompt: bool = False) -> EncodedSample:
        """Encode one sample, as a whole or (``prompt``) up to the answer it waits for.

        Raises:
            TooLong: it is longer than the context.
            UserError: as :meth:`lavi.data.chat.Chat.encode`.
        """
        encoded, length = self.measure(sample, prompt=prompt)
        cached = [visual for visual in sample.images if isinstance(visual, CachedVisual)]
        if cached:
            check_company(cached)
            layouts = [visual.layout for visual in cached]
            features = torch.cat([visual.features for visual in cached])  # (views, N, Dv)
            return EncodedSample(sample.key, encoded, self._no_pixels, layouts, length, backbone_features=features)
        views = self.views(cast(Sequence[Visual], sample.images))
        parts = [pixels for pixels, _ in views]
        pixels = parts[0] if len(parts) == 1 else torch.cat([self._no_pixels, *parts])
        return EncodedSample(sample.key, encoded, pixels, [layout for _, layout in views], length)

    @property
    def _no_pixels(self) -> Tensor:
        return torch.zeros(0, *self.preprocessing.pixel_shape)

    def views(self, visuals: Sequence[Visual]) -> list[tuple[Tensor, Layout]]:
        """Pixels (views, C, H, W) of each image or video of one conversation, and how its views belong together.

        Raises:
            UserError: the tiling cannot cut one.
        """
        alone = len(visuals) == 1
        return [self.tiling.views(visual, self.preprocessing, alone=alone) for visual in visuals]

    def encode_seen(self, sample: Sample, layouts: Sequence[Layout]) -> EncodedSample:
        """A sample that waits for its answer, its images of these layouts computed before: no pixel is touched.

        Raises:
            UserError: as :meth:`encode`.
        """
        encoded, length = self.measure(sample, prompt=True, layouts=layouts)
        return EncodedSample(sample.key, encoded, self._no_pixels, list(layouts), length)

    def measure(
        self, sample: Sample, *, prompt: bool = False, layouts: Sequence[Layout] | None = None
    ) -> tuple[Encoded, int]:
        """The words of a sample, encoded, and its text and visual tokens in all; no pixel is touched.

        Args:
            layouts: of its images; None: those that the tiling gives them.

        Raises:
            UserError: as :meth:`encode`.
        """
        messages = sample.messages
        if self.timestamps:
            messages = add_timestamps(
                messages, [one for one in sample.images if isinstance(one, Video | CachedVisual) and is_video(one)]
            )
        if self.image_numbers:
            messages = number_images(messages, sample.images)
        to_ids = self.chat.encode_prompt if prompt else self.chat.encode
        encoded = to_ids(messages, images=len(sample.images))
        if layouts is None:
            alone = len(sample.images) == 1
            layouts = [
                visual.layout
                if isinstance(visual, CachedVisual)
                else self.tiling.layout(visual, self.preprocessing, alone=alone)
                for visual in sample.images
            ]
        visual = sum(map(self.count_visual_tokens, layouts))
        length = len(encoded.ids) + visual
        if length > self.context_length:
            raise TooLong(len(encoded.ids), visual, self.context_length)
        return encoded, length

    def collate(self, rows: Sequence[EncodedSample | Sequence[EncodedSample]], *, pad_left: bool = False) -> Batch:
        """As :func:`lavi.data.collator.collate`, with the tokenizer's padding."""
        return collate(rows, pad_id=self.chat.pad_id, pad_left=pad_left)

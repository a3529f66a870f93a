"""The contract of a fusion: how vision meets language.

Five kinds of meeting go through the same two doors. *Before* the decoder a fusion arranges the sequence (:meth:`
Fusion.forward`); *inside* it, each opened layer hands its call to the context (``VisualContext.around``):

    in the norms      LaVi              arrange: text as it is       around: bind deltas to the layer's norms
    in the sequence   concatenation     arrange: splice V into text  around: -
    in extra layers   cross-attention   arrange: text as it is       around: attend to V, then call
    layers choose     VISOR             arrange: V beside the text   around: call on both, or on the text alone
    on the way out    FastV, PDrop      arrange: splice V into text  around: call, then drop tokens

The language model's own parameters never change their names; a fusion owns its new ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lavi.batch import Batch, Layout
from lavi.errors import UserError
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.surgery import NormTarget
from lavi.vision.base import Seen


@dataclass(frozen=True)
class Cost:
    """FLOPs of one component (1 multiply-add = 2 FLOPs); ``uncounted`` of them no operator counter sees."""

    flops: float
    uncounted: float = 0.0


class Fusion(nn.Module, ABC):
    """Built unbound from a recipe, then bound once to a language model and to what it will see."""

    packs = False
    """Whether rows may hold several conversations, which do not see each other."""

    @property
    def chosen(self) -> list[NormTarget]:
        """The norms that it modulates."""
        return []

    @property
    def ways(self) -> Counter[Hashable]:
        """How often samples went each way through the decoder, since somebody last cleared it; empty: there is one."""
        return Counter()

    @contextmanager
    def going(self, way: Hashable) -> Iterator[None]:
        """All samples go one of the :attr:`ways`, as long as it holds."""
        yield

    def settled(self) -> dict[str, Any]:
        """Arguments that named a file, and what was read from it."""
        return {}

    @property
    def counted_way(self) -> Hashable | None:
        """The way that :meth:`costs` is about; None: there is only one."""
        return None

    @abstractmethod
    def bind(self, language: LanguageModel, seen: Seen) -> None:
        """Make the parameters, for features as ``seen``, and open the decoder."""

    @abstractmethod
    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        """Arrange one batch; ``features`` (views, N, Dv) stand in the order of ``batch.pixels``."""

    @abstractmethod
    def tokens_in_language(self, layout: Layout, per_view: int) -> int:
        """How many visual tokens of an image, ``per_view`` of each view, stand in the language model's sequence."""

    def visual_by_layer(self, inside: int, layers: int) -> list[int]:
        """How many visual tokens each decoder layer works on, of ``inside`` that stand in the sequence."""
        return [inside] * layers

    @abstractmethod
    def costs(self, text: int, layout: Layout | None, per_view: int, *, decoding: bool = False) -> dict[str, Cost]:
        """The fusion's own FLOPs for one row of ``text`` tokens, by formula.

        Components: ``generator`` and ``modulation``, or ``projector``, or what the method calls its parts.

        Args:
            layout: of the image that the row sees; None: it sees none.
            per_view: tokens of each of its views.
            decoding: the tokens follow a prompt: what is computed once an image is there already.
        """


@dataclass
class ColumnContext(VisualContext):
    """What layers read of the images: tokens that stand beside the text, each before one of its columns."""

    visual: dict[str, Tensor] = field(default_factory=dict)
    """(B, M, E) each."""
    column: Tensor = None  # type: ignore[assignment]
    """(B, M): the text column each token stands before."""
    start: Tensor | None = None
    """(B, T): the column at which each text token's conversation begins; None: a row is one conversation."""
    mask: Tensor | None = None
    """(B, T, M): what each text token of this call sees: the images before it, in its conversation."""

    def at(self, past: int, length: int) -> Self:
        columns = torch.arange(past, past + length, device=self.column.device)  # (T,)
        mask = self.column[:, None, :] <= columns[None, :, None]
        if self.start is not None:
            mask &= self.column[:, None, :] >= self.start[:, past : past + length, None]
        return replace(self, mask=mask)

    def held(self) -> list[Tensor]:
        return list(self.visual.values())

    def for_generation(self, copies: int) -> Self:
        visual = {name: tokens.repeat_interleave(copies, dim=0) for name, tokens in self.visual.items()}
        return replace(self, text_columns=None, visual=visual, column=self.column.repeat_interleave(copies, dim=0))


@dataclass
class Rows:
    """Which of the tokens that stand image by image belong to each row, padded; made on the host, once a batch.

    Padding stands before column :attr:`NEVER`. M is at least 1, so that no attention meets an empty axis.
    """

    index: Tensor
    """(B, M) into [the images' tokens | one zero vector]."""
    column: Tensor
    """(B, M): the text column each token stands before."""
    image: Tensor
    """(B, M): the number of its image in the row."""

    NEVER = 2**30

    def to(self, device: torch.device) -> Rows:
        return Rows(self.index.to(device), self.column.to(device), self.image.to(device))

    def gather(self, tokens: Tensor) -> Tensor:
        """(..., E) to (B, M, E)."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        return torch.cat([flat, flat.new_zeros(1, flat.shape[-1])])[self.index]


def rows_of(batch: Batch, counts: Sequence[int]) -> Rows:
    """The rows of a batch whose images have so many tokens each."""
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(len(batch))]  # (first token, after its last, column)
    first = 0
    for place, count in zip(batch.places, counts, strict=True):
        pieces[place.row].append((first, first + count, place.column))
        first += count
    longest = max(1, *(sum(after - first for first, after, _ in row) for row in pieces))
    index = torch.full((len(batch), longest), first, device="cpu")  # (B, M)
    column, image = torch.full_like(index, Rows.NEVER), torch.zeros_like(index)
    for row, pieces_of_row in enumerate(pieces):
        at = 0
        for number, (start, after, before) in enumerate(pieces_of_row):
            stop = at + after - start
            index[row, at:stop] = torch.arange(start, after, device="cpu")
            column[row, at:stop] = before
            image[row, at:] = number
            at = stop
    return Rows(index, column, image)


def text_alone(batch: Batch, vision: ColumnContext) -> DecoderInput:
    """The text of a batch as the decoder's input, nothing between its tokens."""
    inputs = DecoderInput(batch.attention_mask, vision, input_ids=batch.input_ids)
    if batch.packed is not None:
        inputs.conversation = conversation_of_text(batch).to(batch.input_ids.device)
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        vision.start = columns - inputs.position_ids  # (B, T)
    return inputs


def conversation_of_text(batch: Batch) -> Tensor:
    """(B, T): the number in its row of each text token's conversation, -1 for padding; on the host."""
    numbers = torch.full(batch.input_ids.shape, -1, device="cpu")
    for row, conversations in enumerate(batch.conversations):
        for number, (start, stop) in enumerate(conversations):
            numbers[row, start:stop] = number
    return numbers


def numbers_of_views(batch: Batch, device: torch.device) -> Tensor:
    """(views, 4): the image of its conversation from 0; the tile's row and column, and the frame, from 1 (0: none)."""
    seen = Counter[tuple[int, int]]()
    numbers: list[tuple[int, int, int, int]] = []
    for place in batch.places:
        conversation, layout = batch.conversation_of(place), place.layout
        image = seen[conversation]
        seen[conversation] += 1
        if layout.video:
            numbers += [(image, 0, 0, frame + 1) for frame in range(layout.views)]
        else:
            rows, columns = layout.tiles or (0, 0)
            numbers.append((image, 0, 0, 0))
            numbers += [(image, row + 1, column + 1, 0) for row in range(rows) for column in range(columns)]
    return torch.tensor(numbers, dtype=torch.long, device="cpu").reshape(-1, 4).to(device)


def spread_layers(count: int, chosen: int, where: str) -> list[int]:
    """``chosen`` of ``count`` layers: the first, the last, or one at the end of each of equal groups."""
    if where == "first":
        return list(range(chosen))
    if where == "last":
        return list(range(count - chosen, count))
    return [round((i + 1) * count / chosen) - 1 for i in range(chosen)]


def chosen_layers(
    count: int, *, every: int, layers: Sequence[int] | None, fraction: float | None, where: str, method: str
) -> list[int]:
    """The layers that a ``method`` works in, ascending: those named, else a share of ``count``, else one of ``every``.

    Raises:
        UserError: none, or one that the language model has not; a share or a group that is none.
    """
    if every < 1 or not (fraction is None or 0 < fraction <= 1):
        raise UserError(
            f"{method} takes every from 1 and a fraction above 0 and at most 1, not {every} and {fraction}."
        )
    if layers is not None:
        chosen = list(layers)
    elif fraction is not None:
        chosen = spread_layers(count, max(1, round(fraction * count)), where)
    else:
        chosen = list(range(every - 1, count, every))
    if not chosen or not all(0 <= layer < count for layer in chosen):
        raise UserError(
            f"{method} cannot work in layers {chosen} (every={every}): the language model has 0 to {count - 1}."
        )
    return sorted(set(chosen))


def modulation_flops(norms: int, text: int, width: int, *, scale: bool = True, shift: bool = True) -> float:
    """FLOPs of modulating ``norms`` norms for ``text`` tokens; no operator counter sees them.

    Per element: xhat (square, sum, product), dgamma xhat, the two sums.
    """
    return float((3 * scale + scale + scale + shift) * norms * text * width)


def asking_columns(batch: Batch) -> list[int]:
    """For each row the column of the last token before its first answer: all of a prompt has been read there.

    What depends on the question may depend on this token, and on none behind it: answers must not be seen.
    """
    columns = [stop - 1 for _, stop in batch.spans]
    for answer in reversed(batch.answers):
        columns[answer.row] = answer.start - 1
    return columns

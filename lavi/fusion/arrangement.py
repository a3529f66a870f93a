"""Where visual tokens stand: beside the text, or spliced into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lavi.batch import Batch
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.subsequence import ArrangedCall, LayeredCache
from lavi.nn.grid_code import GridCode, grid_of_tokens
from lavi.nn.take_rows import take_rows
from lavi.nn.view_embedding import ViewEmbedding
from lavi.nn.visibility import Visibility
from lavi.vision.windows import windows_of_views


@dataclass(kw_only=True)
class ColumnContext(VisualContext):
    """What layers read of the images: tokens that stand beside the text, each before one of its columns."""

    visual: dict[str, Tensor]
    """(B, M, E) each."""
    column: Tensor
    """(B, M): the text column each token stands before."""
    all_from: int | None = None
    """The text column from which on each token of each row sees everything; None: there is none."""
    start: Tensor | None = None
    """(B, T): the column at which each text token's conversation begins; None: a row is one conversation."""
    step: Visibility | None = None
    """What each text token of this call sees: the images before it, in its conversation."""

    @property
    def seen(self) -> Visibility:
        """The same, of a call that has begun."""
        assert self.step is not None
        return self.step

    @property
    def mask(self) -> Tensor:
        """(B, T, M): the same."""
        return self.seen.mask

    def for_step(self, past: int, length: int) -> Self:
        if self.start is None and self.all_from is not None and past >= self.all_from:
            shape = (len(self.column), length, self.column.shape[1])
            return replace(self, step=Visibility(shape, self.column.device))
        columns = torch.arange(past, past + length, device=self.column.device)  # (T,)
        mask = self.column[:, None, :] <= columns[None, :, None]
        if self.start is not None:
            mask &= self.column[:, None, :] >= self.start[:, past : past + length, None]
        return replace(self, step=Visibility.by(mask))

    def behind_prompt(self) -> Self:
        if type(self).for_step is not ColumnContext.for_step:
            return self  # each call has its own
        batch, visual = self.column.shape
        if self.all_from is not None:
            seen = Visibility((batch, 1, visual), self.column.device)
        else:
            seen = Visibility.by((self.column < Rows.NEVER)[:, None])  # (B, 1, M)
        return replace(self, prompt_is_read=True, step=seen)

    def cached_tensors(self) -> list[Tensor]:
        return list(self.visual.values())

    def for_generation(self, copies: int) -> Self:
        visual = {name: tokens.repeat_interleave(copies, dim=0) for name, tokens in self.visual.items()}
        return replace(self, text_columns=None, visual=visual, column=self.column.repeat_interleave(copies, dim=0))


@dataclass(kw_only=True)
class ArrangedContext(VisualContext):
    """Of layers that work on parts of an arranged prompt, which only a cache of theirs can keep."""

    length: int
    """S, of the arranged prompt."""
    past: int = 0
    new_tokens: int = 0

    def new_cache(self, config: PretrainedConfig) -> LayeredCache:
        return LayeredCache(config)

    @property
    def arranged(self) -> ArrangedCall:
        """This call on the arranged sequence."""
        return ArrangedCall(length=self.length, past=self.past, new_tokens=self.new_tokens)


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
    all_from: int | None
    """The text column before which all tokens of all rows stand; None: a row has padding."""

    NEVER = 2**30

    def to(self, device: torch.device) -> Rows:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("index", "column", "image")})

    def stand(self) -> dict[str, Any]:
        """Where they stand, as a :class:`ColumnContext` is told."""
        return {"column": self.column, "all_from": self.all_from}

    def gather(self, tokens: Tensor) -> Tensor:
        """(..., E) to (B, M, E)."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        return take_rows(torch.cat([flat, flat.new_zeros(1, flat.shape[-1])]), self.index)


def group_tokens_by_row(batch: Batch, counts: Sequence[int]) -> Rows:
    """The rows of a batch whose images have so many tokens each."""
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(len(batch))]  # (first token, after its last, column)
    first = 0
    for slot, count in zip(batch.image_slots, counts, strict=True):
        pieces[slot.row].append((first, first + count, slot.column))
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
    last = int(column.max())
    return Rows(index, column, image, None if last == Rows.NEVER else last)


def group_views_by_row(batch: Batch, per_view: int) -> Rows:
    """The rows of a batch whose views have ``per_view`` tokens each, without the padding of smaller grids."""
    layouts = [slot.layout for slot in batch.image_slots]
    rows = group_tokens_by_row(batch, [layout.views * layout.tokens_of_view(per_view) for layout in layouts])
    if (grids := batch.grids) is None:
        return rows
    counts = torch.tensor([height * width for height, width in grids], device="cpu")  # (views,)
    kept = (torch.arange(per_view, device="cpu") < counts[:, None]).flatten().nonzero()[:, 0]
    positions = torch.cat([kept, kept.new_tensor([len(grids) * per_view])])
    return replace(rows, index=positions[rows.index])


def text_only_input(batch: Batch, vision: ColumnContext) -> DecoderInput:
    """The text of a batch as the decoder's input, nothing between its tokens."""
    inputs = DecoderInput(batch.attention_mask, vision, input_ids=batch.input_ids)
    if batch.packed is not None:
        inputs.conversation = text_conversation_ids(batch).to(batch.input_ids.device)
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        vision.start = columns - inputs.position_ids  # (B, T)
    return inputs


def text_conversation_ids(batch: Batch) -> Tensor:
    """(B, T): the number in its row of each text token's conversation, -1 for padding; on the host."""
    numbers = torch.full(batch.input_ids.shape, -1, device="cpu")
    for row, conversations in enumerate(batch.conversations):
        for number, (start, stop) in enumerate(conversations):
            numbers[row, start:stop] = number
    return numbers


def view_indices(batch: Batch, device: torch.device) -> Tensor:
    """(views, 4): the image of its conversation from 0; the tile's row and column, and the frame, from 1 (0: none)."""
    seen = Counter[tuple[int, int]]()
    numbers: list[tuple[int, int, int, int]] = []
    for slot in batch.image_slots:
        conversation, layout = batch.conversation_of(slot), slot.layout
        image = seen[conversation]
        seen[conversation] += 1
        if layout.video:
            numbers += [(image, 0, 0, frame + 1) for frame in range(layout.views)]
        else:
            rows, columns = layout.tiles or (0, 0)
            numbers.append((image, 0, 0, 0))
            numbers += [(image, row + 1, column + 1, 0) for row in range(rows) for column in range(columns)]
    return torch.tensor(numbers, dtype=torch.long, device="cpu").reshape(-1, 4).to(device)


def view_windows(batch: Batch, grid: tuple[int, int], device: torch.device) -> Tensor:
    """(views, 4): top, left, height and width of each view, in heights and widths of its image.

    Args:
        grid: rows and columns of the tokens of one view; their cells are square.
    """
    windows = [window for layout in batch.layouts for window in windows_of_views(layout, grid)]
    return torch.tensor(windows, device="cpu").reshape(-1, 4).to(device)


def view_and_grid_code(
    view_embedding: ViewEmbedding,
    grid_code: GridCode | None,
    batch: Batch,
    features: Tensor,
    grid: tuple[int, int] | None,
) -> Tensor:
    """What is added to normalised ``features`` (views, N, Dv): which view they are of, and where in its image they lie.

    Returns:
        (views, N, Dv), or (views, 1, Dv) without a code of the grid.
    """
    of_view = view_embedding(view_indices(batch, features.device))  # (views, 1, Dv)
    code = grid_code_of(grid_code, batch, features, grid)
    return of_view if code is None else of_view + code


def grid_code_of(code: GridCode | None, batch: Batch, features: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """Where each token of ``features`` (views, N, Dv), of a ``grid`` a view, lies: (views, N, Dv), or None."""
    if code is None or grid is None:
        return None
    views, tokens, _ = features.shape
    if (own := batch.grids) is not None:
        windows = view_windows(batch, grid, features.device)
        return code(windows, own, tokens)
    grid = grid_of_tokens(tokens, grid)
    windows = view_windows(batch, grid, features.device)
    return code(windows, [grid] * views, tokens, prefix=tokens - grid[0] * grid[1])


def last_prompt_columns(batch: Batch) -> list[int]:
    """For each row the column of the last token before its first answer: all of a prompt has been read there.

    What depends on the question may depend on this token, and on none behind it: answers must not be seen.
    """
    columns = [stop - 1 for _, stop in batch.spans]
    for answer in reversed(batch.answers):
        columns[answer.row] = answer.start - 1
    return columns


def splice_tokens(text: Tensor, visual: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, T, D) and visual tokens (n, D) in an ``order`` that :func:`splice` made: (B, T', D), and its mask."""
    flat = torch.cat([text.flatten(0, 1), visual.to(text.dtype), text.new_zeros(1, text.shape[-1])])
    order = order.to(text.device)
    mask = order >= 0
    return take_rows(flat, order.masked_fill(~mask, len(flat) - 1)), mask


def conversation_ids(batch: Batch, counts: list[int], order: Tensor) -> Tensor:
    """(B, T'): which conversation of its row each token of an ``order`` belongs to, -1 for padding."""
    of_text = text_conversation_ids(batch).flatten()  # (B T,)
    of_slot = [batch.conversation_of(slot)[1] for slot in batch.image_slots]
    of_visual = torch.tensor(of_slot, dtype=torch.long, device="cpu").repeat_interleave(
        torch.tensor(counts, dtype=torch.long, device="cpu")
    )
    nothing = torch.full((1,), -1, device="cpu")
    return torch.cat([of_text, of_visual, nothing])[order]  # -1 is the last


def splice(batch: Batch, counts: list[int], *, text_width: int) -> tuple[Tensor, Tensor]:
    """Where every token of the arranged sequence comes from, and where every text token goes; made on the host.

    Args:
        counts: visual tokens of each image of the batch.

    Returns:
        ``order`` (B, T'): an index into [text (B T) | visual tokens], -1 for padding; on the side where the text was
        padded. ``columns`` (B, T): the column of each text token in the arranged sequence.
    """
    slots: list[list[tuple[int, int, int]]] = [[] for _ in range(len(batch))]  # (column, first token, after its last)
    first = len(batch) * text_width
    for slot, count in zip(batch.image_slots, counts, strict=True):
        slots[slot.row].append((slot.column, first, first + count))
        first += count
    rows, columns = [], torch.zeros(len(batch), text_width, dtype=torch.long, device="cpu")
    for row, (start, stop) in enumerate(batch.spans):
        pieces, at, length = [], start, 0
        for column, first, after in [*sorted(slots[row]), (stop, 0, 0)]:
            text = torch.arange(row * text_width + at, row * text_width + column, device="cpu")
            columns[row, at:column] = torch.arange(length, length + len(text), device="cpu")
            pieces += [text, torch.arange(first, after, device="cpu")]
            at, length = column, length + len(text) + after - first
        rows.append(torch.cat(pieces))
    longest = max(len(sequence) for sequence in rows)
    order = torch.full((len(rows), longest), -1, device="cpu")
    # Text padded on the left keeps its ends together, for decoding.
    pads_left = all(stop == text_width for _, stop in batch.spans)
    for row, sequence in enumerate(rows):
        offset = longest - len(sequence) if pads_left else 0
        order[row, offset : offset + len(sequence)] = sequence
        start, stop = batch.spans[row]
        columns[row, start:stop] += offset
    return order, columns


def visual_columns(order: Tensor, text_tokens: int, *, least: int = 0) -> Tensor:
    """(B, M): the columns that each row's visual tokens have in an ``order`` (B, S) that :func:`splice` made.

    Args:
        text_tokens: of the whole batch; they stand before the visual ones in what ``order`` counts.
        least: the least M.

    Returns:
        On the host, S for padding.
    """
    own = [(row >= text_tokens).nonzero()[:, 0] for row in order]
    columns = torch.full((len(order), max(least, *map(len, own))), order.shape[1], device="cpu")
    for row, visual in enumerate(own):
        columns[row, : len(visual)] = visual
    return columns

"""Token concatenation, the baseline everything is measured against (LLaVA: arXiv 2304.08485, 2310.03744, 2408.03326).

    image -> tower -> projector -> V (n, D)      [ text before | V ... V | text after ] -> decoder
                                                   the image stands where the conversation puts it

Every visual token is a token of the language model: it costs its attention, its feed-forward part and its cache. With
any-resolution tiling (vision/tiles.py) this is LLaVA-OneVision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavi.arguments import Count
from lavi.batch import Batch, Layout
from lavi.fusion.base import Cost, Fusion, conversation_of_text
from lavi.language.context import DecoderInput, VisualContext
from lavi.language.load import LanguageModel
from lavi.language.surgery import open_decoder
from lavi.nn.flops import linear_flops
from lavi.vision.base import Seen
from lavi.vision.tiles import Packing


class ConcatFusion(Fusion):
    """A two-layer GELU projector (LLaVA-1.5), then the visual tokens are spliced into the text.

    Args:
        newline: a learned embedding ends each row of a tiled image's grid, and every other image (LLaVA-OneVision).
        budget: a tiled image keeps at most about this many views' worth of tile tokens (``anyres_max_9``).
    """

    packs = True

    def __init__(self, *, newline: bool = False, budget: Count = 9) -> None:
        super().__init__()
        self.has_newline, self.budget = newline, budget

    def bind(self, language: LanguageModel, seen: Seen) -> None:
        self.widths = (seen.width, language.width)
        self.packing = Packing(seen.grid, budget=self.budget)
        self.projector = nn.Sequential(
            nn.Linear(seen.width, language.width), nn.GELU(), nn.Linear(language.width, language.width)
        )
        self.newline = nn.Parameter(torch.randn(language.width) * language.width**-0.5) if self.has_newline else None
        open_decoder(language.hf)

    def forward(self, batch: Batch, features: Tensor, language: LanguageModel) -> DecoderInput:
        text = language.embed(batch.input_ids)  # (B, T, D)
        visual, counts = self.visual_tokens(batch, self.projector(features.float()).to(text.dtype))
        order, columns = splice(batch, counts, text_width=text.shape[1])
        embeds, mask = placed(text, visual, order)
        vision = VisualContext(text_columns=columns.to(text.device))
        conversation = None if batch.packed is None else conversations(batch, counts, order).to(text.device)
        return DecoderInput(inputs_embeds=embeds, attention_mask=mask, vision=vision, conversation=conversation)

    def visual_tokens(self, batch: Batch, projected: Tensor) -> tuple[Tensor, list[int]]:
        """(views, N, D) to the visual tokens (n, D) of all images one after the other, and how many each has."""
        images = projected.split([place.views for place in batch.places]) if batch.places else ()
        packed = [
            self.packing.pack(image, place.layout, self.newline)
            for image, place in zip(images, batch.places, strict=True)
        ]
        # Without an image they are empty, and still in the graph: a rank without one must not hang the others.
        empty = [projected.flatten(0, 1)[:0]]
        if self.newline is not None:
            empty.append(self.newline[None][:0].to(projected))
        return torch.cat([*empty, *packed]), [len(tokens) for tokens in packed]

    def tokens_in_language(self, layout: Layout, per_view: int) -> int:
        return self.packing.count(layout, per_view, newline=self.has_newline)

    def costs(self, text: int, layout: Layout | None, per_view: int, *, decoding: bool = False) -> dict[str, Cost]:
        vision_width, width = self.widths
        visual = 0 if decoding or layout is None else layout.views * per_view
        return {"projector": Cost(linear_flops(visual, vision_width, width) + linear_flops(visual, width, width))}


def placed(text: Tensor, visual: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, T, D) and visual tokens (n, D) in an ``order`` that :func:`splice` made: (B, T', D), and its mask."""
    flat = torch.cat([text.flatten(0, 1), visual.to(text.dtype), text.new_zeros(1, text.shape[-1])])
    order = order.to(text.device)
    mask = order >= 0
    return flat[order.masked_fill(~mask, len(flat) - 1)], mask


def conversations(batch: Batch, counts: list[int], order: Tensor) -> Tensor:
    """(B, T'): which conversation of its row each token of an ``order`` belongs to, -1 for padding."""
    of_text = conversation_of_text(batch).flatten()  # (B T,)
    of_place = [batch.conversation_of(place)[1] for place in batch.places]
    of_visual = torch.tensor(of_place, dtype=torch.long, device="cpu").repeat_interleave(
        torch.tensor(counts, dtype=torch.long, device="cpu")
    )
    nothing = torch.full((1,), -1, device="cpu")
    return torch.cat([of_text, of_visual, nothing])[order]  # -1 is the last


def splice(batch: Batch, counts: list[int], *, text_width: int) -> tuple[Tensor, Tensor]:
    """Where every token of the arranged sequence comes from, and where every text token goes; made on the host.

    Args:
        counts: visual tokens of each place of the batch.

    Returns:
        ``order`` (B, T'): an index into [text (B T) | visual tokens], -1 for padding; on the side where the text was
        padded. ``columns`` (B, T): the column of each text token in the arranged sequence.
    """
    places: list[list[tuple[int, int, int]]] = [[] for _ in range(len(batch))]  # (column, first token, after its last)
    first = len(batch) * text_width
    for place, count in zip(batch.places, counts, strict=True):
        places[place.row].append((place.column, first, first + count))
        first += count
    rows, columns = [], torch.zeros(len(batch), text_width, dtype=torch.long, device="cpu")
    for row, (start, stop) in enumerate(batch.spans):
        pieces, at, length = [], start, 0
        for column, first, after in [*sorted(places[row]), (stop, 0, 0)]:
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

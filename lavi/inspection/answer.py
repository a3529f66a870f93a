"""One question and its answer, looked into: what the images do to each word, and where they are looked at."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lavi.batch import Batch, Sample, Visual, question_about
from lavi.data.collator import EncodedSample
from lavi.fusion.arrangement import group_views_by_row
from lavi.inspection.probes import Target, linear_cka, reading, relevance
from lavi.model import VisionLanguageModel
from lavi.nn.grid_code import grid_of_tokens


@dataclass
class View:
    """One view of an image as the tower saw it, and the grid that its visual tokens lie on."""

    pixels: Tensor | None
    """(H, W, 3), from 0 to 1; None where its features were read in their place."""
    grid: tuple[int, int]
    first: int
    """Index of the grid's first token among the visual tokens of the row."""

    def cells(self, weights: Tensor) -> Tensor:
        """Of weights (M,) of the row's visual tokens those of this view: (rows, columns)."""
        rows, columns = self.grid
        return weights[self.first : self.first + rows * columns].view(rows, columns)


@dataclass
class Inspection:
    """What was read of one conversation of T tokens about M visual tokens."""

    question: str
    answer: str
    words: list[str]
    """The text of each token, its position in a word as it is."""
    answer_tokens: range
    views: list[View]
    """Empty where the visual tokens lie on no grid: a reducer may have taken them off it."""
    relevance: Tensor
    """(M,): the share that each visual token has in the answer, by gradient times feature."""
    strength: dict[Target, list[float]] = field(default_factory=dict)
    """Of each modulated norm, each token's."""
    shares: dict[int, Tensor] = field(default_factory=dict)
    """(T, M) of each layer that attends."""
    cka: Tensor | None = None
    """(L + 1, L + 1), of the text's states behind the embeddings and behind each layer."""
    routes: list[Hashable] = field(default_factory=list)
    """The way that the sample took through the decoder."""

    @property
    def mean_shares(self) -> Tensor | None:
        """(T, M): the mean over layers; None where no layer attends by a generator of its own."""
        return torch.stack(list(self.shares.values())).mean(0) if self.shares else None

    @property
    def mean_strength(self) -> list[float] | None:
        """Each token's, the mean over norms; None where none is modulated."""
        if not self.strength:
            return None
        return [sum(of_token) / len(of_token) for of_token in zip(*self.strength.values(), strict=True)]


def inspect_answer(
    model: VisionLanguageModel, question: str, visuals: Sequence[Visual], *, answer: str | None = None, **decoding: Any
) -> Inspection:
    """Answer a question about images, and read what happens meanwhile.

    Args:
        answer: to be taken in the place of the model's own.
        decoding: as :meth:`lavi.model.VisionLanguageModel.ask` takes it.

    Raises:
        UserError: as :meth:`lavi.model.VisionLanguageModel.ask`.
    """
    state = model.see(*visuals)
    if answer is None:
        answer = model.ask(question, state=state, **decoding)
    messages = [*question_about(state.visuals, question), {"role": "assistant", "content": answer}]
    sample = Sample("inspected", messages, list(state.visuals))
    (inspected,) = inspect_each(model, [model.processor.encode(sample)], [(question, answer)])
    return inspected


def inspect_batch(model: VisionLanguageModel, batch: Batch, asked: Sequence[tuple[str, str]]) -> list[Inspection]:
    """The same of a batch of conversations of one question each; ``asked``: each question and its answer.

    Rows of one batch may not take several routes through the decoder: of those :func:`inspect_each` makes batches.
    """
    batch = replace(batch, features=model.features_of(batch).detach())  # the tower runs once
    counts = model.fusion.route_counts
    before = counts.copy()
    counts.clear()
    try:
        with reading(model) as readings, torch.no_grad():
            model.token_scores(batch)
        routes = list(counts)
        columns = text_columns(model, batch)  # before the backward pass, behind which sharded weights are shards again
        relevant = relevance(model, batch) if batch.image_slots else None
    finally:  # others count with it
        counts.clear()
        counts.update(before)
    width = batch.input_ids.shape[1]
    per_view = 0 if relevant is None else relevant.shape[1]
    rows = group_views_by_row(batch, max(1, per_view))
    inspected = []
    for row, (question, answer) in enumerate(asked):
        start, stop = batch.spans[row]
        ids = batch.input_ids[row, start:stop].tolist()
        words = [str(model.chat.tokenizer.decode([number])) for number in ids]
        labelled = (batch.labels[row, start:stop] >= 0).nonzero()[:, 0].tolist()
        states = [_of_text(state[row], columns[row], start, stop, width) for state in readings.states]
        weights = torch.zeros(0) if relevant is None else _of_row(relevant, rows.index[row])
        inspected.append(
            Inspection(
                question=question,
                answer=answer,
                words=words,
                answer_tokens=range(labelled[0], labelled[-1] + 1) if labelled else range(0),
                views=_views(model, batch, row),
                relevance=weights.cpu(),
                strength={
                    target: value.reshape(len(batch), -1)[row, start:stop].tolist()
                    for target, value in readings.strength.items()
                },
                shares={layer: value[row, start:stop].cpu() for layer, value in readings.shares.items()},
                cka=linear_cka(states).cpu() if len(set(map(len, states))) == 1 else None,
                routes=routes if len(routes) == 1 else [],
            )
        )
    return inspected


def inspect_each(
    model: VisionLanguageModel, samples: Sequence[EncodedSample], asked: Sequence[tuple[str, str]]
) -> list[Inspection]:
    """The same of several samples: in one batch, or each alone where rows may take several routes."""
    device = model.language.hf.device
    batches = [range(len(samples))] if model.fusion.default_route is None else [[n] for n in range(len(samples))]
    return [
        one
        for numbers in batches
        for one in inspect_batch(
            model,
            model.processor.collate([samples[number] for number in numbers]).to(device),
            [asked[number] for number in numbers],
        )
    ]


def text_columns(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """(B, T): where the text tokens stand in the sequence that layers work on."""
    with torch.no_grad():
        inputs = model.fusion(batch, model.features_of(batch), model.language)
    columns = inputs.vision.text_columns
    if columns is None:
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand(len(batch), -1)
    return columns


def _of_text(state: Tensor, columns: Tensor, start: int, stop: int, width: int) -> Tensor:
    """The text's states (tokens, D) of a row's (length, D); a layer that works on the text alone has just them."""
    if len(state) == width:
        return state[start:stop]
    inside = columns[start:stop]
    return state[inside[inside < len(state)]]


def _of_row(weights: Tensor, index: Tensor) -> Tensor:
    """Of weights (views, N) those of a row's visual tokens (M,)."""
    flat = torch.cat([weights.flatten(), weights.new_zeros(1)])
    return flat[index.to(flat.device).clamp(max=len(flat) - 1)]


def _views(model: VisionLanguageModel, batch: Batch, row: int) -> list[View]:
    spec = model.feature_spec
    if spec.grid is None and batch.grids is None:
        return []
    views, number, first = [], 0, 0
    for slot in batch.image_slots:
        for _ in range(slot.views):
            if slot.row == row:
                tokens = slot.layout.tokens_of_view(spec.tokens)
                grid = slot.layout.grid or grid_of_tokens(tokens, spec.grid or (1, tokens))
                prefix = tokens - grid[0] * grid[1]
                pixels = None
                if number < len(batch.pixels):
                    pixels = _shown(model.processor.preprocessing.colours(batch.pixels[number], slot.layout.size))
                views.append(View(pixels, grid, first + max(0, prefix)))
                first += tokens
            number += 1
    return views


def _shown(colours: Tensor) -> Tensor:
    """Colours (3, H, W) of any range as (H, W, 3) from 0 to 1."""
    low, high = colours.amin(), colours.amax()
    return ((colours - low) / (high - low).clamp(min=1e-6)).expand(3, -1, -1).permute(1, 2, 0).float().cpu()

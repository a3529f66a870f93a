"""What images do to words as a model trains: pictures of the first validation samples, and how alike layers are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch

from callbacks.first_samples import FirstSamples
from callbacks.samples import picture_of
from lavi.batch import Sample, references_of, text_of
from lavi.data.data_module import DataModule
from lavi.inspection.answer import Inspection, inspect_each
from lavi.model import VisionLanguageModel


class Modulation(FirstSamples[Sample, list[Inspection]]):
    """After each validation, looks into the first validation samples and their true answers.

    In TensorBoard, under Images: ``inspection/strength`` (how strongly each token's norms are modulated, one row a
    norm), ``inspection/patches`` (what the answer depends on, over the picture), ``inspection/words`` (the words that
    are modulated most) and ``inspection/cka`` (how alike the layers' states of the text are). Under Scalars the mean
    strength of each norm.

    Args:
        count: how many samples.
    """

    def prepare(self, model: VisionLanguageModel, sample: Sample) -> Sample:
        """The first question, with its true answer."""
        short = sample.until(sample.answers[0] + 1)
        model.processor.encode(short)
        return short

    def run(self, module: pl.LightningModule) -> list[Inspection]:
        model = cast(VisionLanguageModel, module.model)
        encoded = [model.processor.encode(sample) for sample in self.prepared]
        asked = [(text_of(s.messages[-2]["content"]), references_of(s.messages[-1])[0]) for s in self.prepared]
        return inspect_each(model, encoded, asked)

    def show(self, result: list[Inspection], data: DataModule, writer: Any, step: int) -> None:
        for name, figure in figures_of(result, self.prepared).items():
            writer.add_figure(f"inspection/{name}", figure, step)
        for target, value in _means(result).items():
            writer.add_scalar(f"inspection/strength/{target}", value, step)


def _means(inspected: Sequence[Inspection]) -> dict[str, float]:
    """The mean strength of each norm, over all tokens."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in inspected:
        for target, strengths in one.strength.items():
            values[str(target).replace(", ", "_").replace(" ", "_")] += strengths
    return {name: sum(of) / len(of) for name, of in values.items()}


# --- figures ----------------------------------------------------------------------------------------------------------


def figures_of(inspected: Sequence[Inspection], samples: Sequence[Sample]) -> dict[str, object]:
    """The figures that there are, by name."""
    figures: dict[str, object] = {}
    if any(one.strength for one in inspected):
        figures |= {"strength": _strength(inspected), "words": _words(inspected)}
    if any(one.views for one in inspected):
        figures["patches"] = _patches(inspected, samples)
    if (cka := [one.cka for one in inspected if one.cka is not None]) and len(cka[0]) > 1:
        figures["cka"] = _cka(torch.stack(cka).mean(0))
    return figures


def _strength(inspected: Sequence[Inspection]) -> object:
    """One heat map a sample: norms by tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(inspected)), layout="constrained")
    for axes, one in zip(figure.subplots(len(inspected), 1, squeeze=False)[:, 0], inspected, strict=True):
        image = axes.imshow(list(one.strength.values()), aspect="auto", cmap="Blues", vmin=0)
        axes.set_xticks(range(len(one.words)), [_plain(word) for word in one.words], rotation=60, fontsize=7)
        axes.set_yticks(range(len(one.strength)), [str(target) for target in one.strength], fontsize=7)
        figure.colorbar(image, ax=axes)
    return figure


def _words(inspected: Sequence[Inspection], most: int = 30) -> object:
    """The mean strength of each word, the strongest first (LaVi, figure 7)."""
    from matplotlib.figure import Figure

    values: dict[str, list[float]] = defaultdict(list)
    for one in inspected:
        for word, value in zip(one.words, one.mean_strength or [], strict=False):
            values[_plain(word)].append(value)
    means = sorted(((sum(of) / len(of), word) for word, of in values.items()), reverse=True)[:most]
    figure = Figure(figsize=(6, 0.22 * len(means) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([word for _, word in means][::-1], [value for value, _ in means][::-1])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("what the image adds to a norm's output, over its length without it")
    return figure


def _patches(inspected: Sequence[Inspection], samples: Sequence[Sample]) -> object:
    """The first view of each sample, what the answer depends on over it."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(inspected) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    for axes, one, sample in zip(grid, inspected, samples, strict=False):
        if one.views:
            view = one.views[0]
            pixels = picture_of(sample) if view.pixels is None else view.pixels
            axes.imshow(pixels, extent=(0, 1, 0, 1))
            axes.imshow(view.cells(one.relevance), extent=(0, 1, 0, 1), cmap="inferno", alpha=0.55)
        else:
            axes.imshow(picture_of(sample))
        axes.set_title(f"{one.question}\n{one.answer}"[:160], fontsize=8, parse_math=False, wrap=True)
    return figure


def _cka(matrix: torch.Tensor) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(matrix, vmin=0, vmax=1), ax=axes)
    axes.set_xlabel("behind layer (0: embeddings)")
    axes.set_ylabel("behind layer")
    return figure


def _plain(word: str) -> str:
    return word.strip().replace("$", r"\$") or "·"

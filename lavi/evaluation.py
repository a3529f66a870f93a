"""Scoring a trained run: answers on held-out samples, beside the controls, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lavi.batch import Batch, Sample, Video, Visual
from lavi.efficiency.comparison import CONTROLS
from lavi.efficiency.point import Scenario
from lavi.metrics.answers import FamilyAccuracy
from lavi.model import VisionLanguageModel
from lavi.processor import Ready
from lavi.report import track


@dataclass
class Prompt:
    """One question with everything said before it, and the true answer."""

    sample: Sample
    truth: str
    family: str
    level: str


def prompts_of(samples: Sequence[Sample]) -> list[Prompt]:
    """One prompt for each answer of each conversation."""
    prompts = []
    for sample in samples:
        for i, message in enumerate(sample.messages):
            if message["role"] == "assistant":
                asked = Sample(sample.key, sample.messages[:i], sample.images)
                prompts.append(
                    Prompt(asked, str(message["content"]), message.get("family", "all"), message.get("level", "all"))
                )
    return prompts


def with_shuffled_images(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same questions about the images of others: of the prompt half the list away with as many images."""
    by_count: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_count.setdefault(len(prompt.sample.images), []).append(index)
    images: dict[int, Sequence[Visual]] = {}
    for same in by_count.values():
        half = len(same) // 2
        images |= {i: prompts[j].sample.images for i, j in zip(same, same[half:] + same[:half], strict=True)}
    return [
        Prompt(Sample(p.sample.key, p.sample.messages, images[i]), p.truth, p.family, p.level)
        for i, p in enumerate(prompts)
    ]


def score(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    device: torch.device,
    without_images: bool = False,
    batch_size: int = 128,
    max_new_tokens: int = 16,
    label: str = "answering",
) -> dict[str, float]:
    """Percent of answers that equal the truth, by group; an empty answer is a wrong one."""
    accuracy = FamilyAccuracy()
    for some in track(list(_batches(prompts, batch_size)), description=label):
        batch = collate(model, [p.sample for p in some])
        batch = batch.without_images() if without_images else batch
        answers = model.answer(batch.to(device), max_new_tokens=max_new_tokens)
        right = [said.strip().lower() == p.truth.strip().lower() for said, p in zip(answers, some, strict=True)]
        accuracy.update(right, [(p.family, p.level) for p in some])
    return accuracy.compute()


def collate(model: VisionLanguageModel, samples: Sequence[Sample]) -> Batch:
    """Prompts to a left-padded batch."""
    ready: list[Ready] = [model.processor.encode(sample, prompt=True) for sample in samples]
    return model.processor.collate(ready, pad_left=True)


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def evaluate(
    model: VisionLanguageModel, samples: Sequence[Sample], *, device: torch.device, name: str
) -> dict[str, Any]:
    """Accuracy on the samples, and on the controls: their images shuffled among them, and none at all.

    Returns:
        ``accuracy`` and ``controls`` of a record; ``ways``, how often samples went each way through the decoder.
    """
    prompts = prompts_of(samples)
    model.fusion.ways.clear()
    scores: dict[str, Any] = {"accuracy": score(model, prompts, device=device, label=f"{name}: answering")}
    scores["ways"] = Counter(model.fusion.ways)
    shuffled = score(model, with_shuffled_images(prompts), device=device, label=f"{name}: {CONTROLS[0]}")
    none = score(model, prompts, device=device, without_images=True, label=f"{name}: {CONTROLS[1]}")
    return scores | {"controls": dict(zip(CONTROLS, (shuffled, none), strict=True))}


def typical_prompt(model: VisionLanguageModel, samples: Sequence[Sample]) -> Scenario:
    """A prompt as these are, in the median: its text, and one image of their size, or a video of their frames.

    Where prompts have several of them, as many visual tokens as the tower gives for all their views.
    """
    prompts = prompts_of(samples)
    lengths = [len(model.chat.encode_prompt(p.sample.messages, images=len(p.sample.images)).ids) for p in prompts]
    text, images = int(median(lengths)), int(median(len(p.sample.images) for p in prompts))
    if images != 1:
        views = median(sum(_views(model, visual) for visual in p.sample.images) for p in prompts)
        return Scenario(text, visual_tokens=int(views) * model.vision.tokens)
    seen = [visual for prompt in prompts for visual in prompt.sample.images]
    frames = [len(visual.frames) for visual in seen if isinstance(visual, Video)]
    if 2 * len(frames) > len(seen):
        return Scenario(text, frames=int(median(frames)))
    sizes = [visual.size for visual in seen if not isinstance(visual, Video)]
    return Scenario(text, image=(int(median(w for w, _ in sizes)), int(median(h for _, h in sizes))))


def _views(model: VisionLanguageModel, visual: Visual) -> int:
    """Of one image or video among others."""
    if isinstance(visual, Video):
        return len(visual.frames)
    return model.tiling.cut(visual, model.vision, alone=False)[1].views

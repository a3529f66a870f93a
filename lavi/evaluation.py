"""Scoring a trained run: answers on held-out samples, beside the controls, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.progress import track

from lavi.batch import Batch, Sample, Video, Visual
from lavi.efficiency.point import Scenario
from lavi.efficiency.record import Record
from lavi.metrics.answers import FamilyAccuracy
from lavi.model import VisionLanguageModel
from lavi.processor import Ready

CONTROLS = ("shuffled images", "no image")


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
    for some in track(list(_batches(prompts, batch_size)), description=label, transient=True):
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


def side_by_side(records: Sequence[Record], baseline: Record | None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison: one column a method, one row a figure; savings are against ``baseline``."""
    from lavi.efficiency.measure import saving

    def row(name: str, cells: Sequence[str]) -> list[str]:
        return [name, *cells]

    rows = []
    for group in sorted({g for r in records for g in r.accuracy}, key=_group_order):
        rows.append(row(f"{_group_name(group)} (%)", [f"{r.accuracy.get(group, float('nan')):.1f}" for r in records]))
    for control in CONTROLS:
        for group in ("level/easy", "all"):
            if all(group in r.controls.get(control, {}) for r in records):
                cells = [f"{r.controls[control][group]:.1f}" for r in records]
                rows.append(row(f"control, {control}: {_group_name(group)} (%)", cells))
    rows.append(row("visual tokens in the language model", [str(r.visual_tokens_in_language) for r in records]))
    rows.append(row("GFLOPs, without vision encoder", [f"{r.gflops_language:.4f}" for r in records]))
    rows.append(row("GFLOPs, with vision encoder", [f"{r.gflops_total:.4f}" for r in records]))
    if baseline is not None:
        for with_vision, name in ((False, "without"), (True, "with")):
            pairs = [saving(r, baseline, with_vision=with_vision) for r in records]
            rows.append(row(f"saved, {name} vision encoder (%)", [f"{saved:.1f}" for saved, _ in pairs]))
            rows.append(row("  ceiling of that: fusion at no cost (%)", [f"{ceiling:.1f}" for _, ceiling in pairs]))
    for stage in ("vision_encoder", "prefill", "decode", "floor_prefill", "floor_decode"):
        cells = ["{:.2f} ({:.2f}-{:.2f})".format(*r.milliseconds[stage]) for r in records]
        rows.append(row(f"ms {stage.replace('_', ' ')}, median (p10-p90)", cells))
    rows.append(row("peak MiB above weights", [f"{r.mib['peak']:.2f}" for r in records]))
    methods = [r.method for r in records]
    names = methods if len(set(methods)) == len(methods) else [str(r.knobs.get("run", r.method)) for r in records]
    return ["", *names], rows


def _group_order(group: str) -> tuple[int, str]:
    return {"all": 0, "level": 1}.get(group.split("/")[0], 2), group


def _group_name(group: str) -> str:
    return {"all": "held-out accuracy"}.get(group, group.split("/")[-1].replace("_", " "))

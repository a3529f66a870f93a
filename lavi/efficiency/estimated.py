"""Memory and time of a model that no device has seen: *estimated*, from its operators on the meta device.

    inference   tower, prefill and one token more, beside the floor (the same tower and the bare language model)
    training    forward and backward of a batch; gradients, the optimizer's moments, and what ranks share

Memory is that of storages as operators make and drop them, with a fused kernel of attention, without what a kernel
needs inside and what an allocator keeps. Time is a roofline (:mod:`lavi.efficiency.hardware`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from lavi.batch import Batch
from lavi.efficiency.hardware import Device, fits_in
from lavi.efficiency.memory import MIB, prefill_memory, tensor_bytes, weights_of
from lavi.efficiency.operators import Trace, trace
from lavi.efficiency.record import Record
from lavi.efficiency.scenario import PromptShape, Scenario
from lavi.errors import UserError
from lavi.language.token_scores import MOST_LOGITS, score_parts
from lavi.loading.without_weights import without_weights
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe

GIB = 2**30
OPTIMIZER = 2
"""Moments of AdamW, each as large as the parameter."""


# --- inference --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def traces(model: VisionLanguageModel, shape: PromptShape) -> dict[str, Trace]:
    """What each stage does: ``vision_encoder``, ``prefill``, ``decode``; ``floor_prefill``, ``floor_decode``.

    Args:
        model: on the meta device.
    """
    batch, features = shape.inputs(model, "meta")
    pixels = shape.pixels(model, "meta")
    token = torch.ones(shape.batch, 1, dtype=torch.long, device="meta")
    hf = model.language.hf
    out, vision = model.prefill(batch, features)
    floor = hf(input_ids=batch.input_ids, use_cache=True, logits_to_keep=1)
    runs = {
        "prefill": lambda: model.prefill(batch, features),
        "decode": lambda: hf(input_ids=token, past_key_values=out.past_key_values, use_cache=True, vision=vision),
        "floor_prefill": lambda: hf(input_ids=batch.input_ids, use_cache=True, logits_to_keep=1),
        "floor_decode": lambda: hf(input_ids=token, past_key_values=floor.past_key_values, use_cache=True),
    }
    if len(pixels):
        runs["vision_encoder"] = lambda: model.features(pixels, shape.layouts)
    return {stage: trace(run) for stage, run in runs.items()}


def milliseconds(of: Mapping[str, Trace], device: Device) -> dict[str, float]:
    """Each stage on a device; ``first_token`` and ``floor_first_token`` with the tower."""
    times = {stage: 1e3 * device.seconds(one.operators) for stage, one in of.items()}
    tower = times.get("vision_encoder", 0.0)
    return times | {f"{kind}first_token": tower + times[f"{kind}prefill"] for kind in ("", "floor_")}


def note_estimates(record: Record, model: VisionLanguageModel, scenario: Scenario, devices: Sequence[Device]) -> None:
    """Add to a counted record what a model on the meta device would need and take.

    Tower and reducer are cast to the decoder's dtype, in which they compute; what joins the halves stays in fp32.

    Raises:
        UserError: a mixture of experts, whose products have no formula here.
    """
    if any(parameter.ndim == 3 for layer in model.language.layers for parameter in layer.parameters()):
        raise UserError(
            f"time and memory of experts ({type(model.language.hf).__name__}) have no formula here: such a model can "
            "be counted and timed, and not estimated."
        )
    for part in (model.vision, model.reducer):
        if part is not None:
            part.to(model.language.hf.dtype)
    shape = scenario.shape_for(model)
    record.estimated_mib = prefill_memory(model, shape, device=torch.device("meta"))
    of = traces(model, shape)
    record.estimated_milliseconds = {device.name: milliseconds(of, device) for device in devices}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step on one rank, without what ranks share or double."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """The most that stands besides at once, in forward and backward; the gradients of the step before stand until the
    forward pass has ended."""
    gathered: float
    """Weights that FSDP2 has whole at once: two decoder layers, and all that is in none."""

    def mib(self, ranks: int = 1, strategy: str = "") -> float:
        """The peak on each of ``ranks``: alone, by ``ddp`` (buckets of gradients) or by ``fsdp2``.

        FSDP2 keeps a part of weights, gradients and moments on each rank, and gathers a decoder layer at a time, the
        next one ahead, and the rest of the model together; the gradients of what is gathered are whole, too.
        """
        kept = self.weights + self.gradients + self.optimizer
        if strategy == "ddp":
            kept += self.gradients
        elif strategy == "fsdp2":
            kept = kept / ranks + self.gathered * (1 + self.gradients / self.weights)
        return (kept + self.activations) / MIB


def training_memory(model: VisionLanguageModel, batch: Batch, *, trained_tokens: int) -> TrainingMemory:
    """Memory of a step on the parameters that take a gradient; ``model`` and ``batch`` on the meta device.

    Args:
        trained_tokens: of the batch, that have labels.
    """
    chunk = max(1, MOST_LOGITS // model.language.hf.config.vocab_size)
    truth = torch.zeros(trained_tokens, dtype=torch.long, device="meta")

    def step() -> None:
        inputs = model.fusion(batch, model.features_of(batch), model.language)
        with patch("transformers.masking_utils.find_packed_sequence_indices", _no_packing):
            hidden = model.language.hidden(inputs).flatten(0, 1)[:trained_tokens]  # (n, D)
        log_probability, _ = score_parts(model.language.head, hidden, truth, chunk=chunk)
        (-log_probability.sum()).backward()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = tensor_bytes(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # what a step adds to stands before it, and is no activation
    with torch.enable_grad():
        peak = trace(step).peak
    for parameter in trained:
        parameter.grad = None
    layers = [tensor_bytes(layer.parameters()) for layer in model.language.layers]
    weights = weights_of(model)
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=OPTIMIZER * gradients,
        activations=peak,
        gathered=weights - sum(layers) + 2 * max(layers),
    )


def _no_packing(position_ids: Tensor) -> None:
    """In the place of a function of transformers that would look at the positions, which have no values on meta."""


def training_step(recipe: Recipe, scenario: Scenario, *, trained: float = 0.2) -> TrainingMemory:
    """Memory of a training step of a recipe, with its adapters and its trained parts.

    Args:
        scenario: text tokens and image of a row, and how many rows.
        trained: the share of the text tokens that have labels.
    """
    with without_weights(), torch.device("meta"):
        model = recipe.build("model")
        module = recipe.build("module", model=model)
    module.train()
    batch = training_batch(scenario.shape_for(model), model)
    return training_memory(model, batch, trained_tokens=max(1, round(trained * scenario.text * scenario.batch)))


def training_rows(recipe: Recipe, scenario: Scenario) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: memory of a training step, with and without recomputed layers, on one rank and on eight."""
    columns = ["layers recomputed", "weights", "gradients", "moments", "activations"]
    columns += [f"{name}{end}" for name in ("one rank", "8 by DDP", "8 by FSDP2") for end in ("", ", fits in")]
    rows = []
    for recomputed in (False, True):
        step = training_step(recipe.replaced("module.checkpointing", recomputed), scenario)
        parts = (step.weights, step.gradients, step.optimizer, step.activations)
        row = ["yes" if recomputed else "no", *(f"{part / GIB:.2f}" for part in parts)]
        for whole in (step.mib(), step.mib(8, "ddp"), step.mib(8, "fsdp2")):
            row += [f"{whole / 1024:.2f}", fits_in(whole)]
        rows.append(row)
    return columns, rows


def training_batch(shape: PromptShape, model: VisionLanguageModel) -> Batch:
    """A batch of ones with the pixels of its images, on the meta device."""
    batch, _ = shape.inputs(model, "meta")
    batch.pixels = shape.pixels(model, "meta")
    return batch

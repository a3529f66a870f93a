"""Memory by class, in MiB, of tower and prefill.

weights           of the whole model
visual_features   what the tower gives
visual_cache      what the fusion keeps of the images for the tokens to come
kv_cache          of the language model, behind the prompt
logits            of the tokens that get any
peak              the most memory above the weights: all of these, and every activation
allocated, reserved (on a GPU)   the allocator's own peaks, weights included, less other models' weights
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lavi.efficiency.operators import trace
from lavi.efficiency.scenario import PromptShape
from lavi.language.subsequence import LayeredCache
from lavi.model import VisionLanguageModel

MIB = 2**20


def prefill_memory(
    model: VisionLanguageModel, shape: PromptShape, *, device: torch.device, others: float = 0.0
) -> dict[str, float]:
    """Memory by class; the peak is the allocator's on a GPU, and summed from torch's profiler on the CPU.

    On meta it is estimated: that of the storages which operators make (:mod:`lavi.efficiency.operators`).

    Args:
        others: bytes of other models on the device.
    """
    batch, features = shape.inputs(model, device)
    pixels = shape.pixels(model, device)

    def run() -> tuple[object, ...]:
        encoded = model.features(pixels, shape.layouts) if len(pixels) else None
        return encoded, *model.prefill(batch, features)

    with torch.no_grad():
        _, out, vision = run()
        keys_values, beside = _cached(out.past_key_values)  # type: ignore[attr-defined]
        tensors_of = {
            "visual_features": [features],
            "visual_cache": [*vision.cached_tensors(), *beside],  # type: ignore[attr-defined]
            "kv_cache": keys_values,
            "logits": [out.logits],  # type: ignore[attr-defined]
        }
        sizes = {"weights": weights_of(model)} | {name: tensor_bytes(tensors) for name, tensors in tensors_of.items()}
        del out, vision, tensors_of, keys_values, beside
        sizes |= _peak_cuda(run, device, others) if device.type == "cuda" else {"peak": peak_of(run, device)}
    return {name: size / MIB for name, size in sizes.items()}


def weights_of(model: VisionLanguageModel) -> float:
    """Bytes of the weights of a model."""
    return tensor_bytes(model.parameters())


def _cached(cache: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Keys, values and recurrent states of the language model's own layers, and what a fusion caches besides."""
    if isinstance(cache, LayeredCache):
        return cache.keys_values(), cache.cached_tensors()
    held = (tree_leaves(dict(vars(layer))) for layer in cache.layers)  # recurrent layers have mappings of states
    return [one for layer in held for one in layer if isinstance(one, Tensor) and one.is_floating_point()], []


def tensor_bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def peak_of(run: Callable[[], object], device: torch.device) -> float:
    """Bytes that stand at once while ``run`` runs, above what stood before."""
    if device.type == "meta":
        return trace(run).peak
    return _peak_cuda(run, device, 0.0)["peak"] if device.type == "cuda" else _peak_cpu(run)


def _peak_cuda(run: Callable[[], object], device: torch.device, others: float) -> dict[str, float]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak": float(allocated - before), "allocated": allocated - others, "reserved": reserved - others}


def _peak_cpu(run: Callable[[], object]) -> float:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library reports that there is no GPU, as an error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0.0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

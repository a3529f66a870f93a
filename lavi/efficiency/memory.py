"""Memory by class, in MiB, of one prefill: weights, cache, and the peak of everything else."""

from __future__ import annotations

import os

import torch

from lavi.efficiency.flops import probe_inputs
from lavi.model import VisionLanguageModel

MIB = 2**20


def prefill_memory(
    model: VisionLanguageModel, *, text: int, visual: int, views: int, device: torch.device
) -> dict[str, float]:
    """``weights``, ``kv_cache`` after the prompt, and ``peak``: the most that tower and prefill held above the weights.

    On a GPU the peak is the allocator's; on the CPU it is summed from the allocations that torch's profiler records.
    """
    batch, features = probe_inputs(model, text=text, visual=visual, device=device)
    pixels = torch.zeros(views, *model.vision.pixel_shape, device=device)

    def run() -> object:
        if views:
            model.vision(pixels)
        return model.prefill(batch, features)[0].past_key_values

    with torch.no_grad():
        cache = run()
        peak = _peak_cuda(run, device) if device.type == "cuda" else _peak_cpu(run)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[attr-defined]
    return {"weights": weights / MIB, "kv_cache": held / MIB, "peak": peak / MIB}


def _peak_cuda(run: object, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()  # type: ignore[operator]
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def _peak_cpu(run: object) -> float:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its library reports that there is no GPU, as an error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()  # type: ignore[operator]
    held = peak = 0.0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

"""Decoder layers compiled one by one, for the steps of training alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

BACKEND = "inductor"
GRAPHS = 4
"""Of each layer, at most: of one shape, of any shape, with and without what a batch may lack."""
SKIP_SIDE_EFFECTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"
"""Torch's setting that lets a recomputed layer be compiled though its norms are given their deltas on the way."""


class CompiledLayers:
    """Layers whose compiled form is in use between :meth:`start` and :meth:`stop`.

    Answers during validation read caches that grow token by token, for which they would be compiled anew.

    Args:
        recomputed: in the backward pass, their activations are not kept.
    """

    def __init__(self, layers: Iterable[nn.Module], *, recomputed: bool = False) -> None:
        self.layers = list(layers)
        limit = torch._dynamo.config.recompile_limit
        # Graphs of one layer count against the next: all run the same code.
        torch._dynamo.config.recompile_limit = max(limit, GRAPHS * len(self.layers))
        if recomputed and hasattr(torch._dynamo.config, SKIP_SIDE_EFFECTS):
            # Deltas are bound to a norm for the time of one call: the backward pass need not bind them again.
            setattr(torch._dynamo.config, SKIP_SIDE_EFFECTS, True)
        for layer in self.layers:
            layer.compile(backend=BACKEND)
        self.calls = [layer._compiled_call_impl for layer in self.layers]
        self.stop()

    def start(self) -> None:
        for layer, call in zip(self.layers, self.calls, strict=True):
            layer._compiled_call_impl = call

    def stop(self) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = None

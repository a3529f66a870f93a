"""Training with compiled layers learns what training without does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate, small
from torch._dynamo.utils import counters

import lavi.training.compiled_layers as compiled_layers
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.shortv import ShortV
from lavi.training.compiled_layers import CompiledLayers
from lavi.training.module import VisionLanguageModule, checkpoint_layers

BATCHES = [
    [ask(1, "what colour is the circle?", answer="red"), ask("no image at all", answer="yes")],
    [ask("hello", 2, "which image has the red circle?", 3, answer="the second")],
    [ask("no image at all, and longer", answer="yes and no")],
]


@pytest.fixture(autouse=True)
def _traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they were traced."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def gradients(model: Any) -> list[list[torch.Tensor]]:
    """Of each batch, the loss and the gradients of all parameters."""
    found = []
    for samples in BATCHES:
        model.zero_grad(set_to_none=False)
        loss = model.token_scores(collate(model, samples)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return found


# And how many layers, each of which takes seconds to compile: one with deltas beside a plain one, and of the others one
# with all that they add.
FUSIONS = {
    "lavi": (lambda: LaViFusion(every=2, generator=small()), 2),
    "lavi-mlp": (lambda: LaViFusion(every=1, generator=small("mlp")), 1),
    "cross-attention": (lambda: CrossAttentionFusion(every=1), 1),
    "concat": (ConcatFusion, 1),
    "reading-late": (lambda: ShortV(layers=[1]), 2),
}
CASES = [("qwen2", "lavi", True), ("qwen2", "cross-attention", False), ("qwen2", "concat", True)]
DEARER = [("gemma2", "lavi-mlp", False), ("qwen2", "reading-late", False), ("qwen2", "reading-late", True)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in DEARER]  # type: ignore[misc]


@pytest.mark.parametrize(("family", "fusion", "checkpointing"), CASES)
def test_losses_and_gradients_are_the_same(build: Any, family: str, fusion: str, checkpointing: bool) -> None:
    make, count = FUSIONS[fusion]
    model = build(make(), family=family, num_hidden_layers=count)
    awaken(model.fusion)
    if checkpointing:
        checkpoint_layers(model.language.hf)
        for layer in model.language.layers:
            layer.training = True
    expected = gradients(model)
    layers = CompiledLayers(model.language.layers, recomputed=checkpointing)
    assert not counters["stats"]["unique_graphs"]
    for before, plain in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(before, plain)
    assert not counters["stats"]["unique_graphs"], "compiled before it was started"
    layers.start()
    for ours, plain in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"]
    assert fusion == "reading-late" or not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    gradients(model)  # a size that was met once may be compiled once more, for all sizes
    assert counters["stats"]["unique_graphs"] <= graphs + len(model.language.layers)
    graphs = counters["stats"]["unique_graphs"]
    gradients(model)
    assert counters["stats"]["unique_graphs"] == graphs, "batches of the same shapes are compiled anew"
    layers.stop()


def test_a_run_compiles_its_steps_and_nothing_else(
    tiny_recipe: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    scores = VisionLanguageModule.validation_step

    def looking(self: VisionLanguageModule, *args: Any) -> Any:
        seen.append(any(layer._compiled_call_impl is not None for layer in self.model.language.layers))
        return scores(self, *args)

    monkeypatch.setattr(VisionLanguageModule, "validation_step", looking)
    changes = ("module.compile=true", "trainer.max_steps=2", "model.language.config.num_hidden_layers=2")
    status, _, err = run("lavi.fit", "--recipe", tiny_recipe, *changes)
    assert status == 0, err
    assert seen
    assert not any(seen)
    assert counters["stats"]["unique_graphs"]


def test_a_step_that_failed_leaves_no_compiled_layers_to_answers(build: Any) -> None:
    model = build(ConcatFusion())
    module = VisionLanguageModule(model, learning_rate={"fusion": 1e-3}, compile=True)
    assert module.compiled is not None
    module.compiled.start()
    assert all(layer._compiled_call_impl is not None for layer in model.language.layers)
    module.eval()
    assert all(layer._compiled_call_impl is None for layer in model.language.layers)

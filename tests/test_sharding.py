"""Sharding in one process: what it refuses, and that generating goes through the shards' hooks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate
from torch import Tensor, distributed
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import lavi.training.compiled_layers as compiled_layers
from lavi.data.tiling import AnyRes
from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.language.compiled import DecodeCompiler
from lavi.training.compiled_layers import CompiledLayers
from lavi.training.module import VisionLanguageModule
from lavi.training.sharding import shard
from lavi.training.tile_dropout import TileDropout


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
    gc.collect()  # its threads end now, and not in a process that is forked later


@pytest.mark.parametrize("method", ["generate", "prefill", "with_backbone_features"])
def test_a_sharded_model_answers_as_before(build, mesh: Any, method: str) -> None:  # type: ignore[no-untyped-def]
    """By each method besides forward, called first: after another call the root's weights are whole in any case."""
    model = build(LaViFusion(every=2)).eval()
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour?")], pad_left=True, prompt=True)
    with torch.no_grad():
        features = model.features(batch.pixels)

        def answer() -> Tensor:
            if method == "with_backbone_features":
                return model.with_backbone_features(batch).backbone_features
            if method == "generate":
                return torch.tensor(model.generate(batch, max_new_tokens=4))
            return model.prefill(batch, features)[0].logits

        before = answer()
        shard(model, mesh)
        shard(model, mesh)  # a second time changes nothing
        assert DecodeCompiler().serves(model.language.hf) is False
        torch.testing.assert_close(answer(), before)


def test_tiles_are_dropped_alike_where_weights_are_sharded(build: Any, mesh: Any) -> None:
    """Two calls in one step, the tower trained along: losses and gradients of two steps."""
    found = []
    for sharded in (False, True):
        model = build(LaViFusion(every=2))
        awaken(model.fusion)
        model.tiling = AnyRes(max_grid=2)
        if sharded:
            shard(model, mesh)
        batch = collate(model, [ask(1, "what colour?", answer="red"), ask("hello", answer="yes")])
        assert [layout.tile_count for layout in batch.layouts] == [4]
        drop = TileDropout(1.0, model)
        for step in range(2):
            torch.manual_seed(step)
            model.zero_grad()
            loss = model.token_scores(drop(model.with_backbone_features(batch))).loss
            loss.backward()
            whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append({name: getattr(g, "full_tensor", g.clone)() for name, g in whole.items()} | {"loss": loss})
    assert any("vision" in name for name in found[0])
    for plain, ours in zip(found[:2], found[2:], strict=True):
        assert ours.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_tokens_of_an_accumulated_step_weigh_the_same_where_weights_are_sharded(build: Any, mesh: Any) -> None:
    """Behind a forward pass the root's weights are whole, and the gradients of before are those of its shards."""
    found = []
    texts = (["red"], ["blue and green", "no"], ["yes", "a", "b"])
    for sharded in (False, True):
        module = VisionLanguageModule(model=build(LaViFusion(every=2)), learning_rate={"fusion": 1e-3})
        awaken(module.model.fusion)
        if sharded:
            shard(module.model, mesh)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        module.trainer = SimpleNamespace(accumulate_grad_batches=len(texts), optimizers=[optimizer])  # type: ignore[assignment]
        for answers in texts:
            batch = collate(module.model, [ask(1, "what colour?", answer=answer) for answer in answers])
            scores = module.model.token_scores(batch)
            loss = scores.loss / scores.tokens
            weight, mean = module._weigh(scores.tokens, loss.detach())
            (loss * weight / len(texts)).backward()
        whole = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
        found.append({name: getattr(g, "full_tensor", g.clone)() for name, g in whole.items()} | {"loss": mean})
    plain, ours = found
    assert any("fusion" in name for name in plain)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_layers_learn_the_same_when_they_are_sharded(
    build: Any, mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")
    graphs = counters["stats"]["unique_graphs"]
    found = []
    for compiled in (False, True):
        model = build(LaViFusion(every=2))
        awaken(model.fusion)
        layers = CompiledLayers(model.language.layers) if compiled else None
        shard(model, mesh)
        if layers is not None:
            layers.start()
        loss = model.token_scores(collate(model, [ask(1, "what colour?", answer="red")])).loss
        loss.backward()
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    assert counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    (plain, expected), (ours, got) = found
    torch.testing.assert_close(ours, plain)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_of_two_dtypes_are_not_sharded_together(build, mesh: Any) -> None:  # type: ignore[no-untyped-def]
    model = build(LaViFusion(every=2))
    model.language.hf.get_input_embeddings().to(torch.bfloat16)
    with pytest.raises(UserError, match=r"of that torch\.bfloat16 and torch\.float32 train"):
        shard(model, mesh)

"""What all fusions promise: counters that are plain data, plans for their contexts, parts that can be swapped."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate, summed_loss
from torch import Tensor, nn

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.fusion.arrangement import ColumnContext
from lavi.fusion.base import Cost, Fusion
from lavi.fusion.casa import CASA
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.late_injection import LateInjection
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.pruning import FastV, PruningFusion, PyramidDrop
from lavi.fusion.shortv import ShortV
from lavi.fusion.tile_arrangement import TileArrangement
from lavi.fusion.vica import ViCA
from lavi.language.surgery import dummy_forward
from lavi.model import VisionLanguageModel
from lavi.nn.delta_generators import MLPDeltas
from lavi.nn.formulas import linear_flops
from lavi.nn.projectors import MLPProjector, Projector
from lavi.nn.visibility import Visibility
from lavi.recipe import Recipe
from lavi.vision.base import FeatureSpec
from lavi.visor.fusion import VisorFusion
from lavi.visor.readers import Reader


class LinearProjector(Projector):
    """LLaVA's first: one matrix."""

    def bind(self, vision_width: int, width: int) -> None:
        self.matrix = nn.Linear(vision_width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.matrix(features)

    def flops(self, tokens: int) -> float:
        return linear_flops(tokens, self.matrix.in_features, self.matrix.out_features)


class MeanReader(Reader):
    """Reads the mean of the visual tokens that a token may see, through a gate."""

    def make(self, config: Any, width: int, norms: Any) -> None:
        self.gate = nn.Parameter(torch.zeros(width))

    def keep(self, visual: Tensor) -> tuple[Tensor, ...]:
        return (visual,)

    def read(self, text: Tensor, kept: tuple[Tensor, ...], seen: Visibility) -> Any:
        share = seen.mask.float() / seen.mask.sum(-1, keepdim=True).clamp(min=1)
        return text + self.gate * (share @ kept[0]), nullcontext()

    def costs(self, text: int, visual: int, *, past: int) -> dict[str, Cost]:
        return {"mean": Cost(2.0 * text * visual * len(self.gate))}


def test_a_reader_of_ones_own_is_named_by_a_recipe_and_learns(tiny_recipe: Path) -> None:
    settings = Recipe.load(tiny_recipe).settings
    settings["model"]["fusion"] = {
        "_target_": "lavi.visor.fusion.VisorFusion",
        "cross_attention": 2,
        "self_attention": 1,
        "reader": {"_target_": "test_fusion_contract.MeanReader"},
    }
    model: VisionLanguageModel = Recipe(settings, source="here").build("model").train()
    batch = collate(model, [ask(1, "what?", answer="red"), ask("hello", 2, "what?", answer="blue"), ask("hi")])
    optimizer = torch.optim.SGD(model.fusion.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss, _ = summed_loss(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert all(parameter.grad is not None for parameter in model.fusion.parameters())
    assert model.fusion.costs(10, Layout(), 16)["mean"].flops == 2 * 2 * 10 * 16 * 32


def test_an_argument_of_a_generator_is_not_one_of_the_fusion(tiny_recipe: Path) -> None:
    """As run folders of before name it."""
    fusion = {"_target_": "lavi.fusion.lavi.LaViFusion", "bottleneck": 16}
    settings = Recipe.load(tiny_recipe).settings
    settings["model"]["fusion"] = fusion
    with pytest.raises(UserError, match=r"'model.fusion.bottleneck' is unknown"):
        Recipe(settings, source="here").check()
    settings["model"]["fusion"] = {"_target_": "lavi.fusion.lavi.LaViFusion", "generator": "mlp"}
    with pytest.raises(UserError, match=r"'model.fusion.generator' must be DeltaGenerator"):
        Recipe(settings, source="here").check()


FUSIONS: dict[str, Any] = {
    "concat": ConcatFusion,
    "lavi": LaViFusion,
    "cross-attention": CrossAttentionFusion,
    "casa": CASA,
    "pruning": lambda: PruningFusion(stages={0: 0.5}),
    "fastv": lambda: FastV(layer=1),
    "pyramid-drop": PyramidDrop,
    "late-injection": lambda: LateInjection(first=1),
    "shortv": lambda: ShortV(layers=[0, 2]),
    "vica": lambda: ViCA(layers=[0, 2]),
    "deepstack": lambda: DeepStackFusion(levels=3),
    "visor": lambda: VisorFusion(cross_attention=1, self_attention=1),
    "visor-beside": lambda: VisorFusion(cross_attention=1, self_attention=0),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_a_token_counter_is_plain_data_and_counts_what_the_sequence_gets(build, name: str) -> None:  # type: ignore[no-untyped-def]
    """It goes to processes that read data, without the fusion's parameters."""
    model = build(FUSIONS[name]())
    counter = pickle.loads(pickle.dumps(model.fusion.token_counter))
    assert len(pickle.dumps(counter)) < 1000
    for prompt in (ask(1, 2, "what?"), ask("what?", 3), ask("hello")):
        batch = collate(model, [prompt], prompt=True)
        with torch.no_grad():
            inputs = model.fusion(batch, model.features(batch.pixels), model.language)
        longer = inputs.attention_mask.shape[1] - batch.input_ids.shape[1]
        assert longer == sum(counter(slot.layout, 16) for slot in batch.image_slots)
        assert longer == sum(model.fusion.tokens_in_language(slot.layout, 16) for slot in batch.image_slots)


WITH_PROJECTOR: dict[str, Any] = FUSIONS | {
    "visor": lambda **own: VisorFusion(cross_attention=1, self_attention=1, **own)
}
WITH_PROJECTOR |= {
    "pruning": lambda **own: PruningFusion(stages={0: 0.5}, **own),
    "fastv": lambda **own: FastV(layer=1, **own),
    "late-injection": lambda **own: LateInjection(first=1, **own),
    "shortv": lambda **own: ShortV(layers=[0], **own),
    "vica": lambda **own: ViCA(layers=[0], **own),
    "deepstack": lambda **own: DeepStackFusion(levels=3, **own),
}


CONCATENATE = ["concat", "pruning", "fastv", "pyramid-drop", "deepstack", "late-injection", "shortv", "vica", "visor"]


@pytest.mark.parametrize("name", CONCATENATE)
def test_whatever_concatenates_takes_the_arguments_of_concatenation(build, name: str) -> None:  # type: ignore[no-untyped-def]
    fusion = build(WITH_PROJECTOR[name](projector=LinearProjector(), newline=True, budget=3)).fusion
    assert isinstance(fusion.projector, LinearProjector)
    assert fusion.newline.shape == (32,)
    assert fusion.tile_arrangement == TileArrangement((4, 4), budget=3, newline=True)
    plain = build(WITH_PROJECTOR[name]()).fusion
    assert isinstance(plain.projector, MLPProjector)
    assert plain.newline is None
    assert plain.tile_arrangement == TileArrangement((4, 4), budget=9, newline=False)


def test_a_projector_is_two_layers_and_a_gelu() -> None:
    projector = MLPProjector()
    assert list(projector.parameters()) == []
    projector.bind(6, 8)
    first, _, second = projector.layers
    features = torch.randn(2, 3, 6)
    expected = second(nn.functional.gelu(first(features)))
    torch.testing.assert_close(projector(features), expected)
    assert expected.shape == (2, 3, 8)
    assert projector.flops(5) == 2 * 5 * (6 * 8 + 8 * 8)


def test_each_layer_has_a_generator_of_its_own(build) -> None:  # type: ignore[no-untyped-def]
    """Bound copies of the one that is named, which has no parameters itself and keeps its own arguments."""
    own = MLPDeltas(bottleneck=8, depth=2)
    fusion = build(LaViFusion(every=2, generator=own, parameters="scale")).fusion
    assert list(own.parameters()) == []
    first, second = fusion.generators.values()
    assert first is not second
    for generator in (first, second):
        assert (type(generator), generator.bottleneck, generator.depth) == (MLPDeltas, 8, 2)
        assert (generator.width, generator.vision_width, generator.outputs) == (32, 24, 2)
    assert not {id(parameter) for parameter in first.parameters()} & {
        id(parameter) for parameter in second.parameters()
    }
    assert not torch.equal(first.down.weight, second.down.weight)


def test_lavi_modulates_named_layers_or_a_share_of_them(build) -> None:  # type: ignore[no-untyped-def]
    assert list(build(LaViFusion(layers=[2, 0])).fusion.generators) == ["0", "2"]
    assert list(build(LaViFusion(fraction=0.5)).fusion.generators) == ["1", "3"]
    assert list(build(LaViFusion(fraction=0.5, where="first")).fusion.generators) == ["0", "1"]
    with pytest.raises(UserError, match="either 'layers' or 'fraction', not both"):
        LaViFusion(layers=[0], fraction=0.5)


def test_features_on_no_grid_lie_in_one_row(build) -> None:  # type: ignore[no-untyped-def]
    model = build(ConcatFusion())
    for tokens, grid in ((5, (1, 5)), (0, (1, 1))):
        fusion = LaViFusion()
        fusion.bind(model.language, FeatureSpec(24, tokens, None))
        assert fusion.grid == grid


@pytest.mark.parametrize(("parameters", "each"), [("both", 6), ("scale", 5), ("shift", 1)])
def test_modulation_costs_what_is_modulated(build, parameters: Any, each: int) -> None:  # type: ignore[no-untyped-def]
    """Two norms of each of two layers, 10 tokens of width 32."""
    cost = build(LaViFusion(every=2, parameters=parameters)).fusion.costs(10, Layout(), 16)["modulation"]
    assert cost.flops == cost.uncounted == each * 4 * 10 * 32


@pytest.mark.parametrize("name", ["lavi", "concat", "cross-attention", "deepstack", "visor"])
def test_the_same_seed_draws_the_same_start(build, name: str) -> None:  # type: ignore[no-untyped-def]
    one, other = (build(FUSIONS[name](), seed=3).fusion.state_dict() for _ in range(2))
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_context_has_what_its_layers_need(build) -> None:  # type: ignore[no-untyped-def]
    """A small plan, never the fusion; what it cannot do without is required."""
    for make in FUSIONS.values():
        model = build(make())
        awaken(model.fusion)
        batch = collate(model, [ask(1, "what?")], prompt=True)
        context = model.fusion(batch, model.features(batch.pixels), model.language).vision
        assert not any(isinstance(value, Fusion) for value in vars(context).values())
    with pytest.raises(TypeError, match="missing 2 required keyword-only arguments: 'visual' and 'column'"):
        ColumnContext()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["lavi", "cross-attention", "casa"])
def test_layers_that_another_fusion_opened_on_the_same_model_are_left_alone(build, name: str) -> None:  # type: ignore[no-untyped-def]
    one = build(FUSIONS[name]())
    awaken(one.fusion)
    batch = collate(one, [ask(1, "what colour is the circle?", answer="red")])
    with torch.no_grad():
        before = one(batch)
        VisionLanguageModel(vision=one.vision, language=one.language, fusion=FastV(keep=0.5, layer=1))
        assert torch.equal(one(batch), before)


def test_a_model_is_looked_into_with_a_kernel_that_runs_anywhere(build) -> None:  # type: ignore[no-untyped-def]
    """Flash attention runs on a GPU alone, and models are built on the CPU."""
    hf = build(ConcatFusion()).language.hf
    hf.config._attn_implementation = "flash_attention_2"
    dummy_forward(hf)
    assert hf.config._attn_implementation == "flash_attention_2"

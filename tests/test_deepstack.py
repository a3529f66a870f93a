"""Features of several tower layers: DeepStack adds them behind decoder layers, LaVi gives each layer its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, QWEN2, TOWER, ask, awaken, collate, image, small, summed_loss
from families import EAGER
from test_efficiency import difference
from torch import Tensor

from lavi.batch import Batch, Layout, Sample, Video
from lavi.data.tiling import AnyRes
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.deepstack import DeepStackContext, DeepStackFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.tile_markers import TileMarkers
from lavi.language.context import VisualContext
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.vision.base import FeatureSpec
from lavi.vision.hf import HFVision

LEVELS = [1, 2, 3]
"""The layers of the tower that are seen, each 24 wide."""
SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
]
LONG = QWEN2 | {"max_position_embeddings": 1024}

Make = Callable[..., VisionLanguageModel]


@pytest.fixture
def make(tokenizer: str) -> Make:
    """The same tower and language model whatever the fusion is, and whichever layers of the tower it sees."""

    def build(
        fusion: Fusion,
        layer: int | list[int],
        *,
        config: dict[str, Any] = LONG,
        dtype: Any = "float32",
        device: str = "cpu",
        **parts: Any,
    ) -> VisionLanguageModel:
        torch.manual_seed(0)
        with torch.device(device):
            vision = HFVision(config=TOWER | {"num_hidden_layers": 3}, layer=layer)
            attention: Any = "eager" if config["model_type"] in EAGER else "sdpa"
            language = LanguageModel(config=config, tokenizer=tokenizer, dtype=dtype, attention=attention)
            return VisionLanguageModel(vision=vision, language=language, fusion=fusion, **parts).eval()

    return build


def pair(make: Make, *, wake: bool, layers: list[int] | None = None, **parts: Any) -> list[VisionLanguageModel]:
    """DeepStack of three levels, and concatenation of the last, with one projector; mergers awake or at zero."""
    deep = make(DeepStackFusion(levels=3, layers=layers, newline=True), LEVELS, **parts)
    concat = make(ConcatFusion(newline=True), LEVELS[-1], **parts)
    awaken(concat.fusion)
    if wake:
        awaken(deep.fusion)
    missing, unexpected = deep.fusion.load_state_dict(concat.fusion.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("mergers.") for name in missing)
    return [deep, concat]


# --- DeepStack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2", "float32"), ("qwen2", "bfloat16"), ("gpt2", "float32"), ("gemma2", "float32")]
)
def test_before_training_it_is_concatenation_bit_for_bit(make: Make, family: str, dtype: str) -> None:
    deep, concat = pair(make, wake=False, config=FAMILIES[family], dtype=dtype)
    for pad_left in (False, True):
        batch = collate(deep, SAMPLES, pad_left=pad_left)
        with torch.no_grad():
            assert torch.equal(deep(batch), concat(batch))


def test_before_training_its_answers_are_those_of_concatenation(make: Make) -> None:
    deep, concat = pair(make, wake=False, config=LONG | {"initializer_range": 0.3, "tie_word_embeddings": False})
    batch = collate(deep, [ask(1, "what colour?"), ask("hello", 2, "which?", 3)], prompt=True, pad_left=True)
    decoding = {"max_new_tokens": 6, "eos_token_id": None}
    answers = concat.generate(batch, **decoding)
    assert deep.generate(batch, **decoding) == answers
    awaken(deep.fusion)
    assert deep.generate(batch, **decoding) != answers


def first_columns(batch: Batch, tokens: int) -> list[tuple[int, int]]:
    """The row of each image of a batch, and the column at which its ``tokens`` tokens begin, counted by hand."""
    rows: list[list[int]] = [[] for _ in range(len(batch))]
    for slot in batch.image_slots:
        rows[slot.row].append(slot.column)
    lengths = [stop - start + tokens * len(own) for (start, stop), own in zip(batch.spans, rows, strict=True)]
    pads_left = all(stop == batch.input_ids.shape[1] for _, stop in batch.spans)
    columns = []
    for slot in batch.image_slots:
        padding = max(lengths) - lengths[slot.row] if pads_left else 0
        before = sum(other < slot.column for other in rows[slot.row])
        columns.append((slot.row, padding + slot.column - batch.spans[slot.row][0] + tokens * before))
    return columns


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("layers", [None, [3, 1]])
def test_it_is_what_hooks_on_the_layers_would_add(make: Make, layers: list[int] | None, pad_left: bool) -> None:
    """To concatenation, at the 16 tokens of each image and not at the newline behind them."""
    deep, concat = pair(make, wake=True, layers=layers)
    batch = collate(deep, SAMPLES, pad_left=pad_left)
    levels = deep.features(batch.pixels).detach().split(24, dim=-1)

    def adding(number: int) -> Callable[..., Tensor]:
        added = deep.fusion.mergers[number](levels[number])  # (views, 16, D)

        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            for (row, column), of_image in zip(first_columns(batch, 17), added, strict=True):
                out[row, column : column + 16] += of_image
            return out

        return hook

    with torch.no_grad():
        bare = concat(batch)
        for number, layer in enumerate(layers or [0, 1]):
            concat.language.layers[layer].register_forward_hook(adding(number))
        said, expected = deep(batch), concat(batch)
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)
    for row in (0, 1):
        assert not torch.allclose(said[row], bare[row], atol=1e-3)
    assert torch.equal(said[2], bare[2])


def shown(*sizes: tuple[int, int]) -> Sample:
    sample = ask(*range(len(sizes)), "what is it?", answer="red")
    return Sample("shown", sample.messages, [image(size[0]).resize(size) for size in sizes])


def film(frames: int) -> Sample:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what moves?"}]}]
    return Sample("film", messages, [Video([image(seed) for seed in range(frames)])])


MARKERS = TileMarkers(around="red", whole="blue", tile="circle", row_end="green", before_whole="square")
ARRANGED: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, None),
    "newline": ({"newline": True}, None),
    "tiles": ({"newline": True, "budget": None}, AnyRes(max_grid=2)),
    "shrunk": ({"newline": True, "budget": 1}, AnyRes(max_grid=3)),
    "markers": ({"markers": MARKERS}, AnyRes(max_grid=2)),
}


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("name", ARRANGED)
def test_what_is_added_is_arranged_as_the_visual_tokens(make: Make, name: str, pad_left: bool) -> None:
    """A merger that is the projector, on the same features: the tokens themselves, and zeros where none is."""
    arguments, tiling = ARRANGED[name]
    model = make(DeepStackFusion(levels=2, **arguments), [2, 3], tiling=tiling)
    fusion, between = model.fusion, torch.zeros(0, 32)
    fusion.mergers[0].load_state_dict(fusion.projector.state_dict())
    if fusion.newline is not None:
        between = fusion.newline.detach()[None]
    elif ids := fusion.tile_arrangement.marker_ids:
        between = model.language.embed(torch.tensor(ids)).detach()
    samples = [shown((40, 30), (64, 64)), ask("hello", answer="hi"), shown((20, 90))]
    samples += [film(3)] if name != "markers" else []  # which stand around no frames
    batch = collate(model, samples, pad_left=pad_left)
    last = model.features_of(batch)[..., 24:]
    with torch.no_grad():
        inputs = fusion(batch, last.repeat(1, 1, 2), model.language)
    embeds, context = inputs.inputs_embeds, inputs.vision
    visual = inputs.attention_mask.clone()
    visual[
        torch.arange(len(batch))[:, None].expand_as(batch.input_ids)[batch.attention_mask],
        context.text_columns[batch.attention_mask],
    ] = False
    inserted = (embeds[:, :, None] == between).all(-1).any(-1) & visual
    assert inserted.any() == bool(len(between))
    expected = embeds * (visual & ~inserted)[..., None]
    assert expected.any(-1).sum() > 3 * 16
    added = context.added[0][context.index]
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-5)
    assert not added[inserted].any()


def test_a_batch_answers_as_its_rows_alone(make: Make) -> None:
    model = make(DeepStackFusion(levels=3, newline=True), LEVELS, tiling=AnyRes(max_grid=2))
    awaken(model.fusion)
    samples = [shown((40, 30), (64, 64)), ask("hello", answer="hi"), shown((20, 90))]
    for pad_left in (False, True):
        batch = collate(model, samples, pad_left=pad_left)
        with torch.no_grad():
            together = model(batch)
            for row, sample in enumerate(samples):
                start, stop = batch.spans[row]
                alone = model(collate(model, [sample]))[0]
                torch.testing.assert_close(together[row, start:stop], alone, atol=5e-5, rtol=1e-3)


def arranged_prompt(make: Make) -> tuple[VisionLanguageModel, Any]:
    model = make(DeepStackFusion(levels=3), LEVELS)
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what?"), ask("hello", 2, "what?")], prompt=True, pad_left=True)
    with torch.no_grad():
        inputs = model.fusion(batch, model.features(batch.pixels), model.language)
    inputs.vision = inputs.vision.for_generation(copies=1)
    return model, inputs


@torch.no_grad()
@pytest.mark.parametrize("parts", [2, 5])
def test_a_prompt_read_in_parts_is_the_prompt_and_no_later_token_gets_anything(make: Make, parts: int) -> None:
    """Whatever a call reads of it: parts, tokens behind it in the same call, and tokens behind it in the cache."""
    model, inputs = arranged_prompt(make)
    hf, context, mask = model.language.hf, inputs.vision, inputs.attention_mask
    behind = model.language.embed(torch.tensor([[5, 6], [7, 8]]))  # (B, 2, D)
    embeds = torch.cat([inputs.inputs_embeds, behind], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, 2)], dim=1)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    whole = hf(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, vision=context).logits
    cache, said, at = None, [], 0
    length = inputs.inputs_embeds.shape[1]
    for count in [*[length // parts] * (parts - 1), length - (parts - 1) * (length // parts), 1, 1]:
        stop = at + count
        if at == length:
            context = context.behind_prompt()
        out = hf(
            inputs_embeds=embeds[:, at:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, at:stop],
            past_key_values=cache,
            use_cache=True,
            vision=context,
        )
        cache, at = out.past_key_values, stop
        said.append(out.logits)
    torch.testing.assert_close(torch.cat(said, dim=1)[mask], whole[mask], atol=1e-5, rtol=1e-4)


def test_behind_the_prompt_nothing_is_carried_or_added(make: Make) -> None:
    _, inputs = arranged_prompt(make)
    context, length = inputs.vision, inputs.inputs_embeds.shape[1]
    later = context.behind_prompt()
    hidden = torch.randn(2, 1, 32)
    assert later.prompt_is_read
    assert not later.added
    for one in (later, context.for_step(length, 1)):
        assert torch.equal(one.run_layer(0, lambda hidden, **kwargs: hidden, hidden), hidden)
    beams = context.for_generation(3)
    assert torch.equal(beams.index, context.index[[0, 0, 0, 1, 1, 1]])
    assert beams.added is context.added


def test_mergers_learn_from_the_first_step_on(make: Make) -> None:
    model = make(DeepStackFusion(levels=3), LEVELS).train()
    batch = collate(model, SAMPLES)
    parts = {name: p for name, p in model.fusion.named_parameters() if name.startswith("mergers.")}
    assert len(parts) == 2 * 4
    summed_loss(model(batch), batch.labels)[0].backward()
    for name, parameter in parts.items():
        assert parameter.grad is not None
        assert parameter.grad.any() == (".layers.2." in name), name  # the last layer, which starts at zero
    awaken(model.fusion)
    summed_loss(model(batch), batch.labels)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in parts.values())


@pytest.mark.parametrize(
    "scenario", [Scenario(text=50, visual_tokens=32), Scenario(text=20, frames=3, batch=2)], ids=str
)
def test_both_counters_count_the_mergers(make: Make, scenario: Scenario) -> None:
    model = make(DeepStackFusion(levels=3, newline=True), LEVELS, device="meta")
    assert max(difference(model, scenario).values()) < 0.01
    costs = model.fusion.costs(50, Layout(views=2), 16)
    assert costs["merger"].flops == 2 * costs["projector"].flops == 2 * 2 * 32 * (24 * 32 + 32 * 32)
    assert model.fusion.costs(1, Layout(), 16, past=9)["merger"].flops == 0
    assert model.fusion.costs(50, None, 16)["merger"].flops == 0


def test_one_level_is_concatenation(make: Make) -> None:
    alone, concat = make(DeepStackFusion(levels=1), 3), make(ConcatFusion(), 3)
    assert list(alone.fusion.state_dict()) == list(concat.fusion.state_dict())
    batch = collate(alone, SAMPLES)
    with torch.no_grad():
        assert torch.equal(alone(batch), concat(batch))
        assert type(alone.fusion(batch, alone.features(batch.pixels), alone.language).vision) is VisualContext


def test_only_the_layers_behind_which_something_is_added_are_opened(make: Make) -> None:
    for layers, opened in ((None, [0, 1]), ([2, 0], [0, 2])):
        model = make(DeepStackFusion(levels=3, layers=layers), LEVELS)
        assert [i for i, layer in enumerate(model.language.layers) if hasattr(layer, "fused_index")] == opened
        batch = collate(model, SAMPLES)
        context = model.fusion(batch, model.features(batch.pixels), model.language).vision
        assert isinstance(context, DeepStackContext)
        assert list(context.added) == (layers or [0, 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": 3, "layers": [0]}, r"name 2 different layers, not \[0\]"),
        ({"levels": 3, "layers": [1, 1]}, r"name 2 different layers, not \[1, 1\]"),
        ({"levels": 3, "layers": [1, 4]}, r"behind layers \[4\]: the language model has 0 to 3"),
        ({"levels": 5}, "visual tokens of width 72 into 5 levels"),
        ({"levels": 9}, r"behind layers \[4, 5, 6, 7\]"),
    ],
)
def test_levels_and_layers_that_do_not_fit_are_refused(make: Make, arguments: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(DeepStackFusion(**arguments), LEVELS)


# --- LaVi -------------------------------------------------------------------------------------------------------------


def test_each_modulated_layer_sees_its_level_alone(make: Make) -> None:
    model = make(LaViFusion(every=1, levels=3, targets=["attention", "final"], generator=small()), LEVELS)
    awaken(model.fusion)
    assert model.fusion.level_of == {"0": 0, "1": 0, "2": 1, "3": 1, "4": 2}  # the last is the norm before the head
    batch = collate(model, SAMPLES)
    features = model.features(batch.pixels).detach()
    with torch.no_grad():
        slots = model.fusion(batch, features, model.language).vision.visual
        for level in range(3):
            other = features.clone()
            other[..., 24 * level : 24 * (level + 1)] += 1.5 * torch.randn(24)
            changed = model.fusion(batch, other, model.language).vision.visual
            for name, own in model.fusion.level_of.items():
                assert torch.equal(changed[name], slots[name]) == (own != level)


@pytest.mark.parametrize("kind", ["attention", "conv"])
def test_equal_levels_are_one_level(make: Make, kind: str) -> None:
    """To the last bit, and of the same parameters: two layers of the tower that gave the same."""
    one = make(LaViFusion(every=2, generator=small(kind)), 3)
    two = make(LaViFusion(every=2, levels=2, generator=small(kind)), [2, 3])
    awaken(one.fusion)
    two.fusion.load_state_dict(one.fusion.state_dict())
    batch = collate(one, SAMPLES)
    features = one.features(batch.pixels).detach()
    with torch.no_grad():
        said = one.language(one.fusion(batch, features, one.language))
        again = two.language(two.fusion(batch, features.repeat(1, 1, 2), two.language))
    assert torch.equal(again, said)


def test_each_norm_of_a_layer_sees_the_layer_s_level(make: Make) -> None:
    fusion = make(LaViFusion(every=2, levels=2, per_target=True, generator=small()), [2, 3]).fusion
    assert fusion.level_of == {"1-0": 0, "1-1": 0, "3-0": 1, "3-1": 1}
    assert [generator.vision_width for generator in fusion.generators.values()] == [24] * 4


def test_levels_halve_what_a_generator_reads(make: Make) -> None:
    """And both counters agree on it."""
    costs = []
    for levels in (1, 2):
        model = make(LaViFusion(every=2, levels=levels), [2, 3], device="meta")
        assert max(difference(model, Scenario(text=50, visual_tokens=16)).values()) < 0.01
        costs.append(model.fusion.costs(1, Layout(), 16)["generator"].flops)
    assert costs[0] - costs[1] == 2 * 16 * (48 - 24) * 2 * 64 * 2  # keys and values of two generators


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": 5}, "LaVi cannot split visual tokens of width 72 into 5 levels"),
        ({"levels": 3, "every": 2}, r"modulates layers \[1, 3\], fewer than its 3 levels: add layers"),
    ],
)
def test_levels_that_no_layer_would_see_are_refused(build: Any, arguments: Any, words: str) -> None:
    language = build(ConcatFusion()).language
    with pytest.raises(UserError, match=words):
        LaViFusion(**arguments).bind(language, FeatureSpec(72, 16, (4, 4)))

"""Looking inside: strengths, shares and relevance are what they are called, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GENERATORS, answering, ask, awaken, image, small
from PIL import Image
from test_native_resolution import CONFIG as NAFLEX
from test_pair import two

from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.lavi import LaViFusion
from lavi.inspection.answer import inspect_answer, inspect_batch, inspect_each
from lavi.inspection.page import page
from lavi.inspection.probes import linear_cka, reading, relevance
from lavi.model import VisionLanguageModel
from lavi.reduction.controls import RandomTokens, ZeroTokens
from lavi.vision.naflex import NaFlexVision
from lavi.visor.fusion import VisorFusion
from lavi.visor.readers import ModulationReader

QUESTION = "what colour is the circle?"


def batch_of(model: Any, *samples: Any) -> Any:
    return model.processor.collate([model.processor.encode(sample) for sample in samples])


def test_a_norm_without_deltas_has_no_strength_and_one_with_twice_as_much_has_twice(build: Any) -> None:
    model = build(LaViFusion(every=2, generator=small()))
    batch = batch_of(model, ask(1, QUESTION, answer="red"))
    with reading(model) as readings, torch.no_grad():
        model(batch)
    assert len(readings.strength) == len(model.fusion.modulated_norms)
    assert all(float(value.abs().max()) == 0 for value in readings.strength.values())
    awaken(model.fusion)
    first = min(readings.strength)

    def strength() -> torch.Tensor:
        with reading(model) as again, torch.no_grad():
            model(batch)
        return again.strength[first]

    once = strength()
    with torch.no_grad():
        for generator in model.fusion.generators.values():
            generator.deltas.weight.mul_(2)
            generator.deltas.bias.mul_(2)
    assert torch.allclose(strength(), 2 * once, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_strength_is_the_length_of_what_is_added(build: Any, dtype: torch.dtype) -> None:
    """Against the same pass without deltas, at the first layer, whose input is the same."""
    model = answering(build, LaViFusion(layers=[0], generator=small()))
    batch = batch_of(model, ask(1, QUESTION, answer="red"))
    target = model.fusion.modulated_norms[0]
    outputs: list[torch.Tensor] = []
    handle = target.norm.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with reading(model) as readings, torch.no_grad():
        model(batch)
        model(batch.without_images())
    handle.remove()
    seen, plain = outputs[0], outputs[1]
    expected = (seen - plain).norm(dim=-1) / plain.norm(dim=-1)
    with reading(model) as readings, torch.no_grad():
        model(batch)
    (strength,) = [value for name, value in readings.strength.items() if name.role == target.role and name.layer == 0][
        :1
    ]
    assert torch.allclose(strength, expected, rtol=1e-3, atol=1e-5)


def test_the_hooks_are_gone_afterwards(build: Any) -> None:
    model = build(LaViFusion(every=1, generator=small()))
    before = sum(len(module._forward_hooks) for module in model.modules())
    with reading(model):
        assert sum(len(module._forward_hooks) for module in model.modules()) > before
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def test_shares_are_of_what_is_seen_and_add_up_to_one(build: Any) -> None:
    """Tokens before the image see nothing; behind it, each token's shares are of its own row's image."""
    model = answering(build, LaViFusion(every=2, generator=small()))
    batch = batch_of(model, ask("what colour", 1, "is the circle?", answer="red"), ask(2, QUESTION, answer="blue"))
    with reading(model) as readings, torch.no_grad():
        model(batch)
    tokens = model.feature_spec.tokens
    assert sorted(readings.shares) == sorted({target.layer for target in model.fusion.modulated_norms})
    for shares in readings.shares.values():
        assert shares.shape == (2, batch.input_ids.shape[1], tokens)
        column = batch.image_slots[0].column
        assert float(shares[0, :column].abs().max()) == 0
        assert torch.allclose(shares[0, column:].sum(-1), torch.ones(1), atol=1e-5)


def test_shares_are_those_of_the_attention_itself(build: Any) -> None:
    """Read with values that name their token: the attention gives the shares back."""
    model = answering(build, LaViFusion(layers=[0], generator=small()))
    (generator,) = model.fusion.generators.values()
    batch = batch_of(model, ask(1, QUESTION, answer="red"))
    caught: list[Any] = []
    handle = generator.register_forward_hook(lambda module, inputs, output: caught.append(inputs))
    with torch.no_grad():
        model(batch)
    handle.remove()
    hidden, slots, seen = caught[0]
    shares = generator.shares(hidden, slots, seen)
    heads, width = slots.shape[2], slots.shape[4]
    for token in range(slots.shape[3]):
        named = slots.clone()
        named[:, 1] = 0
        named[:, 1, :, token] = 1
        read = seen.only(generator.attend(hidden, named, seen)).unflatten(-1, (heads, width)).mean((-1, -2))  # (B, T)
        assert torch.allclose(shares[..., token], read, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "attention"])
def test_generators_of_one_vector_have_no_shares(build: Any, name: str) -> None:
    model = answering(build, LaViFusion(every=2, generator=GENERATORS[name](bottleneck=8)))
    inspected = inspect_answer(model, QUESTION, [image(1)], max_new_tokens=3)
    assert inspected.shares == {}
    assert inspected.mean_shares is None
    assert inspected.mean_strength


FUSIONS = {
    "lavi": lambda: LaViFusion(every=2, generator=small()),
    "concat": ConcatFusion,
    "cross-attention": lambda: CrossAttentionFusion(every=2),
    "visor": lambda: VisorFusion(cross_attention=2, self_attention=2),
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_an_answer_depends_on_is_told_for_every_fusion(build: Any, fusion: str) -> None:
    """Of two rows with one and two images: shares of each row add up to 1, and a token that is cut out has none."""
    model = answering(build, FUSIONS[fusion]())
    batch = batch_of(model, ask(1, QUESTION, answer="red"), ask(2, 3, QUESTION, answer="blue"))
    inspected = relevance(model, batch)
    assert inspected.shape == (3, model.feature_spec.tokens)
    assert float(inspected[0].sum()) == pytest.approx(1, abs=1e-4)
    assert float(inspected[1:].sum()) == pytest.approx(1, abs=1e-4)
    assert bool((inspected >= 0).all())
    both = inspect_batch(model, batch, [(QUESTION, "red"), (QUESTION, "blue")])
    assert [len(one.views) for one in both] == [1, 2]
    assert torch.allclose(both[1].relevance, inspected[1:].flatten(), atol=1e-5)
    assert torch.allclose(both[1].views[1].cells(both[1].relevance).flatten(), inspected[2], atol=1e-5)
    assert both[0].cka is not None
    assert both[0].cka.shape == (1 + len(model.language.layers),) * 2
    assert torch.allclose(both[0].cka.diagonal(), torch.ones(1), atol=1e-4)


def test_relevance_finds_the_only_token_that_matters(build: Any) -> None:
    """A projector that passes one visual token on."""
    model = answering(build, ConcatFusion())
    batch = batch_of(model, ask(1, QUESTION, answer="red"))
    mask = torch.zeros(model.feature_spec.tokens, 1)
    mask[3] = 1
    forward = model.fusion.projector.forward
    model.fusion.projector.forward = lambda features: forward(features) * mask
    inspected = relevance(model, batch)
    assert float(inspected[0, 3]) == pytest.approx(1)


def test_cka_is_1_for_a_rotation_and_small_for_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    matrix = linear_cka([x, 3 * x @ rotation + 1, torch.randn(400, 6)])
    assert float(matrix[0, 1]) == pytest.approx(1, abs=1e-5)
    assert float(matrix[0, 2]) < 0.1
    assert torch.allclose(matrix, matrix.T)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_page_needs_nothing_else_and_its_words_are_text(build: Any) -> None:
    model = answering(build, LaViFusion(every=2, generator=small()))
    inspected = inspect_answer(model, "what <b>colour</b> is </script> it?", [image(1), image(2)], answer="red & blue")
    text = page(inspected, run="a run")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "<b>colour" not in text
    assert text.count("</script>") == 2
    assert text.count("<canvas>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["words"]) == len(inspected.words)
    assert len(data["answer"]) == 2
    rows, columns = inspected.views[0].grid
    assert (len(data["answer"][0]), len(data["answer"][0][0])) == (rows, columns)


def test_the_command_writes_a_page(run: Any, tiny_recipe: Path) -> None:
    more = "callbacks={modulation: {_target_: callbacks.modulation.Modulation, count: 3}}"
    status, _, problems = run("lavi.fit", "--recipe", tiny_recipe, "--run", "out", more)
    assert status == 0, problems
    Image.new("RGB", (64, 48), "red").save("photo.png")
    status, out, problems = run(
        "lavi.inspect", "--checkpoint", "out", "--image", "photo.png", "--question", QUESTION, "--out", "page.html"
    )
    assert status == 0, problems
    assert "written: page.html" in out
    assert "Strength of the modulation" in Path("page.html").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("out", size_guidance={"images": 0})
    events.Reload()
    assert {"inspection/strength", "inspection/words", "inspection/patches", "inspection/cka"} <= set(
        events.Tags()["images"]
    )
    assert any(tag.startswith("inspection/strength/") for tag in events.Tags()["scalars"])


def test_rows_of_several_routes_are_read_each_by_itself(build: Any) -> None:
    """As alone, with norms that only rows of a group pass; what is counted meanwhile is no one's."""
    fusion = VisorFusion(
        cross_attention=[0, 2],
        self_attention=[1, 3],
        configurations=[[], [1], [3], [1, 3]],
        router="token",
        reader=ModulationReader(),
    )
    model = answering(build, fusion)
    with torch.no_grad():
        model.fusion.router.network[0].reset_parameters()
        for number in (1, 3):
            model.fusion.router.network[number].weight.normal_(generator=torch.Generator().manual_seed(number))
            model.fusion.router.network[number].bias.zero_()
    asked = ("what?", "is there a circle", "red square", "where is the blue one?", "which image", QUESTION)
    samples = [model.processor.encode(ask(n, text, answer="red")) for n, text in enumerate(asked)]
    model.fusion.route_counts.clear()
    inspected = inspect_each(model, samples, [(QUESTION, "red")] * 6)
    assert not model.fusion.route_counts
    with torch.no_grad():
        model(model.processor.collate(samples))
    assert set(model.fusion.route_counts) == {route for one in inspected for route in one.routes}
    assert len(model.fusion.route_counts) > 1
    for sample, one in zip(samples, inspected, strict=True):
        batch = model.processor.collate([sample])
        with reading(model) as readings, torch.no_grad():
            model(batch)
        assert {target.layer for target in one.strength} == {0, 2}
        start, stop = batch.spans[0]
        assert one.strength == {target: value[0, start:stop].tolist() for target, value in readings.strength.items()}


def test_a_fusion_without_visual_tokens_depends_on_none(build: Any) -> None:
    parts = build(LaViFusion(every=2, generator=small()))
    model = VisionLanguageModel(
        vision=parts.vision,
        language=parts.language,
        fusion=LaViFusion(every=2, generator=small()),
        reducer=ZeroTokens(),
    )
    inspected = inspect_answer(model, QUESTION, [image(1)], answer="red")
    assert float(inspected.relevance.sum()) == 0
    assert page(inspected, run="a run")


def test_what_a_run_counts_of_its_routes_is_left_as_it_was(build: Any) -> None:
    model = answering(build, VisorFusion(cross_attention=2, self_attention=2))
    model.fusion.route_counts.update({(1,): 3})
    inspect_batch(model, batch_of(model, ask(1, QUESTION, answer="red")), [(QUESTION, "red")])
    assert dict(model.fusion.route_counts) == {(1,): 3}


def test_tokens_that_a_reducer_took_off_their_grid_are_drawn_nowhere(build: Any) -> None:
    parts = build(ConcatFusion())
    model = VisionLanguageModel(
        vision=parts.vision, language=parts.language, fusion=ConcatFusion(), reducer=RandomTokens(keep=3)
    )
    inspected = inspect_answer(model, QUESTION, [image(1)], answer="red")
    assert inspected.views == []
    assert float(inspected.relevance.sum()) == pytest.approx(1, abs=1e-4)
    text = page(inspected, run="a run")
    assert "lie on no grid" in text
    assert "id=what" not in text
    assert text.index("if (!what) return") < text.index("what.textContent")  # its script asks before it writes there


def test_views_of_patches_and_of_two_towers_are_drawn(build: Any) -> None:
    """Pixels that are no picture: patches at native resolution, the channels of two towers side by side."""
    parts = build(ConcatFusion())
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 32))
    for vision in (NaFlexVision(config=NAFLEX), two()):
        model = VisionLanguageModel(vision=vision, language=parts.language, fusion=ConcatFusion())
        inspected = inspect_answer(model, QUESTION, [picture], answer="red")
        pixels = inspected.views[0].pixels
        assert pixels is not None
        height, width, channels = pixels.shape
        assert channels == 3
        assert (width > height) is vision.native_resolution
        left, right = pixels[:, : width // 2 - 4].mean((0, 1)), pixels[:, width // 2 + 4 :].mean((0, 1))
        assert left[0] > right[0] + 0.5
        assert right[2] > left[2] + 0.5
        assert "<canvas>" in page(inspected, run="a run")


def test_features_that_were_read_in_the_place_of_pixels_are_looked_into(build: Any) -> None:
    """The same figures, and a blank where the picture would be."""
    model = answering(build, LaViFusion(every=2, generator=small()))
    batch = batch_of(model, ask(1, QUESTION, answer="red"))
    cached = replace(
        batch, backbone_features=model.encode(batch.pixels, batch.layouts).detach(), pixels=batch.pixels[:0]
    )
    (seen,), (read,) = (inspect_batch(model, one, [(QUESTION, "red")]) for one in (batch, cached))
    assert seen.views[0].pixels is not None
    assert read.views[0].pixels is None
    assert torch.allclose(seen.relevance, read.relevance, atol=1e-5)
    assert page(read, run="a run").count("<canvas>") == 1

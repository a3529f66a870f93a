"""The parts of VISOR by themselves: readers, positions, router, labels, and the files between its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate, small
from torch import Tensor

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.nn.delta_generators import AttentionDeltas
from lavi.nn.projectors import MLPProjector
from lavi.nn.visibility import Visibility
from lavi.visor.files import read_labels, read_viable
from lavi.visor.fusion import VisorFusion
from lavi.visor.positions import KERNEL, VisualPositions
from lavi.visor.readers import ModulationReader
from lavi.visor.router import Router, RouterLabels

VIABLE = [(), (1,), (1, 3)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- readers ----------------------------------------------------------------------------------------------------------


def test_what_a_reader_keeps_costs_nothing_while_decoding(build) -> None:  # type: ignore[no-untyped-def]
    attention = build(VisorFusion(cross_attention=[1], self_attention=0)).fusion.readers["1"]
    once, after = (attention.costs(3, 5, past=past) for past in (0, 9))
    assert set(once) == set(after) == {"cross_attention"}
    assert after["cross_attention"].flops == attention.attention.flops(3, 5)
    assert once["cross_attention"].flops - after["cross_attention"].flops == attention.attention.keys_values_flops(5)
    modulation = build(VisorFusion(cross_attention=[1], self_attention=0, reader=ModulationReader())).fusion.readers[
        "1"
    ]
    once, after = (modulation.costs(3, 5, past=past) for past in (0, 9))
    assert set(once) == set(after) == {"generator", "modulation"}
    assert after["generator"].flops == modulation.generator.flops(3, views=1, per_view=5)
    assert once["generator"].flops - after["generator"].flops == modulation.generator.slots_flops(5)
    assert once["modulation"] == after["modulation"]
    assert once["modulation"].uncounted == once["modulation"].flops > 0


def test_a_reader_that_modulates_gives_each_norm_its_deltas_and_leaves_the_text(build) -> None:  # type: ignore[no-untyped-def]
    fusion = build(
        VisorFusion(cross_attention=[1], self_attention=0, reader=ModulationReader(generator=small()))
    ).fusion
    reader = fusion.readers["1"]
    assert isinstance(reader.generator, AttentionDeltas)
    assert (reader.generator.bottleneck, reader.generator.outputs) == (16, 4)
    assert fusion.modulated_norms == reader.modulated_norms
    assert len(reader.modulated_norms) == 2
    visual, text, mask = draw(1, 5, 32), draw(1, 3, 32), torch.ones(1, 3, 5, dtype=torch.bool)
    with torch.no_grad():
        reader.generator.deltas.bias.copy_(torch.arange(4.0).repeat_interleave(32))
        kept = reader.keep(visual)
        assert torch.equal(kept[0], reader.generator.prepare(reader.generator.visual(visual, (1, 5))))
        same, during_layer = reader.read(text, kept, Visibility.by(mask))
        assert same is text
        with during_layer:
            for number, target in enumerate(reader.modulated_norms):
                scale, shift = target.norm.deltas
                assert (scale.unique().tolist(), shift.unique().tolist()) == ([2.0 * number], [2.0 * number + 1])


# --- positions --------------------------------------------------------------------------------------------------------


def test_positions_are_added_and_images_are_apart() -> None:
    positions = VisualPositions(4, images=2)
    visual, image = draw(1, 5, 4), torch.tensor([[0, 0, 1, 1, 2]])
    with torch.no_grad():
        positions.convolution.bias.zero_()
        positions.convolution.weight.zero_()
        numbers = positions.images.weight[torch.tensor([0, 0, 1, 1, 1])]  # the third image shares the second's
        size = visual[0].square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(positions(visual, image, 3)[0], visual[0] + size * numbers)
        positions.images.weight.zero_()
        positions.convolution.weight[:, :, KERNEL // 2] = 2.0
        torch.testing.assert_close(positions(visual, image, 3), 3 * visual)
        positions.convolution.weight.fill_(1.0)  # the sum over the neighbours: those of other images are no neighbours
        near = positions(visual, image, 3) - visual
        for first, stop in ((0, 2), (2, 4), (4, 5)):
            expected = visual[0, first:stop].sum(0).expand(stop - first, -1)
            torch.testing.assert_close(near[0, first:stop], expected)
    assert positions.flops(10) == 2 * (10 + KERNEL // 2) * KERNEL * 4


# --- router -----------------------------------------------------------------------------------------------------------


def routed(**changes: Any) -> VisorFusion:
    settings = {"cross_attention": [0, 2], "self_attention": [1, 3], "configurations": [list(one) for one in VIABLE]}
    return VisorFusion(**settings, router="token", **changes)


def test_a_router_costs_something_once_a_prompt(build) -> None:  # type: ignore[no-untyped-def]
    fusion = build(routed()).fusion
    assert fusion.costs(9, Layout(), 16, past=9)["router"].flops == 0
    assert fusion.costs(9, Layout(), 16)["router"].flops == fusion.router.flops() == 2 * 32 * 128 + 2 * 128 * 3
    assert "position" not in fusion.costs(9, Layout(), 16, past=9)


def test_a_router_that_is_not_trained_adds_nothing_to_the_loss(build) -> None:  # type: ignore[no-untyped-def]
    model = build(routed()).train()
    awaken(model.fusion)
    added: dict[str, Tensor] = {}
    model(collate(model, [ask(1, "what?", answer="red")]), added)
    assert float(added["router"].detach()) == 0
    assert added["router"].requires_grad


def test_labels_are_numbers_of_the_viable_configurations(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    lines = [{"about": "x"}, {"key": "a", "configuration": [], "tokens": 9}, {"key": "b", "configuration": [1, 3]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_labels(file, VIABLE) == {"a": (0, 9), "b": (2, None)}
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    labels = RouterLabels(file, VIABLE)
    assert float(labels.loss(["a", "b"], [9, 9], logits)) < 0.01
    assert float(labels.loss(["b", "c"], [9, 9], logits)) == pytest.approx(9, abs=0.01)  # c has none
    with pytest.raises(UserError, match=r"sample a, which had 9 tokens of text, and has 8 here: .* other data"):
        labels.loss(["b", "a"], [9, 8], logits)
    assert Router(8, VIABLE, before_layer=1, reads="token")(draw(2, 8)).shape == (2, 3)


def test_files_that_are_not_there_or_not_whole_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*gone of labels: .*lavi\.visor label"):
        read_labels(tmp_path / "gone", VIABLE)
    with pytest.raises(UserError, match=r"there is no file .*gone: .*lavi\.visor search"):
        read_viable(tmp_path / "gone")
    file = tmp_path / "labels.jsonl"
    file.write_text('{"about": 1}\n{"key": "a", "configuration": [1]}\n{"key": "b", "conf')
    with pytest.raises(UserError, match=r"line 3 is cut off: run python -m lavi\.visor label once more"):
        read_labels(file, VIABLE)
    file.write_text('{"key": "a", "configuration": [2]}\n')
    with pytest.raises(UserError, match=r"labels sample a with layers \[2\], which is not viable"):
        read_labels(file, VIABLE)


# --- the fusion -------------------------------------------------------------------------------------------------------


def test_visor_takes_what_concatenation_takes(build) -> None:  # type: ignore[no-untyped-def]
    projector = MLPProjector()
    fusion = build(VisorFusion(cross_attention=1, self_attention=1, projector=projector, newline=True, budget=2)).fusion
    assert fusion.projector is projector
    assert (fusion.tile_arrangement.budget, fusion.tile_arrangement.newline) == (2, True)
    assert fusion.tokens_in_language(Layout(), 16) == 17
    beside = build(VisorFusion(cross_attention=1, self_attention=0, newline=True)).fusion
    assert beside.tokens_in_language(Layout(), 16) == 0


def test_an_answer_read_without_a_cache_is_the_same(build) -> None:  # type: ignore[no-untyped-def]
    """Then each call reads the prompt and all that was said behind it."""
    model = build(VisorFusion(cross_attention=[0, 2], self_attention=[1]))
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour?"), ask("which of", 2, 3, "is red?")], prompt=True, pad_left=True)
    answers = model.generate(batch, max_new_tokens=5, eos_token_id=None)
    assert model.generate(batch, max_new_tokens=5, eos_token_id=None, use_cache=False) == answers

"""VISOR's readers by themselves: what each adds to the text, what it keeps of the image, and what that costs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from lavi.errors import UserError
from lavi.language.surgery import NormTarget
from lavi.nn.delta_generators import AttentionDeltas, ConvDeltas
from lavi.nn.modulated_norm import normalise
from lavi.nn.visibility import Visibility
from lavi.visor.readers import AttentionReader, ModulationReader, Reader

WIDTH, HEADS = 12, 4
CONFIG = Qwen2Config(hidden_size=WIDTH, num_attention_heads=HEADS)
TEXT, VISUAL = 5, 6


def layer_norms(layer: int = 0) -> list[NormTarget]:
    """A layer norm before the attention and an RMS norm before the feed-forward part."""
    norms = {"attention": torch.nn.LayerNorm(WIDTH, eps=1e-3), "ffn": torch.nn.RMSNorm(WIDTH, eps=1e-3)}
    return [NormTarget(layer, role, role, "feeds", norm, flattened=False) for role, norm in norms.items()]  # type: ignore[arg-type]


def bound(reader: Reader) -> Reader:
    """With random parameters, in layer 0 of two."""
    copy = reader.bound(CONFIG, WIDTH, [*layer_norms(1), *layer_norms(0)], 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return copy


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


READERS = {
    "attention": AttentionReader,
    "modulation": ModulationReader,
    "small-modulation": lambda: ModulationReader(generator=AttentionDeltas(bottleneck=8, heads=2)),
}
MASK = torch.ones(1, TEXT, VISUAL, dtype=torch.bool)


def test_cross_attention_is_added_to_the_text_before_the_layer() -> None:
    reader = bound(AttentionReader())
    text, visual = draw(1, TEXT, WIDTH), draw(1, VISUAL, WIDTH, seed=2)
    kept = reader.keep(visual)
    assert [tuple(part.shape) for part in kept] == [(1, HEADS, VISUAL, WIDTH // HEADS)] * 2
    read, during_layer = reader.read(text, kept, Visibility.by(MASK))
    assert torch.equal(read, reader.attention(text, reader.attention.keys_values(visual), Visibility.by(MASK)))
    assert not torch.equal(read, text)
    assert isinstance(during_layer, nullcontext)
    assert list(reader.modulated_norms) == []


def test_modulation_leaves_the_text_and_adds_deltas_to_the_norms_of_its_layer() -> None:
    """The scale of each norm before its shift, the norms in their order; only while the layer runs."""
    reader = bound(ModulationReader())
    assert [target.layer for target in reader.modulated_norms] == [0, 0]
    assert [target.role for target in reader.modulated_norms] == ["attention", "ffn"]
    text, visual = draw(1, TEXT, WIDTH), draw(1, VISUAL, WIDTH, seed=2)
    (slots,) = kept = reader.keep(visual)
    assert torch.equal(slots, reader.generator.prepare(reader.generator.visual(visual, (1, VISUAL))))
    read, during_layer = reader.read(text, kept, Visibility.by(MASK))
    assert read is text
    deltas = reader.generator(text, slots, Visibility.by(MASK))  # 4 of (1, T, D)
    for number, target in enumerate(reader.modulated_norms):
        plain = target.norm(text)
        with during_layer if number == 0 else reader.read(text, kept, Visibility.by(MASK))[1]:
            changed = target.norm(text)
        xhat = normalise(text, 1e-3, centred=number == 0)
        expected = plain + deltas[2 * number] * xhat + deltas[2 * number + 1]
        torch.testing.assert_close(changed, expected, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(changed, plain, atol=1e-2)
        assert torch.equal(target.norm(text), plain)


def test_a_generator_that_makes_one_vector_of_all_tokens_is_refused() -> None:
    """It could not tell which of them a token may see."""
    with pytest.raises(UserError, match="reads token by token, and ConvDeltas makes one vector of all visual tokens"):
        ModulationReader(generator=ConvDeltas())


def test_each_layer_has_parameters_of_its_own() -> None:
    for reader in (AttentionReader(), ModulationReader()):
        assert list(reader.parameters()) == []
        first, second = (reader.bound(CONFIG, WIDTH, [*layer_norms(0), *layer_norms(1)], layer) for layer in (0, 1))
        pairs = list(zip(first.parameters(), second.parameters(), strict=True))
        assert pairs
        assert all(one is not other for one, other in pairs)
    assert not AttentionReader.needs_norms
    assert ModulationReader.needs_norms
    assert type(ModulationReader().generator) is AttentionDeltas


@pytest.mark.parametrize("name", READERS)
def test_reading_costs_what_a_counter_of_operators_sees(name: str) -> None:
    """All of it while a prompt is read; behind one, what was kept is there already."""
    reader = bound(READERS[name]())
    for text, visual in ((TEXT, VISUAL), (3, 8)):
        with FlopCounterMode(display=False) as once:
            kept = reader.keep(draw(1, visual, WIDTH))
        with FlopCounterMode(display=False) as each:
            reader.read(draw(1, text, WIDTH), kept, Visibility.by(torch.ones(1, text, visual, dtype=torch.bool)))
        for past, expected in (
            (0, once.get_total_flops() + each.get_total_flops()),
            (9, each.get_total_flops()),
        ):
            costs = reader.costs(text, visual, past=past)
            assert sum(cost.flops - cost.uncounted for cost in costs.values()) == expected
        if name == "attention":
            assert list(costs) == ["cross_attention"]
        else:
            assert list(costs) == ["generator", "modulation"]
            assert costs["modulation"].flops == costs["modulation"].uncounted == 6 * 2 * text * WIDTH

"""CASA: the formula, token by token, and where windows begin and end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import ask, awaken, collate
from torch import Tensor

from lavi.batch import Layout
from lavi.errors import UserError
from lavi.fusion.casa import CASA
from lavi.nn.window_attention import WindowAttention

SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
    ask(4, 5, "which?", 6, answer="third", key="d"),
]


def by_hand(block: WindowAttention, text: Tensor, visual: Tensor) -> Tensor:
    """What is added to the last token of ``text`` (T, D), a window so far that begins with an image (M, D)."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + block.norm.eps).sqrt() * weight

    keys = norm(torch.cat([visual, text]), block.norm.weight)
    read = []
    for head in range(block.width // block.head_width):
        own = slice(head * block.head_width, (head + 1) * block.head_width)
        q = norm(keys[-1] @ block.query.weight[own].T, block.query_norm.weight)
        k = norm(keys @ block.key.weight[own].T, block.key_norm.weight)
        scores = (k @ q / math.sqrt(block.head_width)).exp()
        read.append(scores / scores.sum() @ (keys @ block.value.weight[own].T))
    return torch.cat(read) @ block.out.weight.T


@pytest.mark.parametrize("pad_left", [False, True])
def test_each_token_reads_the_latest_image_and_its_window_by_the_formula(build, pad_left: bool) -> None:  # type: ignore[no-untyped-def]
    """All of it: two windows, images side by side that share one, a row without an image, and padding."""
    model = build(CASA(layers=[1]))
    awaken(model.fusion)
    block = model.fusion.blocks["1"]
    batch = collate(model, SAMPLES, pad_left=pad_left)
    seen: list[tuple[Tensor, Tensor]] = []
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        features = model.features_of(batch)
        model(batch)
        views = model.fusion.visual_tokens(batch, features)  # (views, N, D)
    [(hidden, out)] = seen
    slots = list(enumerate(batch.image_slots))
    windows = 0
    for row, (start, stop) in enumerate(batch.spans):
        for column in range(start, stop):
            before = [slot.column for _, slot in slots if slot.row == row and slot.column <= column]
            if not before:
                assert torch.equal(out[row, column], hidden[row, column])
                continue
            begin = max(before)
            images = [views[view] for view, slot in slots if (slot.row, slot.column) == (row, begin)]
            windows = max(windows, len(images))
            added = by_hand(block, hidden[row, begin : column + 1], torch.cat(images))
            torch.testing.assert_close(out[row, column] - hidden[row, column], added, atol=1e-5, rtol=1e-4)
    assert windows == 2


def test_with_one_window_it_is_attention_over_the_image_and_the_text(build) -> None:  # type: ignore[no-untyped-def]
    """No mask but the causal one: torch's own attention layer, with the same weights."""
    torch.manual_seed(0)
    block = WindowAttention(width=32, heads=4)
    torch.nn.init.normal_(block.out.weight)
    text, visual = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    for norm in (block.query_norm, block.key_norm):
        norm.forward = lambda x: x  # type: ignore[method-assign]
    theirs = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([block.query.weight, block.key.weight, block.value.weight]),
            "out_proj.weight": block.out.weight,
        }
    )
    keys = block.norm(torch.cat([visual, text], dim=1))
    hidden = torch.ones(5, 12, dtype=torch.bool).triu(8)
    expected = text + theirs(block.norm(text), keys, keys, attn_mask=hidden)[0]

    class Seen:
        allowed = ~hidden

        @staticmethod
        def only(read: Tensor) -> Tensor:
            return read

    said: Any = block(text, block.keys_values(visual), Seen())  # type: ignore[arg-type]
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)


def test_no_visual_token_is_in_a_cache(build) -> None:  # type: ignore[no-untyped-def]
    model = build(CASA(every=2))
    batch = collate(model, SAMPLES[:1], prompt=True)
    with torch.no_grad():
        cache = model.prefill(batch, model.features_of(batch))[0].past_key_values
    text = batch.input_ids.shape[1]
    assert {tensor.shape[2] for tensor in cache.keys_values()} == {text}
    assert [layer.keys.shape[2] for layer in cache.added.layers] == [16 + text, 16 + text]
    assert len(cache.cached_tensors()) == 4
    cache.crop(-2)
    assert [layer.keys.shape[2] for layer in cache.added.layers] == [14 + text, 14 + text]


def test_what_beams_swap_is_swapped_in_the_blocks_too(build) -> None:  # type: ignore[no-untyped-def]
    """Rows that have said different words change places: what each says next goes with it."""
    model = build(CASA(every=2))
    awaken(model.fusion)
    batch = collate(model, [SAMPLES[0], SAMPLES[0]], prompt=True)

    def said_next(*, swapped: bool) -> Tensor:
        out, context = model.prefill(batch, model.features_of(batch))
        cache, length = out.past_key_values, batch.input_ids.shape[1]
        for step, ids in enumerate((torch.tensor([[5], [9]]), torch.tensor([[7], [7]]))):
            if swapped and step:
                cache.reorder_cache(torch.tensor([1, 0]))
            position = torch.full((2, 1), length + step)
            logits = model.language.hf(
                ids, past_key_values=cache, use_cache=True, vision=context, position_ids=position
            ).logits
        return logits

    with torch.no_grad():
        here, there = said_next(swapped=False), said_next(swapped=True)
    assert float((here[0] - here[1]).abs().max()) > 1e-3
    torch.testing.assert_close(there, here.flip(0), atol=1e-5, rtol=1e-4)


def test_in_half_precision_norms_get_what_their_weights_are(build) -> None:  # type: ignore[no-untyped-def]
    """Else torch computes them the slow way, and warns of it once a process."""
    model = build(CASA(every=2))
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    got: list[bool] = []
    for block in model.fusion.blocks.values():
        for norm in (block.norm, block.query_norm, block.key_norm):
            norm.register_forward_pre_hook(lambda norm, args: got.append(args[0].dtype == norm.weight.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halves = model(batch)
    assert len(got) == 2 * (2 + 1 + 2)  # keys and what they are of, of the image and of the text
    assert all(got)
    with torch.no_grad():
        assert float((halves.float() - model(batch)).abs().max()) < 0.1


def test_a_control_that_shows_no_token_is_no_image(build) -> None:  # type: ignore[no-untyped-def]
    model = build(CASA(every=2))
    awaken(model.fusion)
    batch = collate(model, SAMPLES[:1])
    with torch.no_grad():
        inputs = model.fusion(batch, model.features_of(batch)[:, :0], model.language)
        torch.testing.assert_close(model.language(inputs), model(batch.without_images()), atol=1e-6, rtol=0)


def test_a_step_costs_its_keys_whatever_was_read_before(build) -> None:  # type: ignore[no-untyped-def]
    fusion = build(CASA(layers=[0, 3])).fusion
    width, visual = 32, 2 * 16
    prompt, step = (fusion.costs(text, Layout(views=2), 16, past=past) for text, past in ((9, 0), (1, 9)))
    linear = 2 * width * width
    scores = 4 * 9 * (visual + 9) * width
    assert prompt["window_attention"].flops == 2 * (4 * 9 * linear + 2 * visual * linear + scores)
    assert step["window_attention"].flops == 2 * (4 * linear + 4 * (visual + 9 + 1) * width)
    assert prompt["projector"].flops == fusion.projector.flops(visual)
    assert step["projector"].flops == 0


def test_what_cannot_be_is_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="5 heads must divide the width 32"):
        build(CASA(heads=5))
    with pytest.raises(UserError, match=r"CASA cannot work in layers \[4\]"):
        build(CASA(layers=[4]))

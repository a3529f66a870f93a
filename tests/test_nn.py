"""The small modules by themselves: what each computes, written out once more, and that nothing unseen has a say."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GENERATORS
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lavi.errors import UserError
from lavi.nn.cross_attention import GatedCrossAttention
from lavi.nn.delta_generators import DeltaGenerator, on_grid
from lavi.nn.grid_code import GridCode
from lavi.nn.modulated_norm import ModulatedNorm, NormKind, normalise
from lavi.nn.take_rows import take_rows
from lavi.nn.view_embedding import ViewEmbedding
from lavi.nn.visibility import Visibility

WIDTH, VISION, R, HEADS = 12, 10, 8, 2
GRID = (6, 8)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def generator(kind: str, *, outputs: int = 3, **changes: int) -> DeltaGenerator:
    settings = {"attention": {"heads": HEADS}, "mlp": {"depth": 2}, "conv": {"depth": 2}, "pooled": {}}[kind]
    unbound = GENERATORS[kind](**{"bottleneck": R, **settings, **changes})
    return randomised(unbound.bound(width=WIDTH, vision_width=VISION, outputs=outputs))  # type: ignore[return-value]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(T, E), (M, E), (M, E) to (T, E), one head after the other."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        parts.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(parts, dim=-1)


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    norm, up, _, down = layers
    return down(gelu(up(layer_norm(x, x.shape[-1:], norm.weight, norm.bias))))


def slots_of(module: DeltaGenerator, kind: str, features: Tensor) -> Tensor:
    """What one view (N, Dv) leaves."""
    x = layer_norm(features, (VISION,), module.vision_norm.weight, module.vision_norm.bias)
    if kind == "attention":
        return module.key_value(x)
    if kind == "pooled":
        return silu(module.down(x).mean(0, keepdim=True))
    if kind == "mlp":  # 6 x 8 to 4 x 4: means over rows 0-1, 1-2, 3-4, 4-5 and pairs of columns
        rows = [(0, 2), (1, 3), (3, 5), (4, 6)]
        x = x.reshape(*GRID, VISION)
        x = torch.stack([x[a:b, 2 * c : 2 * c + 2].mean((0, 1)) for a, b in rows for c in range(4)])
        x = module.down(x)
        for tokens, channels in zip(module.over_tokens, module.over_channels, strict=True):
            x = x + mlp(tokens, x.T).T
            x = x + mlp(channels, x)
        return x.mean(0, keepdim=True)
    x = module.down(x).reshape(*GRID, R)
    for depthwise, pointwise in zip(module.depthwise, module.pointwise, strict=True):
        wide = nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
        near = sum(
            wide[i : i + GRID[0], j : j + GRID[1]] * depthwise.weight[:, 0, i, j] for i in range(3) for j in range(3)
        )
        x = x + gelu(near + depthwise.bias)
        x = gelu(x @ pointwise.weight[:, :, 0, 0].T + pointwise.bias)
    return x.mean((0, 1))[None]


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_computes_what_its_picture_says(kind: str) -> None:
    """One view after the other, one token after the other, each with the slots that it sees and no others."""
    module = generator(kind)
    features = draw(3, 48, VISION)
    slots = module.visual(features, GRID)  # (3, S, E)
    torch.testing.assert_close(slots, torch.stack([slots_of(module, kind, view) for view in features]))
    per_view = slots.shape[1]
    row = slots.reshape(1, 3 * per_view, -1).repeat(2, 1, 1)
    hidden = draw(2, 4, WIDTH)
    mask = torch.zeros(2, 4, 3 * per_view, dtype=torch.bool)
    mask[0, 1, :per_view] = True
    mask[0, 2, : 2 * per_view] = True
    mask[0, 3] = mask[1, 2:] = True
    result = torch.stack(module(hidden, module.prepare(row), Visibility.by(mask)), dim=2)
    assert result.shape == (2, 4, 3, WIDTH)
    assert result.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    for at in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2)]:
        seen = row[at[0]][mask[at]]
        if not len(seen):
            assert (result[at] == 0).all()
            continue
        own = 0.0
        if kind != "pooled":
            own = module.query(rms(hidden[at], module.text_norm.weight, eps))
        if kind == "attention":
            read = attended(own[None], *seen.chunk(2, dim=-1), heads=HEADS)[0]
        else:
            read = seen.mean(0) + own
        torch.testing.assert_close(result[at], module.deltas(silu(read)).reshape(3, WIDTH), rtol=1e-4, atol=1e-5)


def all_seen(slots: Tensor, text: int) -> Visibility:
    """A mask by which each of ``text`` tokens sees every slot (1, M, E)."""
    return Visibility.by(torch.ones(1, text, slots.shape[1], dtype=torch.bool))


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_starts_at_zero_and_works_in_fp32(kind: str) -> None:
    module = GENERATORS[kind](bottleneck=R).bound(width=WIDTH, vision_width=VISION, outputs=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots = module.visual(draw(1, 48, VISION).bfloat16(), GRID)
        result = module(draw(1, 3, WIDTH).bfloat16(), module.prepare(slots), all_seen(slots, 3))
    assert {slots.dtype, *(one.dtype for one in result)} == {torch.float32}
    assert all((one == 0).all() for one in result)
    assert module.deltas.weight.requires_grad
    module.deltas.weight.data.normal_()
    assert all(one.std() > 0 for one in module(draw(1, 3, WIDTH), module.prepare(slots), all_seen(slots, 3)))


@pytest.mark.parametrize("kind", GENERATORS)
def test_without_a_mask_everything_is_seen(kind: str) -> None:
    module, hidden = generator(kind), draw(1, 3, WIDTH)
    slots = module.visual(draw(1, 48, VISION), GRID)
    masked = module(hidden, module.prepare(slots), all_seen(slots, 3))
    bare = module(hidden, module.prepare(slots), Visibility((1, 3, slots.shape[1]), hidden.device))
    for one, other in zip(bare, masked, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_costs_what_a_counter_of_operators_sees(kind: str) -> None:
    views, text = 3, 5
    other = {"attention": {"heads": 4}, "mlp": {"depth": 1}, "conv": {"depth": 1}, "pooled": {"bottleneck": 4}}[kind]
    for module in (generator(kind), generator(kind, outputs=1, **other)):
        with FlopCounterMode(display=False) as once:
            slots = module.visual(draw(views, 48, VISION), GRID)
        assert once.get_total_flops() == views * module.slots_flops(48)
        row = slots.flatten(0, 1)[None]
        with FlopCounterMode(display=False) as each:
            module(draw(1, text, WIDTH), module.prepare(row), all_seen(row, text))
        assert each.get_total_flops() == module.flops(text, views=views, per_view=48)


def test_rows_are_taken_as_an_index_takes_them_and_their_gradients_are_not_added_one_by_one() -> None:
    table, index = torch.randn(7, 3, requires_grad=True), torch.tensor([[0, 6, 6, 2], [5, 6, 1, 0]])
    weights = torch.randn(2, 4, 3)
    with profile() as seen:
        rows = take_rows(table, index)
        (gradient,) = torch.autograd.grad((rows * weights).sum(), table)
    expected = table[index]
    assert torch.equal(rows, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), table)[0])
    assert not [event.key for event in seen.key_averages() if "index_put" in event.key]


def test_heads_divide_the_bottleneck() -> None:
    with pytest.raises(UserError, match=r"bottleneck \(8\) must be a multiple of its heads, 3"):
        generator("attention", heads=3)


def test_tokens_lie_on_their_grid_and_a_class_token_on_none() -> None:
    tokens = torch.arange(13.0).reshape(1, 13, 1)
    assert on_grid(tokens[:, :12], (3, 4))[0, ..., 0].tolist() == tokens[0, :12, 0].reshape(3, 4).tolist()
    assert on_grid(tokens, (3, 4))[0, ..., 0].tolist() == tokens[0, 1:, 0].reshape(3, 4).tolist()
    for count, grid in ((12, (3, 4)), (9, (3, 3)), (7, (1, 7)), (10, (2, 5))):  # of another number: near a square
        assert on_grid(tokens[:, :count], (8, 8)).shape == (1, *grid, 1)
    assert on_grid(tokens[:, :11], (3, 4)).shape == (1, 1, 11, 1)
    assert on_grid(tokens[:, :12], (2, 5)).shape == (1, 3, 4, 1)


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_last_projection_starts_at_zero_or_as_wide_as_it_is_told(kind: str) -> None:
    weights = [
        GENERATORS[kind](bottleneck=64, **own).bound(width=64, vision_width=VISION, outputs=2).deltas
        for own in ({}, {"initial_std": 0.02})
    ]
    assert not weights[0].weight.any()
    assert float(weights[1].weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not any(one.bias.any() for one in weights)


def test_a_view_is_the_sum_of_its_four_numbers_embeddings() -> None:
    embedding = ViewEmbedding(VISION, images=2, tiles=3, frames=4)
    for table, deviation in ((embedding.row, 0.02), (embedding.column, 0.02), (embedding.frame, 0.5)):
        assert (table.weight[0] == 0).all()
        assert float(table.weight[1:].square().mean().sqrt()) == pytest.approx(deviation, rel=0.5)
    assert float(embedding.image.weight.std()) == pytest.approx(0.5, rel=0.5)
    assert [len(table.weight) for table in (embedding.image, embedding.row, embedding.column, embedding.frame)] == [
        2,
        4,
        4,
        5,
    ]
    default = ViewEmbedding(VISION, images=1)
    assert [len(table.weight) for table in (default.row, default.column, default.frame)] == [7, 7, 129]
    numbers = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [9, 9, 9, 9], [1, 1, 2, 3]])
    result = embedding(numbers)
    assert result.shape == (4, 1, VISION)
    torch.testing.assert_close(result[0, 0], embedding.image.weight[0])
    for view, (image, row, column, frame) in enumerate([(0, 0, 0, 0), (1, 2, 3, 4), (1, 3, 3, 4), (1, 1, 2, 3)]):
        expected = embedding.image.weight[image] + embedding.row.weight[row] + embedding.column.weight[column]
        torch.testing.assert_close(result[view, 0], expected + embedding.frame.weight[frame])
    result.sum().backward()
    assert (embedding.row.weight.grad[0] == 0).all()  # in no tile nothing is learned


@pytest.mark.parametrize("width", [VISION, 33])
def test_frames_start_as_waves_of_their_number(width: int) -> None:
    """Each is told from all others, and nearer to the next than to one far away, whether training shows it or not."""
    frames = ViewEmbedding(width, images=1).frame.weight.detach()[1:]  # (128, Dv)
    apart = torch.cdist(frames, frames)
    assert float((apart + 9 * torch.eye(128)).min()) > 0.1
    beside, far = apart.diagonal(1), apart.diagonal(40)
    assert float(beside.max()) < float(far.min())
    assert float(frames.square().mean().sqrt()) == pytest.approx(0.5, rel=0.1)
    slow = 2 * math.pi * 0.5 / 129
    expected = 0.5 * math.sqrt(2) * torch.tensor([math.sin(slow * 7), math.cos(slow * 7)])
    torch.testing.assert_close(frames[6, :2], expected)


def code_at(row: float, column: float, code: GridCode) -> list[float]:
    """Written out: a sine and a cosine of each of the frequencies, of the row and then of the column."""
    width = len(code.amplitude)
    count = math.ceil(width / 4)
    slowest, fastest = code.CYCLES
    ratios = [i / (count - 1) for i in range(count)]
    waves = [
        wave(2 * math.pi * slowest * (fastest / slowest) ** ratio * position)
        for position in (row, column)
        for ratio in ratios
        for wave in (math.sin, math.cos)
    ]
    return [float(a) * wave for a, wave in zip(code.amplitude, waves, strict=False)]


@pytest.mark.parametrize("width", [VISION, 16])
def test_a_grid_code_is_of_row_and_column_in_the_image(width: int) -> None:
    code: GridCode = randomised(GridCode(width))  # type: ignore[assignment]
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0], [-0.25, 0.5, 0.75, 0.5]])
    result = code(windows, [(2, 3), (3, 2)], 8, prefix=1)
    assert result.shape == (2, 8, width)
    for view, grid in enumerate([(2, 3), (3, 2)]):  # all views of one grid, or each of its own
        assert torch.equal(code(windows[[view]], [grid], 8, prefix=1), result[[view]])
    assert (result[:, [0, 7]] == 0).all()  # a class token before the grid, padding behind it
    for token in range(6):
        row, column = divmod(token, 3)
        expected = code_at((row + 0.5) / 2, (column + 0.5) / 3, code)
        torch.testing.assert_close(result[0, 1 + token], torch.tensor(expected), rtol=1e-3, atol=1e-4)
        row, column = divmod(token, 2)
        expected = code_at(-0.25 + 0.75 * (row + 0.5) / 3, 0.5 + 0.5 * (column + 0.5) / 2, code)
        torch.testing.assert_close(result[1, 1 + token], torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_no_two_cells_of_a_fine_grid_have_one_code() -> None:
    """Of the finest grid there is: 6 x 6 tiles of 27 x 27 tokens; as large beside normed features on any grid."""
    code = GridCode(64)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    for side in (1, 2, 16, 162):
        cells = code(whole, [(side, 1)], side)[0].detach()
        apart = torch.cdist(cells, cells) + torch.eye(side) * 9
        assert float(apart.min()) > 0.2
        assert float(cells.square().mean()) == pytest.approx(code.amplitude[0].item() ** 2 / 2, rel=1e-4)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_code_is_added_to_normed_features(kind: str) -> None:
    module = generator(kind)
    features, code = draw(3, 48, VISION), draw(3, 48, VISION, seed=5)
    module.vision_norm.weight.data.fill_(1.0)
    module.vision_norm.bias.data.zero_()
    normed = layer_norm(features, (VISION,))
    expected = module.slots(normed + code, GRID)
    torch.testing.assert_close(module.visual(features, GRID, code), expected)
    torch.testing.assert_close(module.visual(1000 * features + 7, GRID, code), expected, rtol=1e-3, atol=1e-3)


class Norm(ModulatedNorm, nn.LayerNorm):
    kind = NormKind(1e-3, centred=True)


class ScaleOnly(ModulatedNorm, nn.RMSNorm):
    kind = NormKind(1e-3, centred=False)


class Shared(ModulatedNorm, LlamaRMSNorm):
    kind = NormKind(1e-3, centred=False, affine="weight behind the cast")


class PlusOne(ModulatedNorm, GemmaRMSNorm):
    kind = NormKind(1e-3, centred=False, affine="1 + weight")


def test_a_modulated_norm_adds_deltas_to_what_the_norm_says() -> None:
    x, dgamma, dbeta = draw(2, 3, WIDTH), draw(2, 3, WIDTH, seed=2), draw(2, 3, WIDTH, seed=3)
    x = 0.05 * x + 1.0  # off its mean, and small enough for eps to show
    norms = (cls(WIDTH, eps=1e-3) for cls in (Norm, ScaleOnly, Shared, PlusOne))
    for norm in map(randomised, norms):
        plain = norm(x)
        y = x - x.mean(-1, keepdim=True) if norm.kind.centred else x
        xhat = y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        torch.testing.assert_close(normalise(x, 1e-3, centred=norm.kind.centred), xhat)
        for scale, shift in ((dgamma, dbeta), (dgamma, None), (None, dbeta)):
            expected = plain + (0 if scale is None else scale * xhat) + (0 if shift is None else shift)
            norm.deltas = (scale, shift)
            torch.testing.assert_close(norm(x), expected)
            norm.deltas = lambda seen, deltas=(scale, shift): deltas if seen is x else (None, None)
            torch.testing.assert_close(norm(x), expected)
        nothing = torch.zeros_like(dgamma)
        for deltas in ((None, None), (nothing, nothing), (nothing, None), (None, nothing)):
            norm.deltas = deltas
            assert torch.equal(norm(x), plain)
        norm.deltas = (dgamma, dbeta)
        norm.bfloat16()
        assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("kv_heads", "ffn"), [(None, 0), (2, 20), (1, 0)])
def test_gated_attention_reads_what_each_token_sees(kv_heads: int | None, ffn: int) -> None:
    """Query by query, with the tokens that it sees and no others; a token that sees none stays as it is."""
    module: GatedCrossAttention = randomised(  # type: ignore[assignment]
        GatedCrossAttention(width=WIDTH, vision_width=VISION, heads=4, kv_heads=kv_heads, ffn=ffn, eps=1e-3)
    )
    own = kv_heads or 4
    hidden, visual = draw(2, 4, WIDTH), draw(2, 5, VISION)
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[0, 0], mask[1, 3], mask[1, 1] = False, False, True
    result = module(hidden, module.keys_values(visual), Visibility.by(mask))
    for b in range(2):
        for t in range(4):
            seen, x = visual[b][mask[b, t]], hidden[b, t]
            if not len(seen):
                assert torch.equal(result[b, t], x)
                continue
            query = module.query(rms(x, module.norm.weight, 1e-3)).reshape(4, 3)
            query = rms(query, module.query_norm.weight, 1e-3)
            key = rms(module.key(seen).reshape(-1, own, 3), module.key_norm.weight, 1e-3)
            value = module.value(seen).reshape(-1, own, 3)
            groups = [head * own // 4 for head in range(4)]
            read = torch.cat([attended(query[h][None], key[:, g], value[:, g], 1)[0] for h, g in enumerate(groups)])
            expected = x + module.gate.tanh() * module.out(read)
            if ffn:
                y = rms(expected, module.ffn_norm.weight, 1e-3)
                y = module.ffn_down(silu(module.ffn_gate(y)) * module.ffn_up(y))
                expected = expected + module.gate_of_ffn.tanh() * y
            torch.testing.assert_close(result[b, t], expected, rtol=1e-4, atol=1e-5)


def test_gated_attention_starts_as_if_it_were_not_there() -> None:
    module = GatedCrossAttention(width=WIDTH, vision_width=VISION, heads=4, ffn=8)
    hidden, visual = draw(1, 4, WIDTH).bfloat16(), draw(1, 5, VISION).bfloat16()
    mask = torch.ones(1, 4, 5, dtype=torch.bool)
    result = module(hidden, module.keys_values(visual), Visibility.by(mask))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, hidden)
    assert {name for name, p in module.named_parameters() if (p == 0).all()} == {"gate", "gate_of_ffn"}


@pytest.mark.parametrize(("kv_heads", "ffn"), [(4, 0), (4, 20), (2, 20)])
def test_gated_attention_costs_what_a_counter_of_operators_sees(kv_heads: int, ffn: int) -> None:
    module = GatedCrossAttention(width=WIDTH, vision_width=VISION, heads=4, kv_heads=kv_heads, ffn=ffn)
    with FlopCounterMode(display=False) as once:
        seen = module.keys_values(draw(1, 5, VISION))
    assert once.get_total_flops() == module.keys_values_flops(5)
    with FlopCounterMode(display=False) as each:
        module(draw(1, 7, WIDTH), seen, Visibility.by(torch.ones(1, 7, 5, dtype=torch.bool)))
    assert each.get_total_flops() == module.flops(7, 5)

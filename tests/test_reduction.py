"""Reducers: what each keeps, what it equals at its end, and that it composes with every fusion."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QWEN2, TOWER, ask, awaken, collate, small
from torch import nn

from lavi.batch import Layout
from lavi.data.tiling import AnyRes
from lavi.efficiency.flops import closed_form, counted
from lavi.efficiency.scenario import Scenario
from lavi.errors import UserError
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.cross_attention import CrossAttentionFusion
from lavi.fusion.deepstack import DeepStackFusion
from lavi.fusion.lavi import LaViFusion
from lavi.fusion.levels import split_levels
from lavi.fusion.pruning import FastV
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.reduction.base import Reducer
from lavi.reduction.controls import RandomTokens, UniformTokens, ZeroTokens
from lavi.reduction.diverse import DART, CDPruner, DivPrune
from lavi.reduction.pixel_shuffle import PixelShuffle
from lavi.reduction.pooling import AveragePooling, MatryoshkaPooling
from lavi.reduction.resampler import PerceiverResampler
from lavi.reduction.visionzip import VisionZip
from lavi.training.module import VisionLanguageModule
from lavi.vision.base import FeatureSpec
from lavi.vision.hf import HFVision
from lavi.vision.reduced import ReducedTower
from lavi.vision.tiles_on_request import TilesOnRequest
from lavi.visor.fusion import VisorFusion

REDUCERS = {  # of a 4 x 4 grid: how many tokens are left
    "average": (partial(AveragePooling, factor=2), 4),
    "shuffle": (partial(PixelShuffle, factor=2), 4),
    "resampler": (partial(PerceiverResampler, tokens=3, heads=2), 3),
    "visionzip": (partial(VisionZip, dominant=3, contextual=2), 5),
    "matryoshka": (partial(MatryoshkaPooling, sides=[1, 2, 4], side=2), 4),
    "random": (partial(RandomTokens, keep=5), 5),
    "uniform": (partial(UniformTokens, keep=5), 5),
    "divprune": (partial(DivPrune, keep=5), 5),
    "cdpruner": (partial(CDPruner, keep=5), 5),
    "dart": (partial(DART, keep=5, pivots=2), 5),
    "zero": (ZeroTokens, 0),
}
FUSIONS = {
    "concat": ConcatFusion,
    "lavi": partial(LaViFusion, every=2),
    "lavi-conv": lambda: LaViFusion(every=2, generator=small("conv")),
    "cross": partial(CrossAttentionFusion, every=2),
    "visor": partial(VisorFusion, cross_attention=1, self_attention=1),
    "fastv": partial(FastV, layer=1, keep=0.5),
    "deepstack": partial(DeepStackFusion, levels=3),
}
SAMPLES = [
    ask(1, "what colour is the circle?", answer="red", key="a"),
    ask("hello", 2, "which image has the red circle?", 3, answer="first", key="b"),
    ask("is there a blue square?", answer="yes", key="c"),
]


@pytest.fixture
def make(tokenizer: str):  # type: ignore[no-untyped-def]
    def build(fusion: Fusion, reducer: Reducer | None, **settings: object) -> VisionLanguageModel:
        torch.manual_seed(0)
        vision = HFVision(config=TOWER)
        language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
        model = VisionLanguageModel(vision=vision, language=language, fusion=fusion, reducer=reducer, **settings)  # type: ignore[arg-type]
        return model.eval()

    return build


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_composes_with_every_fusion(make, name: str, fusion: str) -> None:
    reducer, tokens = REDUCERS[name]
    model = make(FUSIONS[fusion](), reducer())
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    features = model.features(batch.pixels)
    assert features.shape == (3, tokens, model.feature_spec.width)
    assert model.feature_spec.tokens == tokens
    with torch.no_grad():
        together = model(batch)
        for index, sample in enumerate(SAMPLES):
            start, stop = batch.spans[index]
            alone = model(collate(model, [sample]))[0]
            torch.testing.assert_close(together[index, start:stop], alone, atol=2e-5, rtol=1e-4)
    inside = model.fusion.tokens_in_language(Layout(), tokens)
    assert inside == (tokens if fusion in ("concat", "visor", "fastv", "deepstack") else 0)


@pytest.mark.parametrize("fusion", ["concat", "visor", "lavi"])
@pytest.mark.parametrize("name", REDUCERS)
def test_tiles_and_frames_are_counted_as_they_come(make, name: str, fusion: str) -> None:
    reducer, _ = REDUCERS[name]
    model = make(FUSIONS[fusion](), reducer(), tiling=AnyRes(max_grid=2))
    for question in (ask(1, "what?"), ask(1, 2, "which?")):
        sample = question
        ready = model.processor.encode(sample, prompt=True)
        batch = model.processor.collate([ready], pad_left=True)
        inputs = model.fusion(batch, model.features(batch.pixels), model.language)
        assert inputs.attention_mask.shape[1] == ready.length


@pytest.mark.parametrize(
    "reducer",
    [
        AveragePooling(factor=1),
        PixelShuffle(factor=1),
        VisionZip(dominant=16),
        MatryoshkaPooling(sides=[4]),
        RandomTokens(keep=16),
        UniformTokens(keep=16),
        DivPrune(keep=16),
        CDPruner(keep=16),
        DART(keep=16),
    ],
    ids=lambda r: type(r).__name__,
)
def test_with_nothing_removed_nothing_is_changed(make, reducer: Reducer) -> None:
    plain, reduced = make(ConcatFusion(), None), make(ConcatFusion(), reducer)
    awaken(plain.fusion)
    reduced.fusion.load_state_dict(plain.fusion.state_dict())
    batch = collate(plain, SAMPLES)
    with torch.no_grad():
        assert torch.equal(reduced(batch), plain(batch))


def test_pooling_is_the_mean_of_squares_and_shuffling_keeps_every_number(make) -> None:
    features = torch.randn(2, 16, 24)
    average, shuffle = (make(ConcatFusion(), kind(factor=2)).reducer for kind in (AveragePooling, PixelShuffle))
    for corner, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        square = [4 * (row + i) + column + j for i in (0, 1) for j in (0, 1)]
        torch.testing.assert_close(average(features)[:, corner], features[:, square].mean(1))
        assert torch.equal(shuffle(features)[:, corner], features[:, square].flatten(1))


def test_pooling_of_an_odd_grid_leaves_the_rest_at_its_border(make) -> None:
    pooling = AveragePooling(factor=2)
    pooling.bind(HFVision(config=TOWER | {"image_size": 40}))
    ramp = torch.arange(5.0).expand(5, 5).reshape(1, 25, 1)
    assert pooling(ramp)[0, :3, 0].tolist() == [0.5, 2.5, 4.0]
    assert pooling.after.grid == (3, 3)


@pytest.mark.parametrize("shown", [SAMPLES[0], ask(1, 2, "which?", answer="first")])
def test_matryoshka_draws_its_scales_in_training(make, shown) -> None:  # type: ignore[no-untyped-def]
    tiled = AnyRes(max_grid=2)
    model = make(ConcatFusion(newline=True), MatryoshkaPooling(sides=[1, 2, 4], side=2), tiling=tiled)
    module = VisionLanguageModule(model, learning_rate={"language": 1e-3}).train()  # all but the language model rests
    batch = collate(model, [shown])
    assert {module.model.features(batch.pixels).shape[1] for _ in range(40)} == {1, 4, 16}
    for _ in range(8):
        assert module.model(batch).isfinite().all()
    module.eval()
    assert model.features(batch.pixels).shape[1] == 4


def test_visionzip_keeps_what_the_tower_attends_to(make) -> None:
    """Against the attention that transformers itself returns."""
    model = make(ConcatFusion(), VisionZip(dominant=3, contextual=2))
    pixels = torch.randn(2, *model.vision.pixel_shape)
    with torch.no_grad():
        reduced = model.features(pixels)
        features = model.vision(pixels)
        model.vision.tower.set_attn_implementation("eager")
        attention = model.vision.tower(pixels, output_attentions=True).attentions[-1]  # (views, heads, N, N)
        best = attention.mean((1, 2)).topk(3).indices.sort().values
    for view in range(2):
        assert torch.equal(reduced[view, :3], features[view, best[view]])
        rest = [i for i in range(16) if i not in best[view].tolist()]
        # Merged tokens are means of parts that together are all the rest.
        low, high = features[view, rest].amin(0), features[view, rest].amax(0)
        assert ((reduced[view, 3:] >= low - 1e-6) & (reduced[view, 3:] <= high + 1e-6)).all()


@pytest.mark.parametrize("contextual", [3, 8])
def test_visionzip_merges_each_token_that_is_left_with_the_likest(contextual: int) -> None:
    """By the cosine of the mean keys of the last layer's heads, one token at a time."""
    torch.manual_seed(0)
    vision = HFVision(config=TOWER)
    reducer = VisionZip(dominant=4, contextual=contextual)
    reducer.bind(vision)
    keys: list[torch.Tensor] = []
    last = [module for name, module in vision.named_modules() if name.endswith("k_proj")][-1]
    last.register_forward_hook(lambda *call: keys.append(call[-1].unflatten(-1, (2, 12)).mean(-2)))
    with torch.no_grad():
        features = vision(torch.randn(3, *vision.pixel_shape))
        dominant, merged = reducer(features).split([4, contextual], dim=1)
    for view in range(3):
        first = {int((features[view] == token).all(-1).nonzero()) for token in dominant[view]}
        rest = [index for index in range(16) if index not in first]
        middle = {3: (2, 6, 10), 8: (0, 2, 3, 5, 6, 8, 9, 11)}[contextual]  # of twelve in equal parts
        centres = [rest[index] for index in middle]
        groups: dict[int, list[int]] = {centre: [centre] for centre in centres}
        for index in rest:
            if index not in centres:
                likeness = [float(torch.cosine_similarity(*keys[0][view, [index, c]], dim=0)) for c in centres]
                groups[centres[likeness.index(max(likeness))]].append(index)
        expected = torch.stack([features[view, group].mean(0) for group in groups.values()])
        torch.testing.assert_close(merged[view], expected)


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2"])
def test_a_class_token_ranks_by_what_it_attends_to(family: str) -> None:
    family_keys = {"intermediate_size": None, "mlp_ratio": 2} if family == "dinov2" else {}
    config = {key: value for key, value in (TOWER | family_keys).items() if value is not None}
    vision = HFVision(config=config | {"model_type": family})
    reducer = VisionZip(dominant=4)
    reducer.bind(vision)
    pixels = torch.randn(1, *vision.pixel_shape)
    with torch.no_grad():
        reduced = reducer(vision(pixels))
        features = vision(pixels)
        vision.tower.set_attn_implementation("eager")
        attention = vision.tower(pixels, output_attentions=True).attentions[-1]
    best = attention.mean(1)[0, 0, 1:].topk(4).indices.sort().values
    assert torch.equal(reduced[0], features[0, best])
    assert reducer.flops() == 2 * 17 * 24  # the class token's query with each key, 24 wide


def bound(reducer: Reducer, **changes: object) -> Reducer:
    """A reducer for a 4 x 4 grid of 24 wide tokens."""
    reducer.bind(HFVision(config=TOWER | changes))
    return reducer


def test_a_resampler_s_queries_read_the_tokens_and_each_other() -> None:
    """Layer by layer, view by view and head by head."""
    torch.manual_seed(0)
    reducer = bound(PerceiverResampler(tokens=3, depth=2, heads=2))
    assert 0.01 < float(reducer.queries.std()) < 0.03
    with torch.no_grad():
        for parameter in reducer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    features = torch.randn(2, 16, 24)
    resampled = reducer(features.double())
    assert resampled.dtype == torch.float32
    for view in range(2):
        queries = reducer.queries
        for layer in reducer.layers:
            normed = layer.query_norm(queries)
            key, value = layer.key_value(torch.cat([layer.visual_norm(features[view]), normed])).chunk(2, dim=-1)
            heads = []
            for head in (slice(0, 12), slice(12, 24)):
                share = (layer.query(normed)[:, head] @ key[:, head].T / 12**0.5).softmax(-1)
                heads.append(share @ value[:, head])
            queries = queries + layer.out(torch.cat(heads, dim=-1))
            wide = nn.functional.gelu(layer.ffn[0](layer.ffn_norm(queries)))
            queries = queries + layer.ffn[2](wide)
        torch.testing.assert_close(resampled[view], reducer.norm(queries), rtol=1e-4, atol=1e-5)
    biases = {name.split(".", 2)[-1] for name in reducer.state_dict() if "layers" in name and name.endswith("bias")}
    assert biases == {f"{part}.bias" for part in ("query_norm", "visual_norm", "ffn_norm", "ffn.0", "ffn.2")}
    assert bound(PerceiverResampler(tokens=1, depth=1, heads=1))(features).shape == (2, 1, 24)


def test_reducers_say_what_they_leave() -> None:
    """Width, tokens and grid; by default what their papers do, or what is said of them."""
    grid = TOWER | {"image_size": 64, "hidden_size": 24}
    for reducer, width, tokens, side in (
        (AveragePooling(), 24, 16, 4),
        (AveragePooling(factor=3), 24, 9, 3),
        (PixelShuffle(), 96, 16, 4),
        (PixelShuffle(factor=4), 384, 4, 2),
        (MatryoshkaPooling(sides=[1, 4, 2]), 24, 16, 4),
        (MatryoshkaPooling(sides=[1, 4], side=1), 24, 1, 1),
        (PerceiverResampler(), 24, 64, None),
        (VisionZip(dominant=5), 24, 5, None),
        (VisionZip(dominant=60, contextual=4), 24, 64, 8),
        (RandomTokens(keep=7), 24, 7, None),
        (UniformTokens(keep=7), 24, 7, None),
        (DivPrune(keep=7), 24, 7, None),
        (CDPruner(keep=64), 24, 64, 8),
        (DART(keep=7), 24, 7, None),
        (ZeroTokens(), 24, 0, None),
    ):
        spec = reducer.bind(HFVision(config=grid))
        assert (spec.width, spec.tokens, spec.grid) == (width, tokens, side and (side, side)), reducer
        assert spec is reducer.after
        assert reducer.before.grid == (8, 8)
        assert reducer.eval()(torch.zeros(0, 64, 24)).shape == (0, tokens, width)
    resampler = PerceiverResampler()
    assert (resampler.depth, resampler.heads) == (2, 8)
    assert AveragePooling().flops() == RandomTokens(keep=1).flops() == 0.0


@torch.no_grad()
def test_pixel_shuffle_of_several_layers_keeps_them_apart() -> None:
    """Each level is the shuffle of that layer alone: what stacks levels gets them whole."""
    tower = HFVision(config=TOWER, layer=[1, 2]).eval()
    assert tower.levels == 2
    shuffle = PixelShuffle(factor=2)
    shuffle.bind(tower)
    features = tower(torch.randn(3, *tower.pixel_shape))
    for level, of_layer in zip(split_levels(shuffle(features), 2), split_levels(features, 2), strict=True):
        alone = PixelShuffle(factor=2)
        alone.bind(HFVision(config=TOWER))
        assert torch.equal(level, alone(of_layer))
    assert TilesOnRequest(tower=tower, keep=0.5).levels == ReducedTower(tower=tower, reductions=[]).levels == 2


def test_grids_need_not_be_square() -> None:
    tokens = torch.randn(2, 32, 24)
    wide: Any = SimpleNamespace(
        prefix=0, width=24, levels=1, tokens=32, grid=(4, 8), feature_spec=FeatureSpec(24, 32, (4, 8))
    )
    squares = tokens.reshape(2, 2, 2, 4, 2, 24)
    shuffle, average = PixelShuffle(), AveragePooling()
    for reducer, expected in (
        (shuffle, squares.permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 96)),
        (average, squares.mean((2, 4)).reshape(2, 8, 24)),
    ):
        spec = reducer.bind(wide)
        assert (spec.tokens, spec.grid) == (8, (2, 4))
        torch.testing.assert_close(reducer(tokens), expected)
    for factor, grid in ((3, (2, 3)), (5, (1, 2))):
        assert AveragePooling(factor=factor).bind(wide).grid == grid
    largest = MatryoshkaPooling(sides=[4])
    assert largest.bind(wide).tokens == 16
    torch.testing.assert_close(largest.eval()(tokens), tokens.reshape(2, 4, 4, 2, 24).mean(3).reshape(2, 16, 24))
    with pytest.raises(UserError, match="shuffle by 8 does not divide the backbone's grid of 4 x 8"):
        PixelShuffle(factor=8).bind(wide)
    with pytest.raises(UserError, match=r"\(4, 8\)"):
        MatryoshkaPooling(sides=[5]).bind(wide)


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: AveragePooling(factor=0), "a factor of at least 1, not 0"),
        (lambda: MatryoshkaPooling(sides=[]), r"sides of at least 1, not \[\]"),
        (lambda: MatryoshkaPooling(sides=[2, 0]), r"sides of at least 1, not \[2, 0\]"),
        (lambda: PerceiverResampler(tokens=0), "at least one token"),
        (lambda: PerceiverResampler(depth=0), "at least one token"),
        (lambda: PerceiverResampler(heads=0), "at least one token"),
        (lambda: DART(keep=3, pivots=4), "take 1 to keep=3 of them, not 4"),
        (lambda: DART(keep=3, pivots=0), "take 1 to keep=3 of them, not 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make_one: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_one()


def test_matryoshka_s_scales_are_means_of_nested_squares() -> None:
    features = torch.randn(1, 16, 24)
    for side in (1, 2, 4):
        pooled = bound(MatryoshkaPooling(sides=[4, 1, 2], side=side)).eval()(features)
        squares = features.reshape(1, side, 4 // side, side, 4 // side, 24)
        torch.testing.assert_close(pooled, squares.mean((2, 4)).flatten(1, 2))
    assert bound(MatryoshkaPooling(sides=[2])).side == 2


def test_controls_take_tokens_in_the_order_of_the_grid() -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1).repeat(2, 1, 24)
    for keep, indices in ((5, [1, 4, 8, 11, 14]), (1, [8]), (4, [2, 6, 10, 14])):
        assert bound(UniformTokens(keep=keep))(tokens)[1, :, 0].tolist() == indices
    draws = [bound(RandomTokens(keep=5, seed=seed))(tokens)[0, :, 0].tolist() for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(draw == sorted(set(draw)) for draw in draws)
    assert bound(RandomTokens(keep=5)).indices == bound(RandomTokens(keep=5, seed=0)).indices


def test_divprune_takes_what_is_farthest_from_what_it_has() -> None:
    """Step by step, of cosine distances."""
    features = torch.randn(2, 16, 24)
    features[:, 9] = 3 * features[:, 2]  # alike but for their length: never both, unless all are taken
    kept = bound(DivPrune(keep=6))(features)
    for view, result in zip(features, kept, strict=True):
        distance = 1 - torch.nn.functional.cosine_similarity(view[:, None], view[None], dim=-1)
        others = [[float(distance[i, j]) for j in range(16) if j != i] for i in range(16)]
        chosen = [max(range(16), key=lambda i: min(others[i]))]
        while len(chosen) < 6:
            left = [i for i in range(16) if i not in chosen]
            chosen.append(max(left, key=lambda i: min(float(distance[i, j]) for j in chosen)))
        assert torch.equal(result, view[sorted(chosen)])
        assert not {2, 9} <= set(chosen)


def test_cdpruner_takes_what_adds_most_volume() -> None:
    """Step by step, the determinant of the cosines of what is chosen."""
    features = torch.randn(2, 16, 24)
    features[:, 9] = 3 * features[:, 2]
    kept = bound(CDPruner(keep=6))(features)
    for view, result in zip(features, kept, strict=True):
        unit = torch.nn.functional.normalize(view, dim=-1).double()
        kernel = unit @ unit.T
        chosen = [0]
        while len(chosen) < 6:
            left = [i for i in range(16) if i not in chosen]
            chosen.append(max(left, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
        assert torch.equal(result, view[sorted(chosen)])
        assert not {2, 9} <= set(chosen)


@pytest.mark.parametrize("kind", [DivPrune, CDPruner])
@pytest.mark.parametrize("keep", [2, 9, 15])
def test_no_token_is_chosen_twice_and_a_view_chooses_alone(kind: Any, keep: int) -> None:
    """However few directions there are, in any precision, and whatever views are beside it."""
    few = torch.randn(3, 24)
    flat = few[[0] * 16]
    views = torch.stack([torch.randn(16, 24), flat, torch.randn(16, 4) @ torch.randn(4, 24), few[[0, 1, 2, 0] * 4]])
    reducer = bound(kind(keep=keep))
    unit = torch.nn.functional.normalize(views, dim=-1)
    chosen = reducer.choose(unit @ unit.transpose(1, 2))
    assert chosen.shape == (4, keep)
    assert all(len(set(one.tolist())) == keep for one in chosen)
    for view in views:
        alone = reducer(view[None])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reducer(view[None]), alone)
    assert torch.equal(reducer(views), torch.cat([reducer(view[None]) for view in views]))


def test_what_is_most_alike_is_chosen_last() -> None:
    """Of copies of a few tokens one each is kept first; a view of one colour loses nothing by any choice."""
    few = torch.randn(4, 24)
    tokens = few[[0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]][None]
    for reducer in (DivPrune(keep=4), CDPruner(keep=4)):
        kept = bound(reducer)(tokens)
        assert {tuple(one.tolist()) for one in kept[0]} == {tuple(one.tolist()) for one in few}
        flat = bound(reducer)(torch.ones(1, 16, 24))
        assert torch.equal(flat, torch.ones(1, 4, 24))
        assert bound(reducer).flops() == 2.0 * 16 * 16 * 24


def darts(view: torch.Tensor, keep: int, pivots: int) -> list[int]:
    """The tokens of one view that DART keeps, token by token."""
    strength = [float(token.abs().sum()) for token in view]
    chosen = sorted(range(len(view)), key=lambda i: (-strength[i], i))[:pivots]
    for number, pivot in enumerate(chosen[:]):
        alike = [float(torch.cosine_similarity(token, view[pivot], dim=0)) for token in view]
        left = sorted((i for i in range(len(view)) if i not in chosen), key=lambda i: (alike[i], i))
        chosen += left[: len(range(number, keep - pivots, pivots))]
    return sorted(chosen)


@pytest.mark.parametrize(("keep", "pivots"), [(6, 2), (7, 3), (5, 5), (15, 4), (2, 1), (3, 2)])
def test_dart_takes_pivots_and_what_is_least_like_them(keep: int, pivots: int) -> None:
    """Token by token; a view alone, in any precision, as beside others."""
    torch.manual_seed(keep)
    views = torch.cat([torch.randn(2, 16, 24), torch.randn(1, 16, 3) @ torch.randn(3, 24)])
    reducer = bound(DART(keep=keep, pivots=pivots))
    kept = reducer(views)
    for view, result in zip(views, kept, strict=True):
        assert torch.equal(result, view[darts(view, keep, pivots)])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reducer(view[None])[0], result)
    assert reducer.flops() == 2.0 * pivots * 16 * 24


def test_dart_takes_the_first_of_what_is_equal() -> None:
    """Norms and cosines that are exact: one axis a token, many tokens an axis."""
    axis = torch.tensor([1, 0, 0, 2, 2, 1, 3, 0, 3, 1, 2, 3, 0, 1, 2, 3])
    tokens = torch.eye(24)[axis].clone()
    tokens[[4, 11]] *= 2.0  # the pivots: axes 2 and 3
    kept = bound(DART(keep=7, pivots=2)).choose_by_features(tokens[None])[0].tolist()
    assert kept == [4, 11, 0, 1, 2, 3, 5]  # three not of axis 2, then two not of axis 3
    flat = bound(DART(keep=5, pivots=2)).choose_by_features(torch.ones(2, 16, 24))
    assert all(len(set(view)) == 5 for view in flat.tolist())


def test_visionzip_reads_its_tower_anew_each_time() -> None:
    vision = HFVision(config=TOWER)
    reducer = VisionZip(dominant=3, contextual=2)
    reducer.bind(vision)
    pixels = torch.randn(2, *vision.pixel_shape)
    features = vision(pixels)
    assert not any(tensor.requires_grad for tensor in reducer.read.values())  # no graph is kept alive by them
    assert reducer(features).requires_grad
    with pytest.raises(RuntimeError, match="run the tower first"):
        reducer(features)
    vision(pixels)
    with pytest.raises(RuntimeError, match="run the tower first"):
        reducer(features[:1])
    assert reducer(features[:0]).shape == (0, 5, 24)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            SimpleNamespace(model_type="dinov3_vit", num_attention_heads=2),
            "a 'dinov3_vit' tower gives them their position",
        ),
        (SimpleNamespace(model_type="mlcd_vision_model", num_attention_heads=2), "gives them their position"),
        (SimpleNamespace(model_type="other"), "attention of a transformers vision transformer, not Tower"),
        (SimpleNamespace(model_type="other", num_attention_heads=2), "no query and key projections"),
    ],
    ids=["dinov3", "mlcd", "no heads", "no projections"],
)
def test_towers_whose_attention_cannot_be_read_are_refused(config: Any, words: str) -> None:
    class Tower(nn.Module):
        prefix, width, tokens, grid, feature_spec = 0, 24, 16, (4, 4), FeatureSpec(24, 16, (4, 4))

        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(2, 2)
            self.tower = SimpleNamespace(config=config)

    with pytest.raises(UserError, match=words):
        VisionZip(dominant=3).bind(Tower())  # type: ignore[arg-type]


def test_visionzip_without_a_rest_costs_nothing() -> None:
    assert bound(VisionZip(dominant=16)).flops() == 0.0
    assert bound(VisionZip(dominant=15)).flops() > 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_zero_tokens_are_no_image(make, fusion: str) -> None:
    model = make(FUSIONS[fusion](), ZeroTokens())
    awaken(model.fusion)
    batch = collate(model, SAMPLES)
    with torch.no_grad():
        logits, blind = model(batch), model(batch.without_images())
    torch.testing.assert_close(logits, blind, atol=1e-6, rtol=1e-5)
    if fusion.startswith("lavi"):  # deltas are exactly 0 where nothing is seen
        assert torch.equal(logits, blind)


def test_a_reducer_without_images_stays_in_the_graph(make) -> None:
    model = make(ConcatFusion(), PerceiverResampler(tokens=3, heads=2)).train()
    model(collate(model, SAMPLES[2:])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.reducer.parameters())


@pytest.mark.parametrize("name", REDUCERS)
def test_two_counters_agree(tokenizer: str, name: str) -> None:
    reducer, _ = REDUCERS[name]
    with torch.device("meta"):
        model = VisionLanguageModel(
            vision=HFVision(config=TOWER),
            language=LanguageModel(config=QWEN2, tokenizer=tokenizer),
            fusion=ConcatFusion(),
            reducer=reducer(),
        ).eval()
    shape = Scenario(text=20, frames=2, batch=2).shape_for(model)
    closed, measured = closed_form(model, shape), counted(model, shape)
    assert closed.prefill["reducer"] == pytest.approx(measured["reducer"], rel=0.01, abs=1)
    assert closed.language == pytest.approx(measured["reducer"] + measured["language"] + measured["fusion"], rel=0.01)
    assert closed.prefill["vision_encoder"] == pytest.approx(measured["vision_encoder"], rel=0.01)


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (PixelShuffle(factor=3), "does not divide"),
        (PixelShuffle(factor=0), "does not divide"),
        (VisionZip(dominant=10, contextual=10), "of 16 tokens"),
        (VisionZip(dominant=17), "of 16 tokens"),
        (VisionZip(dominant=-1, contextual=2), "of 16 tokens"),
        (VisionZip(dominant=2, contextual=-1), "of 16 tokens"),
        (VisionZip(dominant=0), "of 16 tokens"),
        (RandomTokens(keep=17), "has 16 tokens"),
        (RandomTokens(keep=0), "has 16 tokens"),
        (DivPrune(keep=17), "has 16 tokens"),
        (UniformTokens(keep=17), "has 16 tokens"),
        (DART(keep=17), "has 16 tokens"),
        (MatryoshkaPooling(sides=[8]), "the backbone's grid"),
        (MatryoshkaPooling(sides=[2], side=5), "the backbone's grid"),
        (PerceiverResampler(heads=7), "do not divide"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_is_refused(make, reducer: Reducer, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(ConcatFusion(), reducer)


def test_a_class_token_that_was_kept_is_refused() -> None:
    vision = HFVision(config=TOWER | {"model_type": "clip_vision_model"}, class_token=True)
    with pytest.raises(UserError, match="class_token=false"):
        AveragePooling().bind(vision)

"""Towers whose blocks work on fewer tokens: what is merged, what that costs, and where it changes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOWER, ask, collate
from encoder import shows
from test_native_resolution import CONFIG as NAFLEX
from test_vision import CONVOLUTIONAL, HF, OPEN_CLIP, clip, hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavi.batch import Layout
from lavi.checkpoints.feature_cache import fingerprint
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import from_pretrained, save_pretrained
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.vision.base import VisionBackbone
from lavi.vision.frame_merging import FrameMerging
from lavi.vision.hf import HFVision
from lavi.vision.naflex import NaFlexVision
from lavi.vision.reduced import REFUSED, BlockOutput, ReducedTower, TokenReduction
from lavi.vision.repeated_patches import RepeatedPatches, first_of_run
from lavi.vision.token_merging import TokenMerging, match
from lavi.vision.token_set import Merge, TokenSet

MERGEABLE = [name for name in HF if name not in CONVOLUTIONAL and name not in REFUSED]
PLACED_BY_ROTATION = {"dinov3_vit"}
"""Their places cannot be taken away: the rotations have no weights."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def reduced(name: str, *reductions: TokenReduction, **settings: Any) -> ReducedTower:
    return ReducedTower(tower=hf(name, **settings), reductions=list(reductions)).eval()


def without_places(vision: HFVision) -> HFVision:
    """The same tower, to which all patches are the same wherever they stand."""
    with torch.no_grad():
        for name, parameter in vision.tower.named_parameters():
            if "position_embed" in name or "pos_embed" in name:
                parameter.zero_()
    return vision


def pixels_of(vision: VisionBackbone, views: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(views, *vision.pixel_shape, generator=torch.Generator().manual_seed(seed))


def drawing(cells: list[list[int]], patch: int = 8) -> Tensor:
    """(C, H, W): a grid of patches; cells with one number are one patch."""
    kinds = torch.randn(10, 3, patch, patch, generator=torch.Generator().manual_seed(3))
    rows = [torch.cat([kinds[cell] for cell in row], dim=2) for row in cells]
    return torch.cat(rows, dim=1)


FOURS = [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
PAIRS = [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5], [6, 6, 7, 7]]
RUNS = [[0, 0, 0, 1], [0, 0, 2, 1], [1, 0, 2, 4], [3, 3, 3, 4]]
"""The 1 at the left repeats none: what stands before it in the list is the end of another row. Six patches are left."""


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGEABLE)
@torch.no_grad()
def test_without_reductions_a_tower_is_itself(name: str) -> None:
    vision = hf(name, layer=[-1, 1])
    features, pixels = vision(pixels_of(vision)), pixels_of(vision)
    assert torch.equal(reduced(name, layer=[-1, 1])(pixels), features)
    nothing = reduced(name, FrameMerging(keep=0.5), layer=[-1, 1])  # no video
    torch.testing.assert_close(nothing(pixels), features, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MERGEABLE if name not in PLACED_BY_ROTATION])
@pytest.mark.parametrize(
    "reduction", [TokenMerging(per_block=8), RepeatedPatches()], ids=lambda one: type(one).__name__
)
def test_merging_what_is_the_same_changes_nothing(name: str, reduction: TokenReduction) -> None:
    """Neither features nor gradients: a token that stands for two weighs as much as two."""
    whole = without_places(hf(name, layer=[-1, 2]))
    fewer = reduced(name, reduction, layer=[-1, 2])
    fewer.tower = without_places(fewer.tower)
    pixels = torch.stack([drawing(FOURS), drawing(FOURS[::-1])])
    expected = whole(pixels)
    features = fewer(pixels)
    assert fewer.sizes[-1] == (4 + whole.standing_before,) * 2
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)
    for features_of in (expected, features):
        (features_of * torch.linspace(-1, 1, features_of.shape[-1])).square().mean().backward()
    own, others = dict(fewer.tower.named_parameters()), dict(whole.named_parameters())
    for key, parameter in others.items():
        assert (parameter.grad is None) == (own[key].grad is None)
        if parameter.grad is not None:
            grads = [own[key].grad, parameter.grad]
            if "pos" in key:  # the place of a repeated patch gets the gradient of all
                grads = [grad.flatten(0, -2).sum(0) for grad in grads]
            torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_frames_that_are_the_same_become_one_and_features_stay() -> None:
    vision = hf("siglip_vision_model")
    scenes, image = pixels_of(vision, 3), pixels_of(vision, 1, seed=2)
    video = scenes[[0, 0, 0, 1, 2, 2]]
    fewer = reduced("siglip_vision_model", FrameMerging(keep=0.5, behind=0))
    features = fewer(torch.cat([image, video, image]), [Layout(), Layout(views=6, video=True), Layout()])
    assert [len(counts) for counts in fewer.sizes] == [8, 5, 5]
    expected = vision(torch.cat([image, video, image]))
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_video_is_cut_where_its_frames_are_least_alike() -> None:
    """And a segment is the mean of its frames behind the block: as if the next block read that."""
    vision = hf("siglip_vision_model")
    still, other = pixels_of(vision, 2)
    frames = torch.stack([still, still + 0.01 * other, other, other + 0.01 * still, other + 0.02 * still])
    fewer = reduced("siglip_vision_model", FrameMerging(keep=0.4, behind=1))
    features = fewer(frames, [Layout(views=5, video=True)])
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[2], features[4])
    assert not torch.allclose(features[1], features[2], atol=1e-3)
    hidden = vision.tower(frames, output_hidden_states=True).hidden_states[2]
    last = next(m for m in vision.tower.modules() if isinstance(m, nn.ModuleList))[2]
    expected = last(torch.stack([hidden[:2].mean(0), hidden[2:].mean(0)]), None)
    torch.testing.assert_close(features[[0, 2]], expected, atol=1e-5, rtol=1e-4)


# --- what is merged ---------------------------------------------------------------------------------------------------


def pairs_by_hand(keys: Tensor, count: int, prefix: int, merged: int) -> dict[int, int]:
    """The pairs of one sequence, token by token."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    places = list(range(prefix, count))
    firsts, seconds = places[::2], places[1::2]
    best = {a: max(seconds, key=lambda b: float(unit[a] @ unit[b])) for a in firsts}
    ranked = sorted(firsts, key=lambda a: -float(unit[a] @ unit[best[a]]))
    return {a: best[a] for a in ranked[:merged]}


@pytest.mark.parametrize("prefix", [0, 1])
def test_pairs_are_those_that_are_found_one_by_one(prefix: int) -> None:
    """Whatever padding the sequences have."""
    counts = (11, 7, 9)
    keys = torch.randn(3, 11, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(11) < torch.tensor(counts)[:, None]
    tokens = TokenSet.whole(3, 11, prefix=prefix, device=torch.device("cpu"), valid=valid)
    target, stays = match(keys, tokens, [3, 3, 2])
    for row, (count, merged) in enumerate(zip(counts, [3, 3, 2], strict=True)):
        pairs = pairs_by_hand(keys[row], count, prefix, merged)
        assert [int(target[row, at]) for at in range(count)] == [pairs.get(at, at) for at in range(count)]
        assert stays[row].nonzero()[:, 0].tolist() == [at for at in range(count) if at not in pairs]


def test_a_token_set_is_a_weighted_mean_and_knows_its_sources() -> None:
    """Merged twice: all of the tower's tokens find what stands for them, and what that is the mean of."""
    generator = torch.Generator().manual_seed(0)
    tower = torch.randn(2, 9, 5, generator=generator)
    tokens, values = TokenSet.whole(2, 9, prefix=1, device=torch.device("cpu")), tower
    for merged in ([3, 4], [2, 1]):
        target, stays = match(torch.randn(*values.shape, generator=generator), tokens, merged)
        counts = [count - r for count, r in zip(tokens.counts, merged, strict=True)]
        merge = Merge.within(target, stays, counts)
        tokens, values = tokens.merged(merge), tokens.values(values, merge)
    assert tokens.counts == (4, 4)
    flat, source = tower.flatten(0, 1), tokens.source
    for token, size in enumerate(tokens.size.flatten().tolist()):
        members = (source == token).nonzero()[:, 0]
        assert len(members) == size
        torch.testing.assert_close(values.flatten(0, 1)[token], flat[members].mean(0))
        assert int(tokens.index.flatten()[token]) in members.tolist()
    written = tokens.write_out(values, 2)
    assert torch.equal(tokens.gather(written), values)
    assert torch.equal(written[:, 0], tower[:, 0])  # the class token


def test_a_patch_leads_back_to_the_first_of_its_run() -> None:
    cells = torch.tensor(RUNS).flatten()[None, :, None].float()
    first = first_of_run(cells, torch.tensor([[4]]), 0.0)[0]
    by_hand = list(range(16))
    for at in range(16):
        row, column = divmod(at, 4)
        for up, left in ((0, 1), (1, 0), (1, 1)):
            if row >= up and column >= left and cells[0, at] == cells[0, at - 4 * up - left]:
                by_hand[at] = by_hand[at - 4 * up - left]
                break
    assert first.tolist() == by_hand
    assert len(set(by_hand)) == 6
    nearly = cells + 0.01 * torch.arange(16)[None, :, None]
    assert len(set(first_of_run(nearly, torch.tensor([[4]]), 0.0)[0].tolist())) == 16
    assert first_of_run(nearly, torch.tensor([[4]]), 0.06)[0].tolist() == by_hand


@dataclass(frozen=True)
class Dropped(TokenReduction):
    """Tokens of the grid that blocks from one on do without; what stood in their place is not looked at."""

    places: tuple[int, ...]

    def merge(self, out: BlockOutput, tokens: TokenSet) -> Merge | None:
        if out.block:
            return None
        own = torch.arange(out.tokens.shape[1]).repeat(len(out.tokens), 1)
        stays = torch.ones_like(own, dtype=torch.bool)
        stays[:, [tokens.prefix + place for place in self.places]] = False
        counts = [int(row.sum()) for row in stays]
        return Merge.within(own, stays, counts)


@pytest.mark.parametrize("name", MERGEABLE)
@torch.no_grad()
def test_tokens_keep_their_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left sees what it would see if the others were masked: with the rotations of its own place."""
    places = (0, 3, 5, 6, 11)
    vision, fewer = hf(name), reduced(name, Dropped(places))
    pixels = pixels_of(vision)
    count = vision.tokens + vision.standing_before - vision.prefix
    seen = torch.ones(2, 1, count, count, dtype=torch.bool)
    seen[..., [vision.standing_before + place for place in places]] = False

    layers = next(m for m in vision.tower.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    masked = {id(module) for layer in layers[1:] for module in layer.modules()}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        assert not module.training
        return sdpa_attention_forward(
            module, query, key, value, seen if id(module) in masked else mask, *args, **kwargs
        )

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "masked", attend)
    left = [at for at in range(16) if at not in places]
    expected = fewer(pixels)[:, left]
    vision.tower.config._attn_implementation = "masked"
    torch.testing.assert_close(expected, vision(pixels)[:, left], atol=1e-5, rtol=1e-4)


# --- batches, costs, and the way through the library ------------------------------------------------------------------

REDUCTIONS: dict[str, list[TokenReduction]] = {
    "merging": [TokenMerging(per_block=3)],
    "patches": [RepeatedPatches()],
    "all": [RepeatedPatches(tolerance=0.1), TokenMerging(per_block=4, schedule="decreasing")],
}


@pytest.mark.parametrize("reductions", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("name", ["siglip_vision_model", "dinov3_vit"])
@torch.no_grad()
def test_a_view_is_what_it_is_alone(name: str, reductions: list[TokenReduction]) -> None:
    fewer = reduced(name, *reductions)
    drawn = [drawing(cells) for cells in (PAIRS, RUNS, [[1] * 4] * 4)]
    pixels = torch.stack([*drawn, *pixels_of(fewer)])
    together = fewer(pixels)
    assert fewer.sizes[-1] != fewer.sizes[0] or len(set(fewer.sizes[0])) > 1
    for view in range(len(pixels)):
        torch.testing.assert_close(fewer(pixels[view : view + 1])[0], together[view], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", REDUCTIONS)
@torch.no_grad()
def test_at_native_resolution_too(name: str) -> None:
    torch.manual_seed(0)
    fewer = ReducedTower(tower=NaFlexVision(config=NAFLEX), reductions=REDUCTIONS[name]).eval()
    grids = [(2, 7), (4, 4), (3, 3)]
    pixels = torch.randn(3, *fewer.pixel_shape, generator=torch.Generator().manual_seed(1))
    pixels[0, 0, 8:12] = pixels[0, 0, 8:9]  # patches that repeat each other
    for view, (rows, columns) in enumerate(grids):
        pixels[view, 0, rows * columns :] = 0
    layouts = [Layout(grid=grid) for grid in grids]
    together = fewer(pixels, layouts)
    for view, (layout, (rows, columns)) in enumerate(zip(layouts, grids, strict=True)):
        assert not together[view, rows * columns :].any()
        alone = fewer(pixels[view : view + 1], [layout])
        kept = {"merging": rows * columns - 6, "patches": rows * columns - 3 * (view == 0)}.get(name, 99)
        assert fewer.sizes[-1][0] == kept or (name == "all" and fewer.sizes[-1][0] < rows * columns)
        torch.testing.assert_close(alone[0], together[view], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
def test_both_counters_agree_on_what_fewer_tokens_cost(schedule: Any) -> None:
    merging = TokenMerging(per_block=3, schedule=schedule, start=1)
    fewer = reduced("clip_vision_model", FrameMerging(keep=0.25, behind=0), merging)
    video = Layout(views=4, video=True)
    for layouts in ([Layout()], [video]):
        views = layouts[0].views
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fewer(torch.zeros(views, *fewer.pixel_shape), layouts)
        assert fewer.flops(views, layouts[0]) == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert fewer.flops(views, layouts[0]) < hf("clip_vision_model").flops(views)
    assert fewer.flops(8) == 8 * fewer.flops(1)


def test_frames_are_compared_before_tokens_are_merged() -> None:
    fewer = reduced("siglip_vision_model", TokenMerging(per_block=3), FrameMerging(keep=0.5, behind=1))
    with pytest.raises(UserError, match="name it before TokenMerging"):
        fewer(pixels_of(fewer), [Layout(views=2, video=True)])


@torch.no_grad()
def test_an_image_beside_a_video_is_what_it_is_alone() -> None:
    """Both kinds of merging behind one block: none of the frames keeps tokens from being merged, here or elsewhere."""
    reductions = [FrameMerging(keep=0.5, behind=0), TokenMerging(per_block=3, start=0)]
    fewer = reduced("siglip_vision_model", *reductions)
    pixels, layouts = pixels_of(fewer, 5), [Layout(), Layout(views=3, video=True), Layout()]
    together = fewer(pixels, layouts)
    assert fewer.sizes == [(16,) * 5, (13,) * 4, (10,) * 4]
    torch.testing.assert_close(fewer(pixels[:1], layouts[:1]), together[:1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fewer(pixels[1:4], layouts[1:2]), together[1:4], atol=1e-5, rtol=1e-4)
    torch.manual_seed(0)
    native = ReducedTower(tower=NaFlexVision(config=NAFLEX), reductions=reductions).eval()
    layouts = [Layout(grid=(3, 3)), Layout(views=3, video=True, grid=(4, 3)), Layout(grid=(2, 7))]
    pixels = torch.randn(5, *native.pixel_shape, generator=torch.Generator().manual_seed(1))
    for view, count in enumerate((9, 12, 12, 12, 14)):
        pixels[view, 0, count:] = 0
    together = native(pixels, layouts)
    assert native.sizes[1] == (6, 9, 9, 11)
    torch.testing.assert_close(native(pixels[1:4], layouts[1:2])[:, :12], together[1:4, :12], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_same_pairs_are_merged_in_any_precision() -> None:
    """Of keys that half precision cannot tell apart: 255 and 256 of a turn."""
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.05], [1.0, 0.0], [1.0, 0.04], [1.0, 0.0], [1.0, 0.001]]])
    tokens = TokenSet.whole(1, 6, prefix=0, device=torch.device("cpu"))
    out = BlockOutput(0, 3, torch.randn(1, 6, 4), keys, None, [(2, 3)], [])
    merge = TokenMerging(per_block=1).merge(out, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        in_half = TokenMerging(per_block=1).merge(out, tokens)
    assert torch.equal(merge.target, in_half.target)
    assert merge.target[0].tolist() == [5, 1, 2, 3, 4, 5]


@torch.no_grad()
def test_a_tower_in_half_precision_runs() -> None:
    fewer = reduced("siglip_vision_model", FrameMerging(keep=0.5, behind=0), TokenMerging(per_block=3)).to(
        torch.bfloat16
    )
    features = fewer(pixels_of(fewer, 2).to(torch.bfloat16), [Layout(views=2, video=True)])
    assert features.dtype == torch.bfloat16
    assert bool(features.isfinite().all())


@torch.no_grad()
def test_a_copy_is_a_tower_of_its_own() -> None:
    fewer = reduced("siglip_vision_model", TokenMerging(per_block=3))
    again = copy.deepcopy(fewer)
    pixels = pixels_of(fewer)
    assert torch.equal(again(pixels), fewer(pixels))
    again.reductions.clear()
    assert torch.equal(again(pixels), hf("siglip_vision_model")(pixels))


def test_what_would_go_wrong_unseen_is_refused() -> None:
    vision = hf("siglip_vision_model")
    fewer = ReducedTower(tower=vision, reductions=[TokenMerging(per_block=3)])
    with pytest.raises(UserError, match="in a ReducedTower already"):
        ReducedTower(tower=vision, reductions=[RepeatedPatches()])
    vision.tower.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="cannot recompute its blocks"):
        fewer.train()(pixels_of(fewer))
    assert fewer.eval()(pixels_of(fewer)).isfinite().all()


@torch.no_grad()
def test_a_repeated_patch_goes_on_as_the_first_of_its_run() -> None:
    """With its own place, not with the mean of all places."""
    vision, fewer = hf("siglip_vision_model"), reduced("siglip_vision_model", RepeatedPatches())
    seen: list[Tensor] = []
    blocks = next(m for m in fewer.tower.tower.modules() if isinstance(m, nn.ModuleList))
    blocks[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    fewer(drawing([[4] * 4] * 4)[None])
    embedded = vision.tower(drawing([[4] * 4] * 4)[None], output_hidden_states=True).hidden_states[0]
    assert torch.equal(seen[0], embedded[:, :1])


def test_tokens_fall_by_the_schedule_of_the_paper() -> None:
    """ToMe: r a block; decreasing, 2 r behind the first and none behind the last, as many in all but for rounding."""
    constant, decreasing = TokenMerging(per_block=13), TokenMerging(per_block=13, schedule="decreasing")
    assert [constant.tokens_lost(block, 12) for block in range(12)] == [13] * 12
    assert [TokenMerging(per_block=[9, 0, 4], start=2).tokens_lost(block, 12) for block in range(2, 7)] == [
        9,
        0,
        4,
        0,
        0,
    ]
    assert [decreasing.tokens_lost(block, 12) for block in range(12)] == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]


def test_what_it_costs_is_what_the_paper_says() -> None:
    """DeiT-S at 224 pixels: 4.6 GFLOPs whole and 2.7 with r = 13 (ToMe, table 4; multiply-adds), where tokens are
    merged before the feed-forward part of a block; between blocks the feed-forward part reads 13 more."""
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    with torch.device("meta"):
        vision = HFVision(config={"model_type": "deit", **shape, "image_size": 224, "patch_size": 16})
        whole = vision.flops(1) / 2
        fewer = ReducedTower(tower=vision, reductions=[TokenMerging(per_block=13)]).flops(1) / 2
    assert whole == pytest.approx(4.6e9, rel=0.01)
    behind_attention = fewer - 12 * 13 * 2 * 384 * 1536
    assert behind_attention == pytest.approx(2.7e9, rel=0.03)


@pytest.mark.parametrize("name", [*sorted(REFUSED), "dinov3_convnext"])
def test_towers_whose_blocks_need_all_tokens_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be merged|takes a vision transformer"):
        reduced(name, TokenMerging(per_block=1))


def test_a_tower_of_another_library_is_refused() -> None:
    with pytest.raises(UserError, match=r"takes a vision transformer of lavi\.vision\.hf"):
        ReducedTower(tower=clip(next(iter(OPEN_CLIP))), reductions=[TokenMerging(per_block=1)])


MERGED = {
    "_target_": "lavi.vision.reduced.ReducedTower",
    "tower": {"_target_": "lavi.vision.hf.HFVision", "config": TOWER | {"num_hidden_layers": 3}},
    "reductions": [{"_target_": "lavi.vision.token_merging.TokenMerging", "per_block": [5, 2]}],
}


def recipe_with(tiny_recipe: Path, **changes: Any) -> Recipe:
    settings = Recipe.load(tiny_recipe).settings
    settings["model"]["vision"] = MERGED | changes
    return Recipe(settings, source="here")


@torch.no_grad()
def test_a_recipe_names_reductions_and_an_exported_model_keeps_them(tiny_recipe: Path, tmp_path: Path) -> None:
    model: VisionLanguageModel = build_model(recipe_with(tiny_recipe)).eval()
    save_pretrained(model, tmp_path / "exported")
    again = from_pretrained(tmp_path / "exported")
    batch = collate(model, [ask(1, "what?"), ask(2, 3, "what?")], prompt=True)
    assert torch.equal(again.features(batch.pixels, batch.layouts), model.features(batch.pixels, batch.layouts))
    assert again.vision.sizes == [(16,) * 3, (11,) * 3, (9,) * 3]
    assert again.answer(batch, max_new_tokens=3) == model.answer(batch, max_new_tokens=3)


def test_a_key_that_a_reduction_does_not_have_is_refused(tiny_recipe: Path) -> None:
    wrong = [{"_target_": "lavi.vision.token_merging.TokenMerging", "per_blok": 2}]
    with pytest.raises(UserError, match=r"did you mean 'per_block'\?"):
        recipe_with(tiny_recipe, reductions=wrong).check()


def test_features_of_another_reduction_are_other_features(tiny_recipe: Path) -> None:
    """Also of one that happens to change little of the picture that is compared."""
    model, other = build_model(recipe_with(tiny_recipe)), build_model(recipe_with(tiny_recipe, reductions=[]))
    assert "other reductions" in str(fingerprint(model).difference(fingerprint(other)))
    assert fingerprint(other).weights == fingerprint(build_model(recipe_with(tiny_recipe, reductions=[]))).weights


@pytest.mark.parametrize(
    ("fewer", "faster", "verdict"), [(3.0, 2.1, "yes"), (3.0, 1.9, "in part"), (3.0, 1.0, "no"), (0.99, 1.05, "-")]
)
def test_a_saving_shows_on_the_clock_by_half_at_least(fewer: float, faster: float, verdict: str) -> None:
    assert shows(fewer, faster) == verdict


def test_a_reduction_that_is_never_asked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    ReducedTower(tower=hf("vit"), reductions=[TokenMerging(per_block=2)])
    assert "it reduces nothing" not in caplog.text
    ReducedTower(tower=hf("vit"), reductions=[TokenMerging(per_block=2, start=40)])
    assert "TokenMerging starts behind block 40 (from 0), and the tower has" in caplog.text

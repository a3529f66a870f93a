"""Tiles that are encoded on request: which, what stands for the others, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOWER, ask, collate
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lavi.batch import Layout, Sample
from lavi.checkpoints.model_folder import build as build_model
from lavi.checkpoints.model_folder import from_pretrained, save_pretrained
from lavi.checkpoints.trained_weights import TRAINED
from lavi.data.preprocessing import SquareResize
from lavi.data.tiling import AnyRes, OneView
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.reduction.visionzip import VisionZip
from lavi.training.tile_dropout import TileDropout
from lavi.vision.base import VisionBackbone
from lavi.vision.frame_merging import FrameMerging
from lavi.vision.hf import HFVision
from lavi.vision.reduced import ReducedTower
from lavi.vision.tiles_on_request import Detail, RandomTiles, RankingInput, TileRanking, TilesOnRequest

SIDE = 32
TWO_BY_TWO = Layout(views=5, tiles=(2, 2), size=(64, 64))
WIDE, SINGLE = Layout(views=4, tiles=(1, 3), size=(30, 90)), Layout(views=2, tiles=(1, 1), size=(20, 30))
VIDEO = Layout(views=3, video=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Places(VisionBackbone):
    """Features are the mean pixel of each cell, and how many views were encoded is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.grid = 3, (4, 4)
        self.preprocessing = SquareResize(SIDE)
        self.encoded = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        cells = torch.nn.functional.avg_pool2d(pixels, SIDE // 4)
        return cells.flatten(2).transpose(1, 2)


def ramp(*, top: float, left: float, extent: float) -> Tensor:
    """(3, H, W): each pixel's place in the image, across and down, and 0."""
    at = (torch.arange(SIDE) + 0.5) / SIDE * extent
    across, down = (left + at).expand(SIDE, SIDE), (top + at)[:, None].expand(SIDE, SIDE)
    return torch.stack([across, down, torch.zeros(SIDE, SIDE)])


def tiled_ramp() -> Tensor:
    tiles = [ramp(top=top, left=left, extent=0.5) for top in (0.0, 0.5) for left in (0.0, 0.5)]
    return torch.stack([ramp(top=0.0, left=0.0, extent=1.0), *tiles])


class InOrder(TileRanking):
    """The last tiles first."""

    def rank(self, given: RankingInput) -> Tensor:
        return torch.arange(float(len(given.tiles)))


def test_what_is_not_encoded_is_what_the_overview_shows_there() -> None:
    """Of places that are their own features, interpolation gives the places again, but at the border of the image."""
    vision = TilesOnRequest(tower=Places(), keep=0.25, ranking=InOrder())
    pixels = tiled_ramp()
    features, whole = vision(pixels, [TWO_BY_TWO]), Places()(pixels)
    assert vision.tower.encoded == 2
    assert torch.equal(features[[0, 4]], whole[[0, 4]])  # the overview, and the tile that was chosen
    inside = whole.clamp(1 / 8, 7 / 8)  # nothing is known beyond the middles of the overview's outer cells
    torch.testing.assert_close(features[1:4, :, :2], inside[1:4, :, :2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "tiles"), [((30, 90), (1, 3)), ((100, 60), (4, 2)), ((64, 64), (2, 2)), ((40, 50), (2, 2))]
)
def test_tiles_of_letterboxed_images_are_where_they_are(size: tuple[int, int], tiles: tuple[int, int]) -> None:
    """A picture whose colours are its places, cut as images are: what stands in for a tile is near what it shows."""
    height, width = size
    down, across = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    picture = Image.fromarray((255 * torch.stack([across, down, 0 * down], dim=-1)).byte().numpy())
    vision = TilesOnRequest(tower=Places(), keep=0.01, ranking=InOrder())
    pixels, layout = AnyRes().views(picture, vision.preprocessing)
    assert layout.tiles == tiles
    features, whole = vision(pixels, [layout])[1:-1, :, :2], Places()(pixels)[1:-1, :, :2]
    background = vision.preprocessing(Image.new("RGB", (8, 8)))[:2, 0, 0]
    shown = ((whole - background).abs() > 0.15).all(-1)  # cells that are of the picture, not of its frame
    difference = (features - whole).abs()[shown]
    assert len(difference) > 8
    assert float(difference.quantile(0.9)) < 0.3  # of -1 to 1
    assert float(difference.mean()) < 0.1


@torch.no_grad()
def test_a_tower_in_half_precision_runs() -> None:
    vision = TilesOnRequest(tower=HFVision(config=TOWER), keep=0.25).to(torch.bfloat16).eval()
    features = vision(torch.randn(5, *vision.pixel_shape).to(torch.bfloat16), [TWO_BY_TWO])
    assert features.dtype == torch.bfloat16


def test_tiles_with_detail_are_encoded_first() -> None:
    vision = TilesOnRequest(tower=Places(), keep=0.5)
    pixels = torch.zeros(5, 3, SIDE, SIDE)
    noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    # More at the top right than at the left below.
    pixels[0, :, : SIDE // 2, SIDE // 2 :] = 1.5 * noise[:, : SIDE // 2, : SIDE // 2]
    pixels[0, :, SIDE // 2 :, : SIDE // 2] = noise[:, SIDE // 2 :, SIDE // 2 :]
    pixels[1:] = torch.arange(1.0, 5.0)[:, None, None, None]
    features = vision(pixels, [TWO_BY_TWO])
    assert [bool((features[view] == view).all()) for view in range(1, 5)] == [False, True, True, False]


def test_all_of_them_kept_the_tower_is_itself() -> None:
    tower = HFVision(config=TOWER).eval()
    vision = TilesOnRequest(tower=tower, keep=1.0)
    pixels = torch.randn(6, *tower.pixel_shape)
    with torch.no_grad():
        torch.testing.assert_close(vision(pixels, [TWO_BY_TWO, Layout()]), tower(pixels), atol=1e-6, rtol=1e-5)
    assert vision.flops(5, TWO_BY_TWO) == tower.flops(5)


def test_an_image_is_what_it_is_alone() -> None:
    """Beside others with more tiles, none, or frames; with a ranking by chance, too."""
    layouts = [Layout(), TWO_BY_TWO, VIDEO, WIDE, SINGLE]
    merging = ReducedTower(tower=HFVision(config=TOWER), reductions=[FrameMerging(keep=0.5, behind=0)])
    for tower in (HFVision(config=TOWER), merging):
        for ranking in (None, RandomTiles()):
            vision = TilesOnRequest(tower=tower, keep=0.3, ranking=ranking).eval()
            pixels = torch.randn(15, *vision.pixel_shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                together = vision(pixels, layouts).split([layout.views for layout in layouts])
                parts = zip(pixels.split([layout.views for layout in layouts]), layouts, together, strict=True)
                for own, layout, features in parts:
                    torch.testing.assert_close(vision(own, [layout]), features, atol=1e-5, rtol=1e-4)
            assert torch.equal(vision(pixels[:2])[0], vision(pixels[:1])[0])


def test_both_counters_agree_on_the_tiles_that_are_encoded() -> None:
    tower = HFVision(config=TOWER)
    vision = TilesOnRequest(tower=tower, keep=0.5)
    for layout, encoded in ((TWO_BY_TWO, 3), (WIDE, 3), (SINGLE, 1), (Layout(), 1), (VIDEO, 3)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vision(torch.randn(layout.views, *vision.pixel_shape), [layout])
        assert vision.flops(layout.views, layout) == tower.flops(encoded)
        assert counter.get_total_flops() == pytest.approx(tower.flops(encoded), rel=0.01)


def test_features_reach_the_overview_when_the_tower_trains() -> None:
    tower = HFVision(config=TOWER)
    vision = TilesOnRequest(tower=tower, keep=0.25)
    pixels = torch.randn(5, *vision.pixel_shape).requires_grad_()
    vision(pixels, [TWO_BY_TWO])[1:].square().sum().backward()
    reached = pixels.grad.abs().amax((1, 2, 3)) > 0
    assert bool(reached[0])
    assert int(reached[1:].sum()) == 1


@pytest.mark.parametrize("fusion", ["lavi.fusion.concat.ConcatFusion", "lavi.fusion.lavi.LaViFusion"])
def test_it_goes_with_tiles_of_a_model_and_is_exported(tiny_recipe: Path, tmp_path: Path, fusion: str) -> None:
    settings: dict[str, Any] = Recipe.load(tiny_recipe).settings
    tower = {"_target_": "lavi.vision.hf.HFVision", "config": TOWER}
    settings["model"] |= {
        "vision": {"_target_": "lavi.vision.tiles_on_request.TilesOnRequest", "tower": tower, "keep": 0.5},
        "fusion": {"_target_": fusion},
        "tiling": {"_target_": "lavi.data.tiling.AnyRes"},
    }
    model: VisionLanguageModel = build_model(Recipe(settings, source="here")).eval()
    assert isinstance(model.tiling, AnyRes)
    one = ask(1, "what?")
    pictures = [Sample("s", one.messages, [Image.new("RGB", size, "red")]) for size in ((64, 64), (90, 30))]
    batch = collate(model, pictures, prompt=True)
    assert [layout.views for layout in batch.layouts] == [5, 4]
    save_pretrained(model, tmp_path / "exported")
    again = from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(again.features(batch.pixels, batch.layouts), model.features(batch.pixels, batch.layouts))
    assert again.answer(batch, max_new_tokens=3) == model.answer(batch, max_new_tokens=3)


def test_backbones_of_no_one_grid_are_refused() -> None:
    tower = Places()
    tower.native_resolution = True
    with pytest.raises(UserError, match="a backbone of one grid"):
        TilesOnRequest(tower=tower, keep=0.5)


@torch.no_grad()
def test_a_backbone_in_a_backbone_in_a_backbone_is_exported(tiny_recipe: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = Recipe.load(tiny_recipe).settings
    tower = {"_target_": "lavi.vision.hf.HFVision", "config": TOWER}
    merging = {"_target_": "lavi.vision.frame_merging.FrameMerging", "keep": 0.5, "behind": 0}
    reduced = {"_target_": "lavi.vision.reduced.ReducedTower", "tower": tower, "reductions": [merging]}
    pair = {"_target_": "lavi.vision.pair.TwoTowers", "first": tower, "second": tower}
    for number, within in enumerate((reduced, pair)):
        vision = {"_target_": "lavi.vision.tiles_on_request.TilesOnRequest", "tower": within, "keep": 0.5}
        settings["model"]["vision"] = vision
        model: VisionLanguageModel = build_model(Recipe(settings, source="here")).eval()
        save_pretrained(model, tmp_path / str(number))
        again = from_pretrained(tmp_path / str(number))
        pixels = torch.randn(3, *model.vision.pixel_shape)
        layouts = [VIDEO]
        assert torch.equal(again.features(pixels, layouts), model.features(pixels, layouts))


# --- training on fewer tiles ------------------------------------------------------------------------------------------


class Kept(TileRanking):
    """These tiles first."""

    def __init__(self, tiles: list[int]) -> None:
        self.tiles = tiles

    def rank(self, given: RankingInput) -> Tensor:
        return torch.zeros(len(given.tiles)).index_fill(0, torch.tensor(self.tiles, dtype=torch.long), 1.0)


def dropout(share: float, vision: VisionBackbone, **parts: Any) -> TileDropout:
    about: Any = SimpleNamespace(**{"vision": vision, "reducer": None, "tiling": AnyRes()} | parts)
    return TileDropout(share, about)


@torch.no_grad()
def test_what_stands_for_a_tile_in_training_is_what_stands_for_it_on_request() -> None:
    """Of a picture any number of tiles goes, each of them at some time; frames and pictures of one view stay."""
    tower = Places()
    pixels, layouts = torch.randn(13, 3, SIDE, SIDE), [TWO_BY_TWO, Layout(), WIDE, VIDEO]
    features, drop = tower(pixels), dropout(1.0, tower).dropped
    met = set()
    for seed in range(60):
        torch.manual_seed(seed)
        seen = drop(features, layouts)
        stays = (seen == features).flatten(1).all(1).tolist()
        assert stays[0]
        assert all(stays[5:7] + stays[10:])
        kept = [number for number in range(4) if stays[1 + number]]
        met.add(tuple(kept))
        if kept:
            on_request = TilesOnRequest(tower=tower, keep=len(kept) / 4, ranking=Kept(kept))
            assert torch.equal(seen[:5], on_request(pixels[:5], [TWO_BY_TWO]))
    assert {len(kept) for kept in met} == {0, 1, 2, 3}
    assert {tile for kept in met for tile in kept} == {0, 1, 2, 3}
    assert drop(features[:0], []).shape == (0, *features.shape[1:])


def test_a_tower_that_trains_gets_the_gradient_at_the_overview() -> None:
    """With a class token before the grid, which is the overview's own for each tile."""
    config = TOWER | {"model_type": "clip_vision_model"}
    tower = HFVision(config=config, class_token=True).train()
    pixels = torch.randn(5, *tower.pixel_shape).requires_grad_()
    torch.manual_seed(6)
    features = dropout(1.0, tower).dropped(tower(pixels), [TWO_BY_TWO])
    lost = [bool(torch.equal(view[0], features[0][0])) for view in features[1:]]
    assert 0 < sum(lost) < 4
    features[1:].square().sum().backward()
    reached = (pixels.grad.abs().amax((1, 2, 3)) > 0).tolist()
    assert reached == [True, *(not gone for gone in lost)]


def test_its_share_of_the_pictures_loses_tiles() -> None:
    features, drop = torch.randn(5, 16, 3), dropout(0.3, Places()).dropped
    torch.manual_seed(0)
    lost = sum(not torch.equal(drop(features, [TWO_BY_TWO]), features) for _ in range(1000))
    assert 250 < lost < 350


@pytest.mark.parametrize("reads", ["one grid", "features alone", "not cut into any"])
def test_models_whose_tiles_cannot_be_dropped_are_refused(reads: str) -> None:
    tower = Places()
    tower.native_resolution = reads == "one grid"
    parts = {
        "one grid": {},
        "features alone": {"reducer": VisionZip(dominant=4, contextual=2)},
        "not cut into any": {"tiling": OneView()},
    }
    with pytest.raises(UserError, match=reads):
        dropout(0.5, tower, **parts[reads])


def test_a_run_trains_on_fewer_tiles_and_is_scored_as_it_is_asked_to_be(
    run: Any, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From cached features it learns what it learns from pixels."""
    whole: list[bool] = []
    read = VisionLanguageModel.backbone_features_of

    def looking(self: VisionLanguageModel, batch: Any) -> Tensor:
        if batch.backbone_features is not None and len(batch.pixels):  # what was dropped, beside the pixels it is of
            whole.append(torch.equal(batch.backbone_features, self.encode(batch.pixels, batch.layouts)))
        return read(self, batch)

    monkeypatch.setattr(VisionLanguageModel, "backbone_features_of", looking)
    tiled = ["model.tiling={_target_: lavi.data.tiling.AnyRes, max_grid: 2}", "module.tile_dropout=1.0"]
    fit = ("lavi.fit", "--recipe", tiny_recipe)
    assert run(*fit, "--run", "whole", *tiled)[0] == 0
    assert whole == [False] * 6  # the steps of training, and none of validation
    assert run("lavi.evaluate", "--checkpoint", "whole", "--limit", 4, "model.tiling=null")[0] == 0
    assert run("lavi.cache_features", *fit[1:], "--out", "features", "--dtype", "float32", *tiled[:1])[0] == 0
    status, _, problems = run(*fit, "--run", "cached", *tiled, "data.train=features/train")
    assert status == 0, problems
    weights = {name: load_file(Path(name) / TRAINED) for name in ("whole", "cached")}
    for name, weight in weights["whole"].items():
        torch.testing.assert_close(weights["cached"][name], weight, atol=1e-6, rtol=1e-5)


def test_rankings_with_other_arguments_are_other_backbones() -> None:
    @dataclass
    class Edge(Detail):
        sigma: float

    one, other = (TilesOnRequest(tower=HFVision(config=TOWER), keep=0.5, ranking=Edge(s)).variant for s in (1.0, 3.0))
    assert one != other

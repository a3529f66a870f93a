"""Two towers side by side: what each computes alone of its own pixels, joined, counted, saved and refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QWEN2, ask, awaken, collate, small
from PIL import Image
from torch import nn

from lavi.checkpoints.model_folder import build, from_pretrained, save_pretrained
from lavi.config.text import TARGET
from lavi.data.tiling import AnyRes
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.reduction.pooling import AveragePooling
from lavi.vision.hf import HFVision
from lavi.vision.naflex import NaFlexVision
from lavi.vision.pair import TwoTowers
from lavi.vision.timm import TimmVision

PLAIN = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CLIP = PLAIN | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
FINER = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
FINER |= {"image_size": 48, "patch_size": 6}
COARSER = PLAIN | {"model_type": "vit", "image_size": 32, "patch_size": 16}


def two(second: dict[str, Any] = FINER, **settings: Any) -> TwoTowers:
    torch.manual_seed(0)
    towers = [HFVision(config=config) for config in (CLIP, second)]
    return TwoTowers(first=towers[0], second=towers[1], **settings).eval()


def noise(width: int = 70, height: int = 50) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def alone(vision: TwoTowers, image: Image.Image) -> list[torch.Tensor]:
    """(1, N, D) of each tower behind its own preprocessing."""
    return [tower(tower.preprocessing(image)[None]) for tower in (vision.first, vision.second)]


@pytest.mark.parametrize("second", [FINER, COARSER], ids=["finer", "coarser"])
@torch.no_grad()
def test_channels_stand_side_by_side_on_the_grid_of_the_first(second: dict[str, Any]) -> None:
    vision, image = two(second), noise()
    one, other = alone(vision, image)
    grid = other.transpose(1, 2).unflatten(-1, vision.second.grid)  # (1, D, rows, columns)
    if second is FINER:
        grid = nn.functional.avg_pool2d(grid, 2)
    else:
        grid = nn.functional.interpolate(grid, vision.first.grid, mode="bilinear")
    features = vision(vision.preprocessing(image)[None])
    assert features.shape == (1, 16, vision.width) == (1, 16, vision.first.width + vision.second.width)
    torch.testing.assert_close(features, torch.cat([one, grid.flatten(2).transpose(1, 2)], dim=-1))


@torch.no_grad()
def test_tokens_stand_one_after_the_other_each_in_channels_of_its_own() -> None:
    vision, image = two(join="tokens"), noise()
    one, other = alone(vision, image)
    features = vision(vision.preprocessing(image)[None])
    assert (vision.tokens, vision.feature_spec.grid) == (16 + 64, None)
    torch.testing.assert_close(features[:, :16, :24], one)
    torch.testing.assert_close(features[:, 16:, 24:], other)
    assert not features[:, :16, 24:].any()
    assert not features[:, 16:, :24].any()


def test_class_tokens_are_joined_if_both_are_kept() -> None:
    clip, vit = (HFVision(config=config, class_token=True).eval() for config in (CLIP, COARSER))
    vision, image = TwoTowers(first=clip, second=vit).eval(), noise()
    with torch.no_grad():
        features = vision(vision.preprocessing(image)[None])
        one, other = alone(vision, image)
    assert (vision.prefix, vision.tokens) == (1, 17)
    torch.testing.assert_close(features[:, :1], torch.cat([one[:, :1], other[:, :1]], dim=-1))
    with pytest.raises(UserError, match="only one of them keeps its class token"):
        TwoTowers(first=clip, second=two().second)


def test_what_two_towers_cost_is_what_both_cost() -> None:
    vision = two()
    assert vision.flops(3) == vision.first.flops(3) + vision.second.flops(3)


@pytest.mark.parametrize("join", ["channels", "tokens"])
@pytest.mark.parametrize("tiling", [None, AnyRes(max_grid=2)], ids=["one view", "tiles"])
@torch.no_grad()
def test_they_work_in_a_model(join: Any, tiling: AnyRes | None, tokenizer: str) -> None:
    for fusion in (ConcatFusion(), LaViFusion(every=2, generator=small())):
        language = LanguageModel(config=QWEN2 | {"max_position_embeddings": 1024}, tokenizer=tokenizer)
        model = VisionLanguageModel(vision=two(join=join), language=language, fusion=fusion, tiling=tiling).eval()
        awaken(model.fusion)
        batch = collate(model, [ask(1, "what colour is it?", answer="red")])
        assert not torch.allclose(model(batch), model(batch.without_images()), atol=1e-3)


def test_they_are_saved_with_a_model(tokenizer: str, tmp_path: Path) -> None:
    towers = {
        "first": {TARGET: "lavi.vision.hf.HFVision", "config": CLIP},
        "second": {TARGET: "lavi.vision.timm.TimmVision", "name": "test_efficientnet", "image_size": 64},
    }
    parts = {
        TARGET: "lavi.model.VisionLanguageModel",
        "vision": {TARGET: "lavi.vision.pair.TwoTowers", **towers},
        "language": {TARGET: "lavi.language.load.LanguageModel", "config": QWEN2, "tokenizer": tokenizer},
        "fusion": {TARGET: "lavi.fusion.concat.ConcatFusion"},
    }
    model = build(Recipe({"model": parts}, {}, "recipe.yaml")).eval()
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model").eval()
    assert isinstance(again.vision.second, TimmVision)
    preprocessing, image = pickle.loads(pickle.dumps(again.vision.preprocessing)), noise()
    pixels = preprocessing(image)[None]
    assert torch.equal(pixels[0], model.vision.preprocessing(image))
    with torch.no_grad():
        assert torch.equal(model.features(pixels), again.features(pixels))


def test_what_two_towers_cannot_do_is_refused(tokenizer: str) -> None:
    language = LanguageModel(config=QWEN2, tokenizer=tokenizer)
    with pytest.raises(UserError, match="lie on none: set"):
        VisionLanguageModel(
            vision=two(join="tokens"), language=language, fusion=ConcatFusion(), reducer=AveragePooling(factor=2)
        )
    with pytest.raises(UserError, match="one of these gives each its own"):
        TwoTowers(first=two().first, second=NaFlexVision(config={"num_hidden_layers": 1}))


def test_backbones_that_see_different_parts_of_an_image_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """CLIP and DINOv2 keep the middle of a wide image; ViT sees all of it."""
    two(FINER)
    two(COARSER, join="tokens")
    assert "different parts of an image" not in caplog.text
    two(COARSER)
    assert "different parts of an image" in caplog.text

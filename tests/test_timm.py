"""Towers of timm: what timm itself computes of the same pixels, cut behind what is used, counted, saved and refused."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import QWEN2, ask, awaken, collate, small
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TimmWrapperConfig, TimmWrapperModel

from lavi.errors import UserError
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.vision.hf import HFVision
from lavi.vision.timm import TimmVision, _size_argument

SIDE = 64
VITS = {
    "test_vit": {},
    "test_vit2": {},  # registers and no class token
    "vit_pe_core_tiny_patch16_384": {"depth": 3},
    "eva02_tiny_patch14_224": {"depth": 3, "patch_size": 16},
}
STAGES = {
    "test_convnext": {},
    "test_efficientnet": {},
    "tf_efficientnet_lite0": {},
    "mobilenetv4_conv_small": {},
    "fastvit_mci0": {"layers": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 128]},
    "test_mambaout": {},  # channels last
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 1, 1, 1], "window_size": 2},
    "levit_128s": {},  # tokens without a prefix, on a grid that shrinks
}
NAMES: dict[str, dict[str, Any]] = VITS | STAGES


def fresh(name: str, **settings: Any) -> TimmVision:
    torch.manual_seed(0)
    return TimmVision(name, model_args=NAMES[name], image_size=SIDE, **settings).eval()


tower = functools.cache(fresh)


@functools.cache
def whole(name: str) -> Any:
    """The same network as timm builds it, with the weights of :func:`tower`."""
    torch.manual_seed(0)
    size = {"img_size": SIDE} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, num_classes=0, **NAMES[name], **size).eval()


def pixels_of(vision: TimmVision, views: int = 2) -> Tensor:
    return torch.randn(views, *vision.pixel_shape, generator=torch.Generator().manual_seed(1))


def run(vision: TimmVision, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vision(pixels)


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def rows(grid: Tensor) -> Tensor:
    """(views, D, rows, columns) to (views, N, D)."""
    return grid.flatten(2).transpose(1, 2)


ROUNDING = {"atol": 1e-4, "rtol": 1e-4}
"""Convolutions round otherwise in the memory format that they are given here."""


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_are_those_of_timm(name: str) -> None:
    vision, network = tower(name), whole(name)
    features = network.forward_features(pixels_of(vision))
    if getattr(network, "output_fmt", None) == "NHWC":
        features = features.permute(0, 3, 1, 2)
    features = rows(features) if features.ndim == 4 else features
    assert vision.tokens == vision.grid[0] * vision.grid[1]
    torch.testing.assert_close(run(vision, pixels_of(vision)), features[:, -vision.tokens :], **ROUNDING)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layers_are_those_of_timm(name: str, layer: int) -> None:
    vision, network = tower(name, layer=layer), whole(name)
    grid = network.forward_intermediates(pixels_of(vision), indices=[layer], intermediates_only=True)[0]
    torch.testing.assert_close(run(vision, pixels_of(vision)), rows(grid), **ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_tower_has_and_computes_no_more_than_its_features_need(name: str) -> None:
    """Also the closing norm and the head are gone: each weight is one that the features depend on."""
    last, cut = tower(name, layer=-1), tower(name, layer=-2)
    assert cut.flops(1) < last.flops(1) <= tower(name).flops(1)
    for vision in (tower(name), cut):
        vision.train().eval()  # drops what LeViT keeps from an earlier run
        features = vision(pixels_of(vision, 1))
        grads = torch.autograd.grad(features.square().sum(), list(vision.parameters()), allow_unused=True)
        assert not [grad for grad in grads if grad is None]


@pytest.mark.parametrize("layers", [(-2, -1), (-1, -3)])
def test_stages_of_other_grids_come_to_the_grid_of_the_first(layers: tuple[int, ...]) -> None:
    vision = fresh("test_efficientnet", layer=list(layers))
    alone = [tower("test_efficientnet", layer=layer) for layer in layers]
    assert (vision.grid, vision.width) == (alone[0].grid, sum(one.width for one in alone))
    features = run(vision, pixels_of(vision)).split([one.width for one in alone], dim=-1)
    torch.testing.assert_close(features[0], run(alone[0], pixels_of(vision)))
    second = run(alone[1], pixels_of(vision)).transpose(1, 2).unflatten(-1, alone[1].grid)
    if alone[1].grid > alone[0].grid:
        factor = alone[1].grid[0] // alone[0].grid[0]
        expected = nn.functional.avg_pool2d(second, factor)
    else:
        expected = nn.functional.interpolate(second, alone[0].grid, mode="bilinear")
    torch.testing.assert_close(features[1], rows(expected))


def test_blocks_stand_side_by_side_in_the_order_asked_for() -> None:
    vision = fresh("test_vit", layer=[-1, 2, 2], class_token=True)
    alone = [run(tower("test_vit", layer=layer, class_token=True), pixels_of(vision)) for layer in (-1, 2, 2)]
    assert (vision.prefix, vision.tokens) == (1, 17)
    torch.testing.assert_close(run(vision, pixels_of(vision)), torch.cat(alone, dim=-1))


def test_the_class_token_stands_first_and_registers_are_dropped() -> None:
    vision = fresh("test_vit", class_token=True)
    with torch.no_grad():
        features = whole("test_vit").forward_features(pixels_of(vision))
    torch.testing.assert_close(run(vision, pixels_of(vision)), features)
    with pytest.raises(UserError, match="has no class token"):
        fresh("test_vit2", class_token=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_counters_agree(name: str) -> None:
    vision = tower(name)
    with FlopCounterMode(display=False) as counter:
        run(vision, pixels_of(vision))
    assert vision.flops(2) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224.v2_webli", "mobilenetv4_conv_small.e2400_r224_in1k"])
def test_images_are_prepared_as_the_weights_want_them(name: str) -> None:
    with torch.device("meta"):
        vision = TimmVision(name)
    config = timm.data.resolve_model_data_config(None, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)
    copy = pickle.loads(pickle.dumps(vision.preprocessing))
    for image in (noise(70, 300), noise(500, 90)):
        assert torch.equal(copy(image), transform(image))
    assert copy.pixel_shape == vision.pixel_shape == (3, 224, 224)
    assert copy(Image.new("L", (4000, 3))).shape == copy.pixel_shape


def test_size_and_data_config_are_what_is_said() -> None:
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    vision = TimmVision("test_convnext", image_size=96, data_config=config).eval()
    assert (vision.pixel_shape, vision.grid) == ((3, 96, 96), (3, 3))
    image = noise(96, 96)
    expected = torch.tensor(list(image.getdata())).unflatten(0, (96, 96)).permute(2, 0, 1) / 255
    torch.testing.assert_close(vision.preprocessing(image), (expected - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("name", "layer"), [("test_vit", -2), ("test_efficientnet", [-1, -2]), ("swin_tiny_patch4_window7_224", None)]
)
def test_a_saved_tower_gives_the_same_features(name: str, layer: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    vision = TimmVision(
        name, layer=layer, image_size=SIDE, model_args=NAMES[name], data_config={"mean": (0.1, 0.2, 0.3)}
    ).eval()
    arguments = vision.save_pretrained(tmp_path)
    json.dumps({key: value for key, value in arguments.items() if not isinstance(value, Path)})
    again = TimmVision(**{k: str(tmp_path / v) if isinstance(v, Path) else v for k, v in arguments.items()}).eval()
    image = noise(70, 40)
    assert torch.equal(vision.preprocessing(image), again.preprocessing(image))
    assert torch.equal(run(vision, pixels_of(vision)), run(again, pixels_of(vision)))
    assert vision.state_dict().keys() == again.state_dict().keys()


def test_a_plain_file_of_weights_is_loaded(tmp_path: Path) -> None:
    """Under timm's own keys, with the classifier, in either format; positions are interpolated to another size."""
    network = timm.create_model("test_vit", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        vision = TimmVision("test_vit", pretrained=str(tmp_path / file)).eval()
        with torch.no_grad():
            features = network.forward_features(pixels_of(vision))[:, 1:]
        torch.testing.assert_close(run(vision, pixels_of(vision)), features)
    larger = TimmVision("test_vit", pretrained=str(tmp_path / "w.pth"), image_size=192, layer=-2)
    assert torch.equal(larger.tower.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)
    assert larger.tower.pos_embed.shape[1] == 12 * 12 + 1


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_efficientnet").state_dict()
    missing = {key: value for key, value in state.items() if key != "conv_stem.weight"}
    other = state | {"conv_stem.weight": torch.zeros(5, 3, 3, 3)}
    for file, content, words in [("m", missing, "missing"), ("o", other, r"of shape \[5, 3, 3, 3\], and here")]:
        save_file(content, tmp_path / f"{file}.safetensors")
        with pytest.raises(UserError, match=f"another network's: conv_stem.weight is {words}"):
            TimmVision("test_efficientnet", pretrained=str(tmp_path / f"{file}.safetensors"))
    torch.save({"weights": Path("anything to unpickle")}, tmp_path / "p.pth")
    for file in ("nowhere.safetensors", "p.pth"):
        with pytest.raises(UserError, match=r"is no file|cannot be read"):
            TimmVision("test_efficientnet", pretrained=str(tmp_path / file))


def test_a_timm_wrapper_checkpoint_is_a_folder_of_timm(tmp_path: Path) -> None:
    settings = {
        "pretrained_cfg": timm.get_pretrained_cfg("test_efficientnet").to_dict(),
        "model_args": {"drop_rate": 0.1},
    }
    config = TimmWrapperConfig(architecture="test_efficientnet", **settings)
    wrapper = TimmWrapperModel(config).eval()
    wrapper.save_pretrained(tmp_path)
    vision = TimmVision(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        expected = wrapper(pixels_of(vision)).last_hidden_state
    torch.testing.assert_close(run(vision, pixels_of(vision)), rows(expected))
    again = vision.save_pretrained(tmp_path / "copy")
    assert (again["name"], again["model_args"]) == ("test_efficientnet", {"drop_rate": 0.1})
    with pytest.raises(UserError, match="TimmVision"):
        HFVision(str(tmp_path))
    assert load_file(tmp_path / "copy" / again["pretrained"]).keys() == vision.tower.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "test_vti"}, "did you mean 'test_vit'"),
        ({"name": "test_vit.r160_in1"}, "did you mean 'test_vit.r160_in1k'"),
        ({"name": "org/test_vit"}, "hf-hub:org/test_vit"),
        ({"name": "local-dir:/nowhere"}, "no timm model at 'local-dir:/nowhere'"),
        ({"name": "test_convnext", "layer": 5}, "4 layers, none is layer 5: take -4"),
        ({"name": "test_vit", "layer": []}, "empty list"),
        ({"name": "test_vit", "image_size": 100}, "does not run on images of 100x100|cannot build"),
        ({"name": "test_vit", "data_config": {"maen": 1}}, "did you mean 'mean'"),
        ({"name": "test_vit", "model_args": {"dpeth": 1}}, "dpeth"),
        ({"name": "test_vit", "data_config": {"interpolation": "cubism"}}, "cannot prepare images"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TimmVision(**arguments)


def test_it_works_in_a_model(tokenizer: str) -> None:
    model = VisionLanguageModel(
        vision=tower("tf_efficientnet_lite0"),
        language=LanguageModel(config=QWEN2, tokenizer=tokenizer),
        fusion=LaViFusion(every=2, generator=small()),
    ).eval()
    awaken(model.fusion)
    batch = collate(model, [ask(1, "what colour is the circle?", answer="red")])
    with torch.no_grad():
        assert not torch.allclose(model(batch), model(batch.without_images()), atol=1e-3)


def test_a_network_without_a_published_configuration_takes_a_size() -> None:
    assert _size_argument("no_such_network", None, 64) == {}

"""Vision towers of every kind: the contract, the layers and tokens that are kept, preprocessing, FLOPs, checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import QWEN2, ask, collate, small
from PIL import Image
from timm.models import eva, fastvit, register_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, SiglipImageProcessor

from lavi.data.preprocessing import Preprocessing
from lavi.data.tiling import AnyRes
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.fusion.lavi import LaViFusion
from lavi.language.load import LanguageModel
from lavi.model import VisionLanguageModel
from lavi.vision.hf import CLOSED_BY_A_NORM, TOWERS, HFVision, load_tower
from lavi.vision.openclip import OpenCLIPVision
from lavi.vision.shape_flops import ShapeFlops
from lavi.vision.timm import TimmVision
from lavi.vision.tower import Tower, middle

PLAIN = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = PLAIN | {"intermediate_size": 48}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 64}
REGISTERS = {"num_register_tokens": 3}
HF: dict[str, dict[str, Any]] = {
    "clip_vision_model": WIDE,
    "siglip_vision_model": WIDE,
    "dinov2": PLAIN,
    "dinov2_with_registers": PLAIN | REGISTERS,
    "dinov3_vit": WIDE | REGISTERS,
    "dinov3_convnext": STAGES,
    "vit": WIDE,
    "deit": WIDE,
    "beit": WIDE,
    "ijepa": WIDE,
    "aimv2_vision_model": WIDE,
    "mlcd_vision_model": WIDE,
    "radio": PLAIN | {"num_cls_tokens": 2, "num_registers": 3, "max_img_size": 64},
    "tipsv2_vision_model": PLAIN | REGISTERS,
    "convnext": STAGES,
    "convnextv2": STAGES,
}


@register_model
def small_eva(pretrained: bool = False, **settings: Any) -> nn.Module:
    return eva.eva02_tiny_patch14_224(pretrained, img_size=56, embed_dim=24, depth=3, num_heads=2, **settings)


@register_model
def small_fastvit(pretrained: bool = False, **settings: Any) -> nn.Module:
    return fastvit.fastvit_mci0(pretrained, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), **settings)


VIT = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": 32}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "ViT": VIT,
    "CoCa": VIT | {"attentional_pool": True, "attn_pooler_heads": 2},
    "timm ViT": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": None},
    "timm registers": {"timm_model_name": "test_vit2", "image_size": 160},
    "timm SigLIP": {"timm_model_name": "test_vit3", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
    "EVA": {"timm_model_name": "small_eva", "image_size": 56, "timm_pool": "token", "timm_proj": None},
    "ConvNeXt": {"timm_model_name": "test_convnext", "image_size": 64},
    "EfficientNet": {"timm_model_name": "test_efficientnet", "image_size": 160},
    "MobileNet": {"timm_model_name": "mobilenetv4_conv_small", "image_size": 64, "timm_pool": "", "timm_proj": None},
    "FastViT": {"timm_model_name": "small_fastvit", "image_size": 64, "timm_proj": None},
    "ResNet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
}
TOWER_NAMES = [*HF, *OPEN_CLIP]
"""Model types of transformers are lower case, kinds of open_clip are not."""
CONVOLUTIONAL = {"dinov3_convnext", "convnext", "convnextv2"}
CONVOLUTIONAL |= {"ConvNeXt", "EfficientNet", "MobileNet", "FastViT", "ResNet"}
NO_CLASS_TOKEN = {"siglip_vision_model", "ijepa", "aimv2_vision_model", "timm registers", "timm SigLIP"} | CONVOLUTIONAL
REGISTER_COUNT = {"dinov2_with_registers": 3, "dinov3_vit": 3, "radio": 4, "tipsv2_vision_model": 3}
REGISTER_COUNT |= {"timm registers": 1}
BLOCKS = [name for name in TOWER_NAMES if name not in CONVOLUTIONAL]
CLASSES = [name for name in TOWER_NAMES if name not in NO_CLASS_TOKEN]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hf(name: str, **settings: Any) -> HFVision:
    config = HF[name] | {"model_type": name} | settings.pop("config", {})
    torch.manual_seed(0)
    return HFVision(config=config, **settings).eval()


def clip(name: str, **settings: Any) -> OpenCLIPVision:
    torch.manual_seed(0)
    return OpenCLIPVision(config={"embed_dim": 16, "vision_cfg": OPEN_CLIP[name]}, **settings).eval()


def fresh(name: str, **settings: Any) -> Tower:
    """A small tower: the same weights each time it is built."""
    return hf(name, **settings) if name in HF else clip(name, **settings)


@functools.cache
def _made(name: str, settings: str) -> Tower:
    return fresh(name, **json.loads(settings))


def tower(name: str, **settings: Any) -> Tower:
    """The same as :func:`fresh`, built once for all tests: to be looked at, not changed."""
    return _made(name, json.dumps(settings))


def pixels_of(vision: Tower, views: int = 2) -> Tensor:
    return torch.randn(views, *vision.pixel_shape, generator=torch.Generator().manual_seed(1))


def blocks_of(vision: Tower) -> Any:
    if isinstance(vision, HFVision):
        count = vision.tower.config.num_hidden_layers
        return next(m for m in vision.tower.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    trunk = getattr(vision.tower, "trunk", vision.tower)
    return trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks


def run(vision: Tower, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vision(pixels)


def outputs_of_blocks(vision: Tower, pixels: Tensor) -> list[Tensor]:
    """(views, [class | registers | grid], D) of each block, caught at the block itself."""
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda module, inputs, out: outputs.append(out)) for b in blocks_of(vision)]
    run(vision, pixels)
    for handle in handles:
        handle.remove()
    return [out[0] if isinstance(out, tuple) else out for out in outputs]


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(values.numpy())


# --- the contract -----------------------------------------------------------------------------------------------------


def test_every_tower_that_is_said_to_work_is_tried() -> None:
    assert set(HF) == set(TOWERS)
    assert not set(HF) & set(OPEN_CLIP)


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_features_are_what_the_contract_says(name: str) -> None:
    vision = tower(name)
    pixels = pixels_of(vision, 3)
    features = run(vision, pixels)
    assert features.shape == (3, vision.tokens, vision.width)
    assert vision.tokens == vision.grid[0] * vision.grid[1]
    assert vision.preprocessing(noise(50, 41)).shape == vision.pixel_shape
    single = torch.cat([run(vision, pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_the_grid_runs_row_by_row(name: str) -> None:
    """A change of the upper half of the last patch of the top row is felt most at that token."""
    vision = tower(name)
    pixels = 0.1 * pixels_of(vision, 1)
    changed = pixels.clone()
    rows, columns = vision.grid
    height, width = vision.pixel_shape[1] // rows, vision.pixel_shape[2] // columns
    changed[:, :, : height // 2, -width:] += 3.0
    felt = (run(vision, changed) - run(vision, pixels)).norm(dim=-1)[0]
    assert felt.argmax() == columns - 1


@pytest.mark.parametrize("name", ["vit", "deit", "open_clip"])
def test_images_need_not_be_square(name: str) -> None:
    size = [32, 48]
    if name in HF:
        vision: Tower = hf(name, config={"image_size": size})
    else:
        vision = OpenCLIPVision(config={"vision_cfg": VIT | {"image_size": size}}).eval()
    assert (vision.pixel_shape, vision.grid) == ((3, *size), (4, 6))
    assert run(vision, vision.preprocessing(noise(70, 60))[None]).shape == (1, 24, vision.width)


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_looking_leaves_the_tower_as_it_was(name: str) -> None:
    vision = fresh(name)
    before = [parameter.clone() for parameter in vision.parameters()]
    state, random = vision.train().state_dict(), torch.get_rng_state()
    vision.infer_shapes(class_token=False)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in vision.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, vision.parameters(), strict=True))
    assert not any(tensor.is_meta for tensor in state.values())


# --- layers and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_are_the_blocks_own_outputs(name: str) -> None:
    """-1 the last, -2 the one before, several side by side in the order asked for."""
    vision = tower(name)
    pixels = pixels_of(vision)
    outputs = [out[:, -vision.tokens :] for out in outputs_of_blocks(vision, pixels)]
    assert not torch.allclose(outputs[-1], outputs[-2])
    torch.testing.assert_close(run(vision, pixels), outputs[-1])
    torch.testing.assert_close(run(tower(name, layer=-2), pixels), outputs[-2])
    torch.testing.assert_close(run(tower(name, layer=1), pixels), outputs[0])
    both = tower(name, layer=[-1, -2])
    assert both.width == 2 * vision.width
    torch.testing.assert_close(run(both, pixels), torch.cat([outputs[-1], outputs[-2]], dim=-1))


@pytest.mark.parametrize("name", HF)
def test_layers_count_as_hidden_states_do(name: str) -> None:
    vision = hf(name)
    pixels = pixels_of(vision)
    whole = AutoModel.from_config(AutoConfig.for_model(name, **HF[name])).eval()
    whole.load_state_dict(vision.tower.state_dict(), strict=False)
    with torch.no_grad():
        hidden = whole(pixels, output_hidden_states=True).hidden_states[-1]
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, -vision.tokens :]
    torch.testing.assert_close(run(vision, pixels), hidden)


@pytest.mark.parametrize("name", ["ConvNeXt", "EfficientNet", "MobileNet", "FastViT"])
def test_a_convolutional_tower_gives_the_grid_it_would_pool(name: str) -> None:
    vision = clip(name)
    torch.manual_seed(0)
    whole = open_clip.model._build_vision_tower(16, OPEN_CLIP[name]).eval()
    with torch.no_grad():
        grid = whole.trunk.forward_features(pixels_of(vision))  # (views, D, rows, columns)
    torch.testing.assert_close(run(vision, pixels_of(vision)), grid.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", BLOCKS)
def test_later_layers_and_heads_are_gone(name: str) -> None:
    whole, cut = tower(name), tower(name, layer=-2)
    assert len(blocks_of(cut)) == len(blocks_of(whole)) - 1
    assert cut.flops(1) < whole.flops(1)
    assert not [key for key in whole.state_dict() if "pool" in key or ".head." in key or key.endswith(".proj")]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_token_stands_before_the_grid(name: str) -> None:
    vision, without = tower(name, class_token=True), tower(name)
    pixels = pixels_of(vision)
    features = run(vision, pixels)
    assert (vision.prefix, vision.tokens) == (1, without.tokens + 1)
    assert features.shape[1] == vision.tokens
    first = outputs_of_blocks(vision, pixels)[-1]
    torch.testing.assert_close(features[:, :1], first[:, :1])
    torch.testing.assert_close(features[:, 1:], run(without, pixels))


@pytest.mark.parametrize("name", REGISTER_COUNT)
def test_registers_are_dropped(name: str) -> None:
    vision = tower(name)
    before = outputs_of_blocks(vision, pixels_of(vision))[-1].shape[1] - vision.tokens
    assert before == REGISTER_COUNT[name] + (name not in NO_CLASS_TOKEN)


@pytest.mark.parametrize("name", [name for name in TOWER_NAMES if name in NO_CLASS_TOKEN])
def test_a_class_token_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="has no class token"):
        tower(name, class_token=True)


def test_a_new_kind_of_tower_is_its_features_and_its_preprocessing() -> None:
    class Stretched(Preprocessing):
        pixel_shape = (3, 8, 12)

        def __call__(self, image: Image.Image) -> Tensor:
            return torch.from_numpy(np.array(image.resize((12, 8)), dtype=np.float32)).permute(2, 0, 1)

    class Patches(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, kernel_size=4, stride=4)
            self.preprocessing = Stretched()
            self.infer_shapes(class_token=False)

        def encode(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
            grid = self.patches(pixels)
            return [(grid.new_zeros(len(grid), 0, 6), grid)]

    vision = Patches()
    assert (vision.grid, vision.width, vision.tokens) == ((2, 3), 6, 6)
    assert vision.flops(5) == 5 * 2 * 6 * 6 * 3 * 16
    assert run(vision, vision.preprocessing(noise(9, 9))[None]).shape == (1, 6, 6)


# --- preprocessing ----------------------------------------------------------------------------------------------------

CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
NONE = ((0.0,) * 3, (1.0,) * 3)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
OWN = {
    "clip_vision_model": (CLIP_COLOURS, BICUBIC, "middle"),
    "siglip_vision_model": (HALF, BICUBIC, "whole"),
    "dinov2": (IMAGENET_COLOURS, BICUBIC, "middle"),
    "vit": (HALF, BILINEAR, "whole"),
}
OWN_OF_MODELS = {
    ("ViT-B-32", "openai"): (CLIP_COLOURS, BICUBIC, "middle"),
    ("ViT-B-16-SigLIP", None): (HALF, BICUBIC, "whole"),
    ("ViT-L-14-CLIPA", None): (IMAGENET_COLOURS, BILINEAR, "whole"),
    ("MobileCLIP-S1", None): (NONE, BILINEAR, "middle"),
    ("ViT-L-14", "laion2b_s32b_b82k"): (HALF, BICUBIC, "middle"),
    ("ViT-L-14", "openai"): (CLIP_COLOURS, BICUBIC, "middle"),
}


def by_hand(image: Image.Image, side: int, own: tuple[Any, Image.Resampling, str]) -> np.ndarray:
    (mean, deviation), resample, part = own
    size = (side, side)
    if part == "middle":
        scale = side / min(image.size)
        size = (int(image.width * scale), int(image.height * scale))
    image = image.resize(size, resample)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    values = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float64) / 255
    return ((values - mean) / deviation).transpose(2, 0, 1)  # (C, H, W)


@pytest.mark.parametrize("name", OWN)
def test_a_bare_configuration_has_its_familys_preprocessing(name: str) -> None:
    vision = hf(name)
    for size in ((100, 60), (60, 100), (8, 8)):
        np.testing.assert_allclose(vision.preprocessing(noise(*size)), by_hand(noise(*size), 32, OWN[name]), atol=1e-5)
    assert (vision.preprocessing.mean, vision.preprocessing.resample) == (OWN[name][0][0], OWN[name][1])


@pytest.mark.parametrize(("name", "mean"), [("radio", CLIP_COLOURS[0]), ("tipsv2_vision_model", NONE[0])])
def test_towers_that_normalise_themselves_get_values_from_0_to_1(name: str, mean: tuple[float, ...]) -> None:
    preprocessing = hf(name).preprocessing
    image = noise(32, 32)
    np.testing.assert_allclose(preprocessing(image), np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)
    assert preprocessing.mean == mean


@pytest.mark.parametrize(("name", "tag"), OWN_OF_MODELS)
def test_weights_of_open_clip_bring_their_own_preprocessing(name: str, tag: str | None) -> None:
    with torch.device("meta"):
        vision = OpenCLIPVision(name, pretrained=tag)
    own, image = OWN_OF_MODELS[name, tag], noise(120, 90)
    expected = by_hand(image, vision.pixel_shape[1], own)
    np.testing.assert_allclose(vision.preprocessing(image), expected, atol=1e-5)
    assert (vision.preprocessing.mean, vision.preprocessing.resample) == (own[0][0], own[1])


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_extreme_images_are_prepared_too(name: str) -> None:
    for size in ((1, 1), (3, 1), (1, 3), (20000, 20), (20, 20000)):
        pixels = tower(name).preprocessing(Image.new("RGB", size, (200, 40, 90)))
        assert pixels.shape == tower(name).pixel_shape
        assert pixels.std(dim=(1, 2)).max() < 1e-4  # a single colour stays one
        assert pixels.mean(dim=(1, 2)).argmax() == 0


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_images_of_other_modes_are_prepared_too(mode: str) -> None:
    for vision in (hf("vit"), hf("siglip_vision_model"), clip("ViT")):
        image = noise(50, 40).convert(mode)
        assert torch.equal(vision.preprocessing(image), vision.preprocessing(image.convert("RGB")))


@pytest.mark.parametrize("name", ["clip_vision_model", "siglip_vision_model", "convnext", "ViT"])
def test_where_the_middle_is_kept_only_the_middle_is_resized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20000x20 pixels, a resize of the whole would make 224000x224."""
    vision, sizes = fresh(name), []
    part = vision.preprocessing.image_processor if isinstance(vision, HFVision) else vision.preprocessing.transform
    prepare = type(part).__call__
    monkeypatch.setattr(type(part), "__call__", lambda *a, **k: (sizes.append(a[1].size), prepare(*a, **k))[1])
    vision.preprocessing(Image.new("RGB", (20000, 20)))
    assert sizes == [(20000, 20) if name == "siglip_vision_model" else (1280, 20)]


@pytest.mark.parametrize("name", [name for name in HF if name not in CLOSED_BY_A_NORM])
def test_a_tower_that_no_norm_closes_has_no_final_norm(name: str) -> None:
    with pytest.raises(UserError, match="leave final_norm out"):
        fresh(name, final_norm=True)


@pytest.mark.parametrize("name", sorted(CLOSED_BY_A_NORM))
def test_the_final_norm_is_behind_the_last_layer(name: str) -> None:
    own, normed = (fresh(name, **settings) for settings in ({}, {"final_norm": True}))
    pixels = torch.randn(2, *own.pixel_shape)
    with torch.no_grad():
        assert not torch.equal(own(pixels), normed(pixels))
        assert own(pixels).shape == normed(pixels).shape


def test_the_middle_of_a_very_long_image() -> None:
    assert middle(noise(640, 10)).size == (640, 10)
    long = noise(860, 10)
    assert np.array_equal(np.asarray(middle(long)), np.asarray(long)[:, 110:750])
    assert np.array_equal(np.asarray(middle(long.rotate(90, expand=True)).rotate(-90, expand=True)), middle(long))


# --- FLOPs ------------------------------------------------------------------------------------------------------------

FULL = {
    "CLIP-L/14-336": ("clip_vision_model", [1024, 24, 16, 4096, 336, 14], {"layer": -2}, 0.366),
    "SigLIP-so400m/14-384": ("siglip_vision_model", [1152, 27, 16, 4304, 384, 14], {"layer": -2}, 0.642),
    "SigLIP2-B/16-256": ("siglip_vision_model", [768, 12, 12, 3072, 256, 16], {"layer": -1}, None),
    "DINOv3-7B": ("dinov3_vit", [4096, 40, 32, 8192, 224, 16], {"class_token": True}, None),
}
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
MODELS: list[Any] = ["ViT-SO400M-14-SigLIP-384", "convnext_base_w_320", "RN50", "MobileCLIP2-S0", "PE-Core-T-16-384"]
OTHER_MODELS = ["ViT-L-14-336", "EVA02-B-16", "ViTamin-S", "MobileCLIP2-B"]
MODELS += [pytest.param(name, marks=pytest.mark.slow) for name in OTHER_MODELS]
"""One of each kind, and others of the same kinds."""


def counted(vision: Tower, views: int) -> float:
    pixels = torch.zeros(views, *vision.pixel_shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = vision(pixels)
    assert features.shape == (views, vision.tokens, vision.width)
    return counter.get_total_flops()


OPERATIONS = {
    "linear": lambda x: nn.functional.linear(x, x.new_zeros(7, 4)),
    "convolution": lambda x: nn.functional.conv2d(x[None], x.new_zeros(6, 1, 3, 3), groups=2),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x[:, :3], x[:, :3]),
    "matmul": lambda x: torch.matmul(x, x.mT),
    "method": lambda x: x.matmul(x.mT),
    "operator": lambda x: x @ x.mT,
    "batched": lambda x: torch.bmm(x, x.mT),
    "batched method": lambda x: x.bmm(x.mT),
    "einsum": lambda x: torch.einsum("btd, bsd -> bts", x, x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_priced_as_the_counter_does(name: str) -> None:
    x = torch.zeros(2, 5, 4, device="meta")
    with ShapeFlops() as priced, FlopCounterMode(display=False) as counter:
        OPERATIONS[name](x)
    assert priced.total == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_two_counters_agree(name: str) -> None:
    for settings in [{}] + [{"layer": [-3, -2], "class_token": name in CLASSES}] * (name in BLOCKS):
        with torch.device("meta"):
            vision = fresh(name, **settings)
        assert vision.flops(3) == pytest.approx(counted(vision, 3), rel=0.01)
    assert tower(name).flops(3) == tower(name).flops(1) * 3 > 0  # counted without a meta device around it, too


@pytest.mark.parametrize("name", FULL)
def test_two_counters_agree_at_full_size(name: str) -> None:
    kind, sizes, settings, teraflops = FULL[name]
    with torch.device("meta"):
        vision = HFVision(config={"model_type": kind, **dict(zip(KEYS, sizes, strict=True))}, **settings).eval()
    assert vision.flops(1) == pytest.approx(counted(vision, 1), rel=0.01)
    if teraflops is not None:  # by hand, from the released configurations
        assert vision.flops(1) == pytest.approx(teraflops * 1e12, rel=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_open_clip_at_full_size(name: str) -> None:
    with torch.device("meta"):
        vision = OpenCLIPVision(name).eval()
    assert all(parameter.is_meta for parameter in vision.parameters())
    assert vision.flops(1) == pytest.approx(counted(vision, 1), rel=0.01)


def test_flops_of_a_vit_by_hand() -> None:
    """Patches, then per layer four projections, scores and their sum, and two feed-forward maps."""
    width, inner, layers, grid = 24, 48, 3, 16
    for vision, tokens in ((hf("siglip_vision_model"), grid), (hf("clip_vision_model"), grid + 1)):
        layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
        assert vision.flops(1) == 2 * grid * 3 * 8**2 * width + layers * layer


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_a_saved_tower_gives_the_same_features(name: str, tmp_path: Path) -> None:
    settings = {"layer": [-2, -3]} if name in BLOCKS else {}
    vision = tower(name, **settings, class_token=name in CLASSES)
    arguments = vision.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(vision)(**{k: str(tmp_path / v) if isinstance(v, Path) else v for k, v in arguments.items()}).eval()
    json.dumps({k: v for k, v in arguments.items() if not isinstance(v, Path)})
    image = noise(70, 40)
    assert torch.equal(vision.preprocessing(image), again.preprocessing(image))
    pixels = pixels_of(vision)
    assert torch.equal(run(vision, pixels), run(again, pixels))
    assert (again.prefix, again.grid, again.width) == (vision.prefix, vision.grid, vision.width)


def test_a_saved_tower_keeps_its_preprocessing(tmp_path: Path) -> None:
    preprocess_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.9] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    vision = OpenCLIPVision(config={"vision_cfg": VIT, "preprocess_cfg": preprocess_cfg})
    arguments = vision.save_pretrained(tmp_path)
    again = OpenCLIPVision(**arguments | {"pretrained": str(tmp_path / arguments["pretrained"])})
    np.testing.assert_allclose(vision.preprocessing(noise(50, 40)), again.preprocessing(noise(50, 40)))
    np.testing.assert_allclose(
        again.preprocessing(noise(50, 40)),
        by_hand(noise(50, 40), 32, ((preprocess_cfg["mean"], preprocess_cfg["std"]), BILINEAR, "whole")),
        atol=1e-5,
    )


def two_towers(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A small CLIP or SigLIP, text tower and all, saved into ``folder``."""
    vision = hf(f"{kind}_vision_model")
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vision_config=vision.tower.config.to_dict(), text_config=text)
    config.vision_config.vision_use_head = True
    model = AutoModel.from_config(config).eval().to(dtype)
    model.save_pretrained(folder)
    vision.preprocessing.image_processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_of_a_two_tower_checkpoint(kind: str, tmp_path: Path) -> None:
    model = two_towers(kind, tmp_path)
    vision = HFVision(str(tmp_path), layer=-2).eval()
    pixels = pixels_of(vision)
    with torch.no_grad():
        hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(run(vision, pixels), hidden[:, -16:])
    assert not [key for key in vision.state_dict() if "text" in key]


def test_a_checkpoint_in_half_precision_is_computed_in_fp32(tmp_path: Path) -> None:
    two_towers("clip", tmp_path, torch.bfloat16)
    vision = HFVision(str(tmp_path)).eval()
    assert run(vision, pixels_of(vision)).dtype == torch.float32


def processor(side: int, folder: Path) -> None:
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


@pytest.mark.parametrize("name", ["siglip_vision_model", "clip_vision_model", "vit", "aimv2_vision_model"])
def test_preprocessing_of_another_size_is_refused_with_both(name: str, tmp_path: Path) -> None:
    hf(name, config={"image_size": 48}).save_pretrained(tmp_path)
    processor(32, tmp_path)
    with pytest.raises(UserError, match=r"makes 32x32 pixels .* made for 48x48.*preprocessor_config.json"):
        HFVision(str(tmp_path))


def test_preprocessing_that_crops_to_no_size_is_refused(tmp_path: Path) -> None:
    vision = hf("dinov2")
    vision.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": False}))
    with pytest.raises(UserError, match=r"makes (32x64 or 64x32|64x32 or 32x64) pixels"):
        HFVision(str(tmp_path))


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "dinov3_convnext"])
def test_a_tower_of_any_size_takes_that_of_its_preprocessing(name: str, tmp_path: Path) -> None:
    """DINOv2's checkpoints were trained at 518 pixels, and their preprocessing resizes to 224."""
    hf(name).save_pretrained(tmp_path)
    processor(96, tmp_path)
    vision = HFVision(str(tmp_path)).eval()
    side = 3 if name in CONVOLUTIONAL else 12
    assert (vision.pixel_shape, vision.grid) == ((3, 96, 96), (side, side))
    assert run(vision, pixels_of(vision)).shape == (2, vision.tokens, vision.width)


def test_a_checkpoint_without_preprocessing_says_so(tmp_path: Path) -> None:
    hf("vit").tower.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not say how its images are prepared: copy preprocessor_config.json"):
        HFVision(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    hf("vit").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="lacks 16 weights of its 'vit' tower"):
        HFVision(str(tmp_path))


def test_a_language_model_is_no_vision_tower(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN2, vocab_size=8)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'qwen2' does not work here"):
        HFVision(str(tmp_path))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_checkpoint_of_open_clip_gives_its_visual_half(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(5)
    text = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 20, "context_length": 4}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=VIT, text_cfg=text, output_dict=True).eval()
    file = tmp_path / f"clip.{suffix}"
    state = model.state_dict()
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    vision = OpenCLIPVision(config={"embed_dim": 16, "vision_cfg": VIT}, pretrained=str(file), class_token=True).eval()
    pixels = pixels_of(vision)
    with torch.no_grad():
        pooled = model.visual.ln_post(run(vision, pixels)[:, 0]) @ model.visual.proj
        torch.testing.assert_close(pooled, model.encode_image(pixels))


def test_the_text_half_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the text tower was built")

    monkeypatch.setattr(open_clip.model, "_build_text_tower", refuse)
    with torch.device("meta"):
        vision = OpenCLIPVision("ViT-B-32")
        assert OpenCLIPVision("roberta-ViT-B-32").tokens == 49
    blocks = 12 * (12 * 768**2 + 13 * 768)
    assert sum(parameter.numel() for parameter in vision.parameters()) == blocks + (32**2 * 3 + 1 + 50 + 2) * 768


def test_weights_trained_with_quickgelu_run_with_it() -> None:
    def activations(name: str, tag: str | None) -> set[str]:
        with torch.device("meta"):
            return {type(m).__name__ for m in OpenCLIPVision(name, pretrained=tag).modules() if "GELU" in str(type(m))}

    assert activations("ViT-B-32", "openai") == {"QuickGELU"}
    assert activations("ViT-B-32-quickgelu", None) == {"QuickGELU"}
    assert activations("ViT-B-32", "laion2b_s34b_b79k") == {"GELU"}


# --- what is refused --------------------------------------------------------------------------------------------------


def config(name: str = "vit", **changed: Any) -> dict[str, Any]:
    return {"config": HF[name] | {"model_type": name} | changed}


REFUSED = {
    "neither": ({}, "takes either 'source'"),
    "both": ({"source": "x", **config()}, "takes either 'source'"),
    "nothing there": ({"source": "no/such-tower"}, "no vision tower at 'no/such-tower'"),
    "no such kind": ({"config": {"model_type": "dinov4"}}, "knows no vision tower 'dinov4': did you mean 'dinov2'"),
    "NaFlex": ({"config": {"model_type": "siglip2_vision_model"}}, "google/siglip2-base-patch16-224"),
    "packed": ({"config": {"model_type": "pixtral"}}, "its grid changes with each image"),
    "shuffled": ({"config": {"model_type": "vit_mae"}}, "whose model type is vit"),
    "merging": ({"config": {"model_type": "swin"}}, "'swin' does not work here: .*known: aimv2_vision_model"),
    "no such key": (config(hiden_size=24), "has no key 'hiden_size': did you mean 'hidden_size'"),
    "wrong type": (config(image_size="large"), "configuration of the vision tower 'vit' is wrong"),
    "not square": (config("clip_vision_model", image_size=[32, 48]), "square images only"),
    "not square either": (config("dinov2", image_size=[32, 48]), "'dinov2' tower does not run on images of 32x48"),
    "heads": (
        config("clip_vision_model", num_attention_heads=5),
        "is not a multiple of the number of attention heads",
    ),
    "no such layer": ({**config(), "layer": -4}, r"has 3 layers, none is layer -4: take -3"),
    "embeddings": ({**config(), "layer": 0}, "none is layer 0"),
    "one of several": ({**config(), "layer": [-1, 4]}, "none is layer 4"),
    "no layer": ({**config(), "layer": []}, "empty list"),
    "a stage": ({**config("convnext"), "layer": -2}, "'convnext' has 4 stages .* leave layer at -1"),
}
REFUSED_MODELS = {
    "neither": ({}, "takes either 'name'"),
    "both": ({"name": "RN50", "config": {"vision_cfg": VIT}}, "takes either 'name'"),
    "no such model": ({"name": "ViT-B-33"}, "knows no model 'ViT-B-33': did you mean 'ViT-B-32'"),
    "no such tag": ({"name": "MobileCLIP-S1", "pretrained": "datacomp"}, "did you mean 'datacompdr'"),
    "no vision": ({"config": {"embed_dim": 3}}, "needs 'vision_cfg'"),
    "no such key": ({"config": {"vision_cfg": {"widht": 3}}}, "no key 'widht': did you mean 'width'"),
    "no such trunk": ({"config": {"vision_cfg": {"timm_model_name": "vit_foo"}}}, "cannot build a tower"),
    "heads": ({"config": {"vision_cfg": VIT | {"width": 30, "head_width": 7}}}, "cannot build a tower"),
    "size": ({"config": {"vision_cfg": OPEN_CLIP["EVA"] | {"image_size": 64}}}, "does not take images of"),
    "a stage": ({"config": {"vision_cfg": OPEN_CLIP["ResNet"]}, "layer": -2}, "stages of different grids"),
    "no such layer": ({"config": {"vision_cfg": VIT}, "layer": 9}, "has 3 layers, none is layer 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(case: str) -> None:
    arguments, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason):
        HFVision(**arguments)


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_what_open_clip_cannot_do_is_refused_with_the_reason(case: str) -> None:
    arguments, reason = REFUSED_MODELS[case]
    with pytest.raises(UserError, match=reason):
        OpenCLIPVision(**arguments)


def test_weights_of_another_tower_are_refused(tmp_path: Path) -> None:
    clip("ViT").save_pretrained(tmp_path)
    file = str(tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"another tower's: .* is of shape .*32.*, and here .*64"):
        OpenCLIPVision(config={"vision_cfg": VIT | {"width": 64}}, pretrained=file)
    with pytest.raises(UserError, match=r"another tower's: .* is missing"):
        OpenCLIPVision(config={"vision_cfg": VIT | {"layers": 4}}, pretrained=file)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"cannot be read"):
        OpenCLIPVision(config={"vision_cfg": VIT}, pretrained=str(tmp_path / "text.pt"))


# --- inside a model ---------------------------------------------------------------------------------------------------

FUSIONS = {
    "attention": lambda: LaViFusion(every=2, generator=small()),
    "mlp": lambda: LaViFusion(every=2, generator=small("mlp")),
    "conv": lambda: LaViFusion(every=2, generator=small("conv")),
    "concat": ConcatFusion,
}
SMALL = [name for name in TOWER_NAMES if not name.startswith("timm") and name != "EVA"]
"""With few enough tokens for a small context."""


@pytest.mark.parametrize("name", SMALL)
def test_every_tower_works_in_a_model(name: str, tokenizer: str) -> None:
    for make in FUSIONS.values():
        torch.manual_seed(0)
        model = VisionLanguageModel(
            vision=tower(name, class_token=name in CLASSES),
            language=LanguageModel(config=QWEN2, tokenizer=tokenizer),
            fusion=make(),
        ).eval()
        with torch.no_grad():
            for parameter in model.fusion.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            batch = collate(model, [ask(1, "what colour is the circle?", answer="red"), ask("hello", answer="hi")])
            with_images, without_images = model(batch), model(batch.without_images())
        assert with_images.shape[:2] == batch.input_ids.shape
        assert not torch.allclose(with_images[0], without_images[0], atol=1e-3)
        torch.testing.assert_close(with_images[1], without_images[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["attention", "mlp", "conv"])
def test_generators_on_a_grid_leave_the_class_token_out(kind: str, tokenizer: str) -> None:
    vision = hf("clip_vision_model", class_token=True)
    model = VisionLanguageModel(
        vision=vision, language=LanguageModel(config=QWEN2, tokenizer=tokenizer), fusion=FUSIONS[kind]()
    )
    generator = next(iter(model.fusion.generators.values()))  # type: ignore[union-attr]
    features = run(vision, pixels_of(vision))
    other = features.clone()
    other[:, 0] = torch.randn_like(other[:, 0])
    same = torch.equal(generator.visual(features, vision.grid), generator.visual(other, vision.grid))
    assert same == (kind != "attention")


@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model", "dinov2", "vit"])
def test_smaller_images_have_fewer_tokens(kind: str, tmp_path: Path) -> None:
    """The control of a smaller image: the same weights, positions interpolated by transformers itself."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    whole = HFVision(config={"model_type": kind, **sizes}).eval()
    whole.save_pretrained(tmp_path / "whole")
    small = HFVision(str(tmp_path / "whole"), image_size=16).eval()
    assert (small.pixel_shape, small.grid, small.tokens) == ((3, 16, 16), (2, 2), 4)
    assert small.flops(1) < whole.flops(1) / 2
    pixels = small.preprocessing(noise(50, 50))[None]
    keys = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = whole.tower(pixels, output_hidden_states=True, **keys).hidden_states[-1][:, -4:]
        assert torch.equal(small(pixels), expected)
    arguments = small.save_pretrained(tmp_path / "small")
    arguments["source"] = str(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(HFVision(**arguments).eval()(pixels), expected)


def test_image_sizes_that_cannot_be_are_refused() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    with pytest.raises(UserError, match="patches of 8"):
        HFVision(config={"model_type": "siglip_vision_model", **sizes}, image_size=20)


def test_a_configuration_in_half_precision_gives_a_tower_in_fp32() -> None:
    settings = hf("siglip_vision_model").tower.config
    settings.dtype = torch.bfloat16
    assert {parameter.dtype for parameter in load_tower(None, settings).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["dinov2", "timm"])
def test_the_rim_of_a_tile_is_seen(name: str) -> None:
    """Where the preprocessing of an image enlarges it and keeps the middle."""
    if name == "timm":
        preprocessing: Any = TimmVision("vit_tiny_patch16_224", data_config={"crop_pct": 0.9}).preprocessing
    else:
        preprocessing = hf(name).preprocessing
        preprocessing.image_processor.size = {"shortest_edge": 40}  # as published: 256, of which 224 are kept
    _, height, width = preprocessing.pixel_shape
    view = Image.new("RGB", (width, height), "black")
    view.paste((255, 255, 255), (0, 0, 2, height))  # two columns at the left edge
    seen = preprocessing.of_view(view)[0]
    black = preprocessing.of_view(Image.new("RGB", (width, height), "black"))[0]
    assert (seen != black).nonzero()[:, 1].unique().tolist() == [0, 1]
    assert torch.equal(seen[:, 2:], black[:, 2:])
    assert not torch.equal(preprocessing(view)[0], seen)  # an image's rim is cut off
    larger = preprocessing.of_view(view.resize((2 * width, 2 * height)))[0]  # of the larger of two towers
    assert not torch.equal(larger[:, 0], black[:, 0])
    two = Image.new("RGB", (2 * width, height), "black")
    two.paste(view, (width, 0))
    (_, first, second), layout = AnyRes(max_grid=2).views(two, preprocessing)
    assert layout.tiles == (1, 2)
    assert torch.equal(first[0], black)
    assert torch.equal(second[0], seen)

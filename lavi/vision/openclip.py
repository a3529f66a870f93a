"""Vision towers of open_clip: ViT, SigLIP, EVA, ConvNeXt, FastViT (MobileCLIP), and whatever else it builds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.factory import load_state_dict
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lavi.config.types import Check
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError, nearest, one_line
from lavi.loading.without_weights import weights_wanted
from lavi.vision.tower import Tower, chosen_layers, middle, nothing_before

SETTINGS = ("embed_dim", "vision_cfg", "quick_gelu", "preprocess_cfg")
"""What of open_clip's files a tower needs; the rest is about the text half, and the training of both."""

UNUSED = ("text_cfg", "custom_text", "init_logit_scale", "init_logit_bias", "multimodal_cfg")


def check_config(config: dict[str, Any]) -> None:
    """Of a bare configuration.

    Raises:
        UserError: a key that open_clip does not know.
    """
    _settings(None, config)


class OpenCLIPPreprocessing(Preprocessing):
    """open_clip's transform; of long images whose shortest side is resized it gets the middle alone."""

    def __init__(self, settings: PreprocessCfg) -> None:
        size = settings.size
        height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.pixel_shape = (3, height, width)
        self.mean, self.resample = tuple(settings.mean), Image.Resampling[settings.interpolation.upper()]
        self.keeps_middle = settings.resize_mode == "shortest"
        self.transform = image_transform_v2(settings, is_train=False)

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels: Tensor = self.transform(middle(image) if self.keeps_middle else image)
        return pixels


class OpenCLIPVision(Tower):
    """The visual half of an open_clip model; its text half is never built, nor run what pools and projects.

    Features are a block's own output, before the norm that closes the tower; of a convolutional tower (ConvNeXt,
    FastViT, ResNet), the grid that it would pool. Images are prepared as the tag of the weights says; without a tag,
    as the first of the model's does.

    Args:
        name: of a model that open_clip knows.
        pretrained: a tag of that model, or a checkpoint file of open_clip; without it, weights start random.
        config: instead of ``name``, a bare configuration with the keys of open_clip's files: ``embed_dim``,
            ``vision_cfg``, ``quick_gelu``, ``preprocess_cfg``.
        layer: whose output to use: -1 the last block's, -2 the one before. Several: their features side by side. Of a
            convolutional tower only -1: its stages have different grids.
        class_token: keep the class token, before the grid.

    Raises:
        UserError: neither or both of ``name`` and ``config``; no such model, tag, file, key, layer or class token; a
            checkpoint of another tower.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        pretrained: str | None = None,
        config: Annotated[dict[str, Any], Check(check_config)] | None = None,
        layer: int | list[int] = -1,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise UserError("an open_clip tower takes either 'name' (a model) or 'config' (a bare configuration).")
        tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
        tag = tags.get(str(pretrained), {})
        pretrained = None if pretrained is None else os.path.expanduser(pretrained)
        self.settings = _settings(name, config)
        self.settings |= {"quick_gelu": tag.get("quick_gelu", self.settings.get("quick_gelu", False))}
        self.tower = _build(self.settings)
        weights = None if pretrained is None else _weights(self.tower, pretrained, tags)
        self.layers = _cut(self.tower, layer)
        self._prepare(self.settings.get("preprocess_cfg") or tag or next(iter(tags.values()), {}))
        registers = getattr(_trunk(self.tower), "reg_token", None)
        try:
            self.infer_shapes(
                class_token=class_token,
                registers=0 if registers is None else registers.shape[1],
            )
        except AssertionError as error:
            raise UserError(f"the tower does not take images of vision_cfg.image_size: {error}") from None
        for network in (self.tower, _trunk(self.tower)):
            self.drop_unused(network)
        if weights is not None:
            _fill(self.tower, weights, str(pretrained))

    def encode(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        trunk = _trunk(self.tower)
        if not self.layers:
            grid = trunk.forward_features(pixels) if hasattr(trunk, "forward_features") else self.tower(pixels)
            grid = grid.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else grid
            return [(nothing_before(grid), grid)]
        blocks = sorted({layer - 1 for layer in self.layers})
        before = getattr(trunk, "num_prefix_tokens", 1)  # open_clip's own ViT always has a class token
        out = self.tower.forward_intermediates(
            pixels, indices=blocks, intermediates_only=True, output_extra_tokens=before > 0
        )
        grids = out["image_intermediates"]  # (views, D, rows, columns) each
        befores = out.get("image_intermediates_prefix") or [nothing_before(grid) for grid in grids]
        outputs = dict(zip(blocks, zip(befores, grids, strict=True), strict=True))
        return [outputs[layer - 1] for layer in self.layers]

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the tower, as cut; returns the arguments that build it again, paths relative to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"visual.{name}": tensor.contiguous() for name, tensor in self.tower.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        return {
            "config": json.loads(json.dumps(self.settings)),
            "pretrained": Path("open_clip_model.safetensors"),
            "layer": self.layers or -1,
            "class_token": bool(self.prefix),
        }

    def _prepare(self, own: dict[str, Any]) -> None:
        """Make the preprocessing of what open_clip says about some weights, and keep it in the settings."""
        size = self.tower.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        try:
            chosen = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**own, "size": size}))
            self.preprocessing = OpenCLIPPreprocessing(chosen)
        except Exception as error:
            raise UserError(f"open_clip cannot prepare images by this preprocess_cfg: {one_line(error)}.") from error
        self.settings |= {"preprocess_cfg": asdict(chosen)}


def _settings(name: str | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """A model's configuration, of the form of open_clip's files, without its text half."""
    if name is not None:
        if name not in open_clip.list_models():
            raise UserError(f"open_clip knows no model '{name}': {nearest(name, open_clip.list_models())}")
        config = open_clip.get_model_config(name)
    assert config is not None
    if not isinstance(config.get("vision_cfg"), dict):
        raise UserError("a bare configuration of an open_clip tower needs 'vision_cfg', as open_clip's own files do.")
    _check_keys("files", config, {*SETTINGS, *UNUSED})
    _check_keys("vision_cfg", config["vision_cfg"], {field.name for field in fields(CLIPVisionCfg)})
    _check_keys("preprocess_cfg", config.get("preprocess_cfg"), {field.name for field in fields(PreprocessCfg)})
    return {key: config[key] for key in SETTINGS if key in config}


def _check_keys(whole: str, keys: Any, known: set[str]) -> None:
    if keys is not None and not isinstance(keys, dict):
        raise UserError(f"open_clip's {whole} is a mapping of keys, not {keys!r}.")
    for key in keys or ():
        if key not in known:
            raise UserError(f"open_clip's {whole} has no key '{key}': {nearest(key, known)}")


def _build(settings: dict[str, Any]) -> Any:
    vision = settings["vision_cfg"] | {"timm_model_pretrained": False}
    try:
        return _build_vision_tower(settings.get("embed_dim", 512), vision, settings["quick_gelu"])
    except Exception as error:
        raise UserError(f"open_clip cannot build a tower of this vision_cfg: {one_line(error)}.") from error


def _weights(tower: nn.Module, pretrained: str, tags: dict[str, dict[str, Any]]) -> dict[str, Tensor] | None:
    """The visual half of a checkpoint, a tag's or a file's; None on the meta device."""
    if pretrained not in tags and not Path(pretrained).is_file():
        raise UserError(
            f"the weights '{pretrained}' are neither a tag of this model nor a file: {nearest(pretrained, tags)}"
        )
    if not weights_wanted():
        return None
    shell = nn.Module()
    shell.visual = tower
    try:
        file = open_clip.download_pretrained(tags[pretrained]) if pretrained in tags else pretrained
        state = convert_state_dict(shell, load_state_dict(file))
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights '{pretrained}' cannot be read: {reason}") from None
    return {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}


def _fill(tower: nn.Module, weights: dict[str, Tensor], pretrained: str) -> None:
    """Load what the tower has; what it was cut of may be missing."""
    expected = tower.state_dict()
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            shape = f"of shape {list(weights[name].shape)}" if name in weights else "missing"
            raise UserError(
                f"the weights '{pretrained}' are another tower's: {name} is {shape}, and here {list(tensor.shape)}."
            )
    tower.load_state_dict({name: weights[name] for name in expected})


def _trunk(tower: Any) -> Any:
    """The network itself, which open_clip wraps where it is timm's."""
    return getattr(tower, "trunk", tower)


def _cut(tower: Any, layer: int | list[int]) -> list[int]:
    """Drop the blocks after the last chosen one; the numbers from 1 of the chosen, if the tower has blocks."""
    trunk = _trunk(tower)
    blocks = _blocks(trunk)
    if blocks is not None:
        numbers = chosen_layers(layer, len(blocks))
        trunk.prune_intermediate_layers([number - 1 for number in numbers], prune_norm=True, prune_head=True)
        return numbers
    if layer not in (-1, [-1]):
        raise UserError(f"{type(trunk).__name__} has stages of different grids, not blocks of one: leave layer at -1.")
    if hasattr(trunk, "attnpool"):
        trunk.attnpool = nn.Identity()
    return []


def _blocks(trunk: Any) -> Any:
    """The blocks of a transformer; None of a convolutional network, whose stages have different grids."""
    if (transformer := getattr(trunk, "transformer", None)) is not None:
        return transformer.resblocks
    info = getattr(trunk, "feature_info", [])
    if len({stage["reduction"] for stage in getattr(info, "info", info)}) != 1:
        return None
    return getattr(trunk, "blocks", None)

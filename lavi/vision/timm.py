"""Vision towers of timm: ViT, ConvNeXt, EfficientNet, MobileNetV4, FastViT, Swin, and whatever else it builds.

layer: null     what the network would pool: its last grid, with the closing norm or the head's convolution
layer: -1       the output of its last block or stage, before these (timm's forward_intermediates)
layer: [3, 5]   several, side by side in Dv; stages of other grids are brought to the grid of the first
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config, str_to_pil_interp
from timm.models import load_model_config_from_hf, load_state_dict, load_state_dict_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path, load_state_dict_from_path
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from lavi.config.types import Check, Count
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError, nearest, one_line
from lavi.loading.without_weights import weights_wanted
from lavi.vision.tower import Tower, chosen_layers, middle, nothing_before, resized

DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What of timm's data config can be set; the size is ``image_size``."""

WEIGHTS_FILE = "model.safetensors"


def check_data_config(config: dict[str, Any]) -> None:
    """Of preprocessing.

    Raises:
        UserError: a key that is not one of :data:`DATA_KEYS`.
    """
    for key in config:
        if key not in DATA_KEYS:
            raise UserError(f"the data config of a timm model has no key '{key}': {nearest(key, DATA_KEYS)}")


class TimmPreprocessing(Preprocessing):
    """timm's transform for evaluation; where it keeps the middle of an image, long images are cut to it first."""

    def __init__(self, data_config: dict[str, Any]) -> None:
        self.pixel_shape = tuple(data_config["input_size"])
        self.mean = tuple(data_config["mean"])
        self.resample = Image.Resampling(str_to_pil_interp(data_config["interpolation"]))
        self.keeps_middle = data_config["crop_mode"] == "center"
        with torch.device("cpu"):
            self.transform = create_transform(**data_config, is_training=False)
            self.whole = create_transform(**data_config | {"crop_pct": 1.0}, is_training=False)

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels: Tensor = self.transform(middle(image) if self.keeps_middle else image)
        return pixels

    def of_view(self, view: Image.Image) -> Tensor:
        pixels: Tensor = self.whole(view if view.mode == "RGB" else view.convert("RGB"))
        return pixels


class TimmVision(Tower):
    """A network of timm without its classifier, cut behind the last block or stage whose features are used.

    Args:
        name: of a model of timm, with or without the tag of its weights (``vit_base_patch16_siglip_224.v2_webli``); or
            ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER`` of a checkpoint with a ``config.json`` (as
            ``timm.create_model``), which ``timm_wrapper`` checkpoints of transformers are too.
        pretrained: true for the weights that the name's checkpoint or tag has; or a file of them (safetensors, or
            a ``.pth`` that holds tensors alone) under timm's own keys. False: weights start random.
        layer: null for what the network would pool; else whose output to use: of a plain transformer a block, of other
            networks a stage: -1 the last, -2 the one before. Several: their features side by side; those of another
            grid than the first named are brought to its grid, finer ones by average pooling, coarser ones bilinearly.
        class_token: keep the class token, before the grid.
        image_size: the side, in pixels, of the images that the tower gets, not the model's own.
        data_config: of the model's data config, what is to be other: ``mean``, ``std``, ``interpolation``,
            ``crop_pct``, ``crop_mode``.
        model_args: further arguments of ``timm.create_model``, such as ``depth`` of a small model for a test.

    Raises:
        UserError: no such model, weights, key, layer or class token; weights of another network; images of a size that
            the network cannot take.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool | str = False,
        layer: int | list[int] | None = None,
        class_token: bool = False,
        image_size: Count | None = None,
        data_config: Annotated[dict[str, Any], Check(check_data_config)] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_data_config(data_config or {})
        self.name, self.model_args, checkpoint = _resolve(name, model_args or {})
        keys = self.model_args | _size_argument(self.name, checkpoint, image_size)
        timms_own = pretrained is True and checkpoint is None and weights_wanted()
        self.tower = _build(self.name, keys, checkpoint, pretrained=timms_own)
        self.data_config = _data_config(self.tower, image_size) | (data_config or {})
        self.layers = _cut(self.tower, layer)
        state = _state(pretrained, checkpoint)
        if state is not None:
            origin = pretrained if isinstance(pretrained, str) else name
            _load(self.tower, state, origin, lambda: _build(self.name, keys, checkpoint, pretrained=False))
        self._prepare(class_token=class_token)

    def _prepare(self, *, class_token: bool) -> None:
        """Set the preprocessing, and run the network once, without numbers, on what it gives."""
        try:
            self.preprocessing = TimmPreprocessing(self.data_config)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"timm cannot prepare images by this data config: {one_line(error)}.") from error
        try:
            self.infer_shapes(class_token=class_token, registers=_registers(self.tower))
            self.drop_unused(self.tower)
        except (AssertionError, RuntimeError, ValueError) as error:
            size = "x".join(str(side) for side in self.pixel_shape[1:])
            raise UserError(f"the timm network does not run on images of {size} pixels: {one_line(error)}") from error

    def encode(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # convolutions are faster on it
        if not self.layers:
            return [_split(self.tower, self.tower.forward_features(pixels), pixels)]
        indices = sorted({layer - 1 for layer in self.layers})
        intermediates = self.tower.forward_intermediates
        prefix = {"return_prefix_tokens": True} if "return_prefix_tokens" in signature(intermediates).parameters else {}
        out = intermediates(pixels, indices=indices, stop_early=True, intermediates_only=True, **prefix)
        pairs = [(grid[1], grid[0]) if isinstance(grid, tuple) else (nothing_before(grid), grid) for grid in out]
        chosen = [dict(zip(indices, pairs, strict=True))[layer - 1] for layer in self.layers]
        size = (chosen[0][1].shape[2], chosen[0][1].shape[3])
        return [(before, resized(grid, size)) for before, grid in chosen]

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the network, as cut; returns the arguments that build it again, paths relative to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tower.state_dict().items()}, folder / WEIGHTS_FILE
        )
        data_config = {key: self.data_config[key] for key in DATA_KEYS}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()}
        _, height, width = self.pixel_shape
        return {
            "name": self.name,
            "model_args": self.model_args,
            "pretrained": Path(WEIGHTS_FILE),
            "layer": self.layers or None,
            "class_token": bool(self.prefix),
            "image_size": height if height == width else None,
            "data_config": plain,
        }


def _resolve(name: str, model_args: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """A model of timm's own list, its arguments, and what the checkpoint says of it (None: what timm itself says).

    Raises:
        UserError: no such model, or no checkpoint.
    """
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise UserError(one_line(error)) from None
    known_here = identifier.removeprefix("timm/")
    if source is None or (source == "hf-hub" and timm.is_model(known_here)):
        if not timm.is_model(known_here):
            names = [*timm.list_models(), *timm.list_pretrained()]
            raise UserError(f"timm knows no model '{name}': {nearest(name, names)}")
        try:
            timm.get_pretrained_cfg(known_here)
        except RuntimeError:
            tags = [n for n in timm.list_pretrained() if n.split(".")[0] == known_here.split(".")[0]]
            raise UserError(f"timm knows no weights '{known_here}': {nearest(known_here, tags)}") from None
        return known_here, model_args, None
    read = load_model_config_from_hf if source == "hf-hub" else load_model_config_from_path
    try:
        checkpoint, architecture, own = read(os.path.expanduser(identifier))
    except Exception as error:
        raise UserError(f"no timm model at '{name}': {one_line(error)}") from error
    known = {field.name for field in fields(PretrainedCfg)}  # transformers writes further keys beside them
    checkpoint = {key: value for key, value in checkpoint.items() if key in known}
    return architecture, {**(own or {}), **model_args}, checkpoint


def _size_argument(name: str, checkpoint: dict[str, Any] | None, image_size: int | None) -> dict[str, int]:
    """What a network is built with for images of another size than its own; a convolutional one takes any."""
    registered = timm.get_pretrained_cfg(name)
    fixed = checkpoint or (vars(registered) if registered else {})
    return {"img_size": image_size} if image_size is not None and fixed.get("fixed_input_size") else {}


def _build(name: str, keys: dict[str, Any], checkpoint: dict[str, Any] | None, *, pretrained: bool) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, pretrained_cfg=checkpoint, num_classes=0, **keys)
    except Exception as error:
        what = "with its weights " if pretrained else ""
        raise UserError(f"timm cannot build '{name}' {what}here: {one_line(error)}") from error


def _data_config(tower: nn.Module, image_size: int | None) -> dict[str, Any]:
    own: dict[str, Any] = resolve_model_data_config(tower)
    if image_size is not None:
        own["input_size"] = (own["input_size"][0], image_size, image_size)
    return own


def _state(pretrained: bool | str, checkpoint: dict[str, Any] | None) -> dict[str, Tensor] | None:
    """The tensors of a file or a checkpoint, nothing else of it; None: timm has loaded them, or none are wanted.

    Raises:
        UserError: there is no such file, or it is none of tensors.
    """
    file = os.path.expanduser(pretrained) if isinstance(pretrained, str) else None
    if file is not None and not Path(file).is_file():
        raise UserError(f"pretrained: '{file}' is no file; true takes the weights that timm knows for the model.")
    if not weights_wanted() or (file is None and not (pretrained and checkpoint)):
        return None
    checkpoint = checkpoint or {}
    origin = file or checkpoint.get("file") or checkpoint["hf_hub_id"]
    if file is not None:
        read: Callable[[str], dict[str, Tensor]] = partial(load_state_dict, weights_only=True)
    else:
        read = load_state_dict_from_path if "file" in checkpoint else load_state_dict_from_hf
    try:
        state = read(origin)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise UserError(f"the weights '{origin}' cannot be read: {one_line(error)}") from None
    return {name.removeprefix("timm_model."): tensor for name, tensor in state.items()}


def _load(tower: nn.Module, state: dict[str, Tensor], file: str, whole: Callable[[], nn.Module]) -> None:
    """Load what the tower has; keys and shapes of elsewhere are brought to timm's by the model's own conversion.

    Args:
        whole: the tower before it was cut, which the conversion reads.

    Raises:
        UserError: the weights are another network's.
    """
    convert = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    if _difference(tower, state) and convert is not None:
        with torch.device("meta"):
            model = whole()
        with suppress(KeyError, RuntimeError, ValueError):  # it knows no weights of this kind: say what is missing
            state = convert(dict(state), model)
    if difference := _difference(tower, state):
        raise UserError(f"the weights '{file}' are another network's: {difference}.")
    tower.load_state_dict({name: tensor for name, tensor in state.items() if name in tower.state_dict()}, strict=False)


def _difference(tower: nn.Module, state: dict[str, Tensor]) -> str:
    """The first tensor of the tower that is missing or of another shape; empty: all are there."""
    for name, tensor in tower.state_dict().items():
        if name.endswith("num_batches_tracked"):  # older files lack it, and no forward reads it
            continue
        if name not in state:
            return f"{name} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} is of shape {list(state[name].shape)}, and here {list(tensor.shape)}"
    return ""


def _cut(tower: Any, layer: int | list[int] | None) -> list[int]:
    """Drop what comes after the last chosen block or stage; the numbers from 1 of the chosen, none for null."""
    if layer is None:
        return []
    if not hasattr(tower, "forward_intermediates"):
        raise UserError(f"timm gives no layers of {type(tower).__name__}: leave layer at null.")
    info = tower.feature_info
    numbers = chosen_layers(layer, len(getattr(info, "info", info)))
    tower.prune_intermediate_layers([number - 1 for number in numbers], prune_norm=True, prune_head=True)
    return numbers


def _split(tower: Any, out: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What ``forward_features`` gives, in two parts: before the grid (views, P, D), and the grid (views, D, rows,
    columns)."""
    if out.ndim == 4:
        grid = out.permute(0, 3, 1, 2) if getattr(tower, "output_fmt", "NCHW") == "NHWC" else out
        return nothing_before(grid), grid
    info = tower.feature_info
    reduction = getattr(info, "info", info)[-1]["reduction"]
    rows, columns = (math.ceil(side / reduction) for side in pixels.shape[2:])
    before = out.shape[1] - rows * columns
    if before < 0:
        raise ValueError(f"its {out.shape[1]} tokens are no grid of {rows}x{columns}")
    return out[:, :before], out[:, before:].transpose(1, 2).unflatten(-1, (rows, columns))


def _registers(tower: Any) -> int:
    """How many of the tokens before the grid are registers."""
    registers = getattr(tower, "reg_token", None)
    return getattr(tower, "num_reg_tokens", None) or (0 if registers is None else int(registers.shape[1]))

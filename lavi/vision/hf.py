"""Vision towers of transformers (SigLIP, CLIP, DINO, ...): from a hub name, a local folder or a bare configuration."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PretrainedConfig,
    SiglipVisionConfig,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import output_capturing

from lavi.config.types import Check, Count
from lavi.data.preprocessing import Preprocessing
from lavi.errors import UserError, nearest, one_line
from lavi.loading.bare import bare_configuration
from lavi.loading.published import check_loaded, configuration_of
from lavi.loading.vlm import is_vlm, open_vlm, tower_state
from lavi.loading.without_weights import weights_wanted
from lavi.vision.tower import Tower, chosen_layers, encoder_layers, middle

TOWERS = {
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",  # SigLIP 2 at a fixed resolution, too
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "dinov3_convnext": "DINOv3ViTImageProcessor",
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "beit": "BeitImageProcessor",
    "ijepa": "ViTImageProcessor",
    "aimv2_vision_model": "CLIPImageProcessor",
    "mlcd_vision_model": "CLIPImageProcessor",
    "radio": "CLIPImageProcessor",
    "tipsv2_vision_model": "Tipsv2ImageProcessor",
    "convnext": "ConvNextImageProcessor",
    "convnextv2": "ConvNextImageProcessor",
}
"""The towers that work, by model type, and the image processor that a bare configuration of each gets."""

IMAGENET_COLOURS = {"dinov2", "dinov2_with_registers", "deit", "convnext", "convnextv2"}
"""Whose published checkpoints are normalised by ImageNet's mean and deviation, not by their processor's default."""

NORMALISES_ITSELF = {"radio"}
"""Whose network normalises: its images are prepared as values from 0 to 1."""

HEADS = {"siglip_vision_model": "vision_use_head", "aimv2_vision_model": "use_head"}
"""The setting that keeps a pooling head from being built."""

OF_ANY_SIZE = ("dino", "radio", "tipsv2")
"""In the names of those that bring their position embeddings to any size without being asked."""

SELECTS = hasattr(output_capturing, "selected_hidden_states")
"""Whether this transformers returns chosen hidden states; an older one returns all."""

CLOSED_BY_A_NORM = {
    "siglip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
    "deit",
    "ijepa",
    "aimv2_vision_model",
    "tipsv2_vision_model",
}
"""Whose ``last_hidden_state`` is behind a norm of all tokens; of the others it is the last layer's own output."""

FULL_SQUARE_VIEWS = ("idefics3_vision", "smolvlm_vision")
"""SigLIP towers whose position embeddings are interpolated for parts of a view; all views here are whole squares."""

REFUSED = {
    "siglip2_vision_model": "its grid changes with each image (NaFlex): take lavi.vision.naflex.NaFlexVision, or a "
    "checkpoint of a fixed resolution, such as google/siglip2-base-patch16-224.",
    "pixtral": "its grid changes with each image: take a tower of a fixed resolution.",
    "timm_wrapper": "it is a network of timm: take lavi.vision.timm.TimmVision with name: local-dir:FOLDER or "
    "hf-hub:OWNER/NAME.",
    "vit_mae": "it drops patches and shuffles the rest: take the fine-tuned checkpoint, whose model type is vit.",
}


def check_origin(source: str | None, config: dict[str, Any] | None) -> str | None:
    """That a tower comes from a checkpoint or from a bare configuration; the ``source``, ``~`` written out.

    Raises:
        UserError: both are given, or neither.
    """
    if (source is None) == (config is None):
        raise UserError("a vision tower takes either 'source' (a checkpoint) or 'config' (a bare configuration).")
    return None if source is None else os.path.expanduser(source)


def check_config(config: dict[str, Any]) -> None:
    """Of a bare configuration.

    Raises:
        UserError: no tower that works here, or a key or a value that it cannot have.
    """
    _config(None, config)


class HFPreprocessing(Preprocessing):
    """An image processor of transformers; of long images it gets the middle alone."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.mean = tuple(image_processor.image_mean or (0.0, 0.0, 0.0))
        self.resample = Image.Resampling(image_processor.resample)
        with torch.device("cpu"):
            views = [self(Image.new("RGB", size)) for size in ((20, 10), (10, 20))]
        self.shapes: list[Any] = [tuple(view.shape) for view in views]
        """(C, H, W) of a wide image and of a tall one: a tower needs them to be the same."""
        self.pixel_shape = self.shapes[0]

    def of_view(self, view: Image.Image) -> Tensor:
        if not getattr(self.image_processor, "do_center_crop", False):
            return self(view)
        whole = view.convert("RGB").resize(self.pixel_shape[:0:-1], self.resample)
        out = self.image_processor(whole, do_resize=False, do_center_crop=False, return_tensors="pt")
        return out["pixel_values"][0]  # type: ignore[no-any-return]

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        if "shortest_edge" in self.image_processor.size:
            image = middle(image)
        pixels: Tensor = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


class HFVision(Tower):
    """A transformers vision tower, cut after the last layer whose features are used: later layers are never run.

    Features are the layers' own outputs, before the norm that closes the tower. Of a published vision-language model
    (:mod:`lavi.loading.vlm`) it takes the tower. Images are prepared as the checkpoint's ``preprocessor_config.json``
    says; where a tower takes images of several sizes (DINOv2, DINOv3, ConvNeXt), that decides their size, else it has
    to be the tower's own.

    Args:
        source: hub name or local folder of a checkpoint (a vision tower, or a model that holds one: of two towers, or a
            vision-language model).
        config: instead of ``source``, a bare configuration: ``model_type`` and its keys; weights start random.
        layer: whose output to use, as in ``hidden_states``: -1 the last layer's, -2 the one before. Several: their
            features side by side. Of a convolutional tower only -1: its stages have different grids.
        class_token: keep the class token, before the grid.
        final_norm: the last layer's output goes through the norm that closes the tower (Idefics3, SmolVLM).
        image_size: the side, in pixels, that images are resized to, not the checkpoint's own; the tower's position
            embeddings are interpolated. Smaller images have fewer tokens: a control for reducers of tokens.

    Raises:
        UserError: neither or both of ``source`` and ``config``; nothing there, or no tower that works here; no such
            layer, no class token; preprocessing that does not fit; a tower that takes images of its own size only.
    """

    preprocessing: HFPreprocessing

    def __init__(
        self,
        source: str | None = None,
        *,
        config: Annotated[dict[str, Any], Check(check_config)] | None = None,
        layer: int | list[int] = -1,
        class_token: bool = False,
        final_norm: bool = False,
        image_size: Count | None = None,
    ) -> None:
        super().__init__()
        source = check_origin(source, config)
        settings = _config(source, config)
        self.tower = load_tower(source, settings)
        image_processor = _image_processor(source, settings)
        self.image_size = image_size
        self.resizing = _resize(self.tower, image_processor, image_size) if image_size is not None else {}
        self.preprocessing = HFPreprocessing(image_processor)
        self.layers = cut_layers(self.tower, layer)
        if final_norm and len(self.layers) > 1:
            raise UserError("final_norm closes the tower behind its last layer: name one layer, not several.")
        if final_norm and settings.model_type not in CLOSED_BY_A_NORM:
            raise UserError(
                f"a '{settings.model_type}' tower has no norm that closes all tokens: leave final_norm out."
            )
        self.final_norm = final_norm
        self._infer(class_token=class_token)

    def encode(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.final_norm:
            return [self._split(self.tower(pixels, **self.resizing).last_hidden_state, pixels)]
        layers: Any = self.layers if SELECTS else True
        hidden = self.tower(pixels, output_hidden_states=layers, **self.resizing).hidden_states
        return [self._split(hidden[layer], pixels) for layer in self.layers]

    def _split(self, hidden: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if hidden.ndim == 4:  # of a convolutional tower: (views, D, rows, columns) already
            return hidden.new_zeros(len(hidden), 0, hidden.shape[1]), hidden
        height, width = _pair(self.tower.config.patch_size)
        grid = (pixels.shape[2] // height, pixels.shape[3] // width)
        before = hidden.shape[1] - grid[0] * grid[1]
        return hidden[:, :before], hidden[:, before:].transpose(1, 2).unflatten(-1, grid)

    def _infer(self, *, class_token: bool) -> None:
        """Run the tower once, without numbers, on what its preprocessing gives.

        Raises:
            UserError: it does not run on that.
        """
        settings = self.tower.config
        shape = self.preprocessing.pixel_shape
        shapes = set(self.preprocessing.shapes) - {shape}
        expected = (settings.num_channels, *_pair(settings.image_size))
        try:
            if shapes:
                raise ValueError("wide and tall images come out different")
            self.infer_shapes(class_token=class_token)
        except (ValueError, RuntimeError) as error:
            if not shapes and shape == expected:
                kind = settings.model_type
                raise UserError(
                    f"the '{kind}' tower does not run on images of {_sides(shape)} pixels: {one_line(error)}"
                ) from error
            raise UserError(
                f"the image processor makes {' or '.join(_sides(s) for s in (shape, *shapes))} pixels of an image, but "
                f"the tower is made for {_sides(expected)}: set 'size' and 'crop_size' in preprocessor_config.json to "
                "image_size of config.json."
            ) from error

    def save_pretrained(self, folder: Path) -> dict[str, Any]:
        """Write the tower, as cut, and its preprocessing as an ordinary checkpoint folder.

        Returns:
            The arguments that build the same backbone again, paths relative to ``folder``.
        """
        self.tower.save_pretrained(folder)
        self.preprocessing.image_processor.save_pretrained(folder)
        keys = json.loads((folder / "config.json").read_text())
        for key in ("stage_names", "out_features", "out_indices"):  # they name layers that may have been cut off
            keys.pop(key, None)
        (folder / "config.json").write_text(json.dumps(keys, indent=2))
        return {
            "source": Path(),
            "layer": self.layers,
            "class_token": bool(self.prefix),
            "final_norm": self.final_norm,
            "image_size": self.image_size,
        }


def _resize(tower: Any, processor: Any, side: int) -> dict[str, bool]:
    """Make the preprocessing give squares of ``side`` pixels; returns what the tower is called with for that.

    Raises:
        UserError: the tower takes images of its own size only, or ``side`` is no multiple of its patches.
    """
    own, patch = _pair(tower.config.image_size), _pair(getattr(tower.config, "patch_size", 1))
    if side < 1 or side % patch[0] or side % patch[1]:
        raise UserError(f"image_size={side}: the tower cuts images into patches of {patch[0]} pixels, take a multiple.")
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    if (
        not can_interpolate
        and (side, side) != own
        and not any(name in tower.config.model_type for name in OF_ANY_SIZE)
        and hasattr(tower.config, "patch_size")
    ):
        raise UserError(
            f"a '{tower.config.model_type}' tower takes images of its own size ({own[0]}) only: leave image_size out."
        )
    if "shortest_edge" in processor.size:
        processor.size = {"shortest_edge": side}
    else:
        processor.size = {"height": side, "width": side}
    if processor.do_center_crop:
        processor.crop_size = {"height": side, "width": side}
    return {"interpolate_pos_encoding": True} if can_interpolate and (side, side) != own else {}


def _config(source: str | None, config: dict[str, Any] | None) -> PretrainedConfig:
    """The configuration of the vision tower alone, without a pooling head: it would run, and its output go unused."""
    if config is not None:
        config = {"model_type": "siglip_vision_model"} | config
        if "vision_config" not in config and config["model_type"] in list(CONFIG_MAPPING):
            _check_kind(config["model_type"])
        settings = bare_configuration(config, TOWERS, what="vision tower")
    else:
        settings = read_configuration(str(source))
    settings = getattr(settings, "vision_config", settings)
    if settings.model_type in FULL_SQUARE_VIEWS:
        settings = _siglip(settings)
    kind = settings.model_type
    _check_kind(kind)
    if kind in HEADS:
        setattr(settings, HEADS[kind], False)
    return settings


def _siglip(settings: PretrainedConfig) -> PretrainedConfig:
    """The SigLIP tower that computes the same on whole square views."""
    known = SiglipVisionConfig().to_dict().keys() - {"model_type"}
    return SiglipVisionConfig(**{key: value for key, value in settings.to_dict().items() if key in known})


def _check_kind(kind: str) -> None:
    if kind not in TOWERS:
        reason = REFUSED.get(kind, f"no tower whose layers give one grid of features; {nearest(kind, TOWERS)}")
        raise UserError(f"the vision tower '{kind}' does not work here: {reason}")


def read_configuration(source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(configuration_of(source))
    except Exception as error:
        raise UserError(
            f"no vision tower at '{source}' (neither a local folder nor a reachable hub name): {one_line(error)}"
        ) from error


def load_tower(source: str | None, settings: PretrainedConfig) -> Any:
    """The tower in fp32: what computes in less is the trainer's choice, not the checkpoint's."""
    kind: Any = MODEL_MAPPING[type(settings)]
    pooling = "add_pooling_layer" in inspect.signature(kind).parameters
    keys = {"add_pooling_layer": False} if pooling else {}  # its output would go unused
    loading_info: dict[str, Any] | None = None
    of_vlm = source is not None and is_vlm(read_configuration(source))
    try:
        if source is None or of_vlm or not weights_wanted():
            tower = AutoModel.from_config(settings, dtype=torch.float32, **keys)
        else:
            loading: Any = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = AutoModel.from_pretrained(source, config=settings, dtype=torch.float32, **loading, **keys)
            tower, loading_info = loaded
    except Exception as error:
        if isinstance(error, TypeError) and not isinstance(settings.image_size, int):
            raise UserError(
                f"a '{settings.model_type}' tower is built for square images only: image_size is one number, not "
                f"{settings.image_size}."
            ) from None
        origin = "a bare configuration" if source is None else f"'{source}'"
        raise UserError(f"no '{settings.model_type}' tower can be built from {origin}: {one_line(error)}") from error
    if loading_info is not None:
        check_loaded(loading_info, str(source), f"'{settings.model_type}' tower")
    if of_vlm and weights_wanted():
        _fill_from_vlm(tower, str(source))
    return tower


def _fill_from_vlm(tower: Any, source: str) -> None:
    """Copy the weights of the tower of a published vision-language model, but for a head that is not built here.

    Raises:
        UserError: as :func:`lavi.loading.vlm.open_vlm`, or the tower is another.
    """
    own = getattr(tower, "vision_model", tower)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in tower_state(open_vlm(source)).items()}
    missing = sorted(set(own.state_dict()) - set(state))
    if missing:
        raise UserError(f"the tower of '{source}' lacks {len(missing)} weights ({missing[0]} ...).")
    own.load_state_dict({name: state[name] for name in own.state_dict()})


def _image_processor(source: str | None, settings: PretrainedConfig) -> Any:
    if source is None:
        return _processor_of(settings)
    own = published_image_processor(source)
    return _of_one_view(own) if is_vlm(read_configuration(source)) else own


def published_image_processor(source: str) -> Any:
    """How the checkpoint ``source`` prepares images.

    Raises:
        UserError: it does not say.
    """
    try:
        return AutoImageProcessor.from_pretrained(configuration_of(source), backend="pil")
    except (OSError, ValueError):
        raise UserError(
            f"'{source}' does not say how its images are prepared: copy preprocessor_config.json from the checkpoint "
            "it comes from."
        ) from None


def _of_one_view(own: Any) -> Any:
    """What a vision-language model's image processor does to one view, without its tiles."""
    keys = {name: getattr(own, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
    if getattr(own, "max_image_size", None):  # Idefics3, SmolVLM: tiles come in this size
        side = own.max_image_size["longest_edge"]
        return transformers.SiglipImageProcessorPil(size={"height": side, "width": side}, **keys)
    if not getattr(own, "do_center_crop", False):
        return transformers.SiglipImageProcessorPil(size=own.size, **keys)
    return transformers.CLIPImageProcessorPil(size=own.size, crop_size=own.crop_size, **keys)


def _processor_of(settings: PretrainedConfig) -> Any:
    """The image processor of a bare configuration: its class's own settings, but the size of the configuration."""
    name = TOWERS[settings.model_type]
    make: Any = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    own = make()
    height, width = _pair(settings.image_size)
    keys: dict[str, Any] = {}
    larger = 1.0  # how much larger than what is cropped from it
    if own.do_center_crop:
        larger = (own.size.get("shortest_edge") or own.size["height"]) / own.crop_size["height"]
        keys["crop_size"] = {"height": height, "width": width}
    if "shortest_edge" in own.size:
        keys["size"] = {"shortest_edge": round(larger * max(height, width))}
    else:
        keys["size"] = {"height": round(larger * height), "width": round(larger * width)}
    if settings.model_type in IMAGENET_COLOURS:
        keys |= {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if settings.model_type in NORMALISES_ITSELF:
        keys |= {"do_normalize": False}
    return make(**keys)


def cut_layers(tower: Any, layer: int | list[int]) -> list[int]:
    """Drop the layers after the last chosen one; the numbers from 1 of the chosen."""
    settings = tower.config
    if not hasattr(settings, "num_attention_heads"):
        stages = len(settings.hidden_sizes)
        if chosen_layers(layer, stages) != [stages]:
            raise UserError(
                f"'{settings.model_type}' has {stages} stages of different grids, not layers of one: leave layer at -1."
            )
        return [stages]
    layers = settings.num_hidden_layers
    numbers = chosen_layers(layer, layers)
    del encoder_layers(tower)[max(numbers) :]
    settings.num_hidden_layers = max(numbers)
    return numbers


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of what may be a single number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape[1:])

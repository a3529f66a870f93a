"""A concatenation model as transformers' own class of vision-language model, where there is one.

    one view an image                                            LlavaForConditionalGeneration
    tiles in one grid, newlines, every image tiled               LlavaNextForConditionalGeneration
    tiles in one grid within a budget, newlines                  LlavaOnevisionForConditionalGeneration
    tiles and the whole image between markers, a pixel shuffle   Idefics3ForConditionalGeneration

The folder opens with ``AutoModelForImageTextToText`` and ``AutoProcessor``, and comes in again by
:func:`lavi.checkpoints.published_vlm.published_vlm`. Layers of the tower behind the last one that is used are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from lavi.checkpoints.model_folder import new_folder
from lavi.config.paths import home_path
from lavi.data.tiling import AnyRes, OneView, SplitImage
from lavi.errors import UserError
from lavi.fusion.concat import ConcatFusion
from lavi.loading.vlm import CONNECTOR
from lavi.model import VisionLanguageModel
from lavi.nn.projectors import LinearProjector, MLPProjector
from lavi.reduction.pixel_shuffle import PixelShuffle
from lavi.vision.hf import HFVision

PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
}


def save_as_transformers(model: VisionLanguageModel, folder: str | Path) -> str:
    """Write a model as a checkpoint of transformers' own class.

    Returns:
        The name of the class.

    Raises:
        UserError: there is no class that computes what the model does; the folder exists or cannot be written.
    """
    kind = transformers_kind(model)
    with new_folder(home_path(folder)) as part:
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **_config(model, kind)))
        vlm.load_state_dict(_state(model, kind), assign=True)
        vlm.tie_weights()
        vlm.generation_config = model.language.hf.generation_config
        vlm.save_pretrained(part)
        _processor(model, kind).save_pretrained(part)
    return type(vlm).__name__


def transformers_kind(model: VisionLanguageModel) -> str:
    """The model type of transformers' class that computes what a model does.

    Raises:
        UserError: there is none, and what of the model it would need to be otherwise.
    """
    fusion, tiling, reducer, tower = model.fusion, model.tiling, model.reducer, model.vision
    if model.timestamps or model.image_numbers:
        raise _no_class("model.timestamps=false and model.image_numbers=false: its processor says neither")
    if model.language.tokenizer.chat_template != model.chat.template:
        raise _no_class("model.chat_template=null: its processor asks by the tokenizer's own template")
    if type(fusion) is not ConcatFusion or not isinstance(tower, HFVision) or tower.image_size is not None:
        raise _no_class("concatenation behind a tower of transformers at its own size")
    if fusion.markers is not None:
        fits = isinstance(tiling, SplitImage) and isinstance(reducer, PixelShuffle) and tower.final_norm
        if not fits or not isinstance(fusion.projector, LinearProjector):
            raise _no_class("SplitImage, PixelShuffle, LinearProjector and vision.final_norm=true beside its markers")
        return "idefics3"
    if reducer is not None or type(fusion.projector) is not MLPProjector or tower.final_norm:
        raise _no_class("no reducer, an MLPProjector and the tower's layers without its final norm")
    if isinstance(tiling, OneView) and not fusion.has_newline and not tiling.pad_to_square:
        return "llava"
    if isinstance(tiling, AnyRes) and fusion.has_newline and tiling.tile_several is (fusion.budget is None):
        return "llava_next" if tiling.tile_several else "llava_onevision"
    raise _no_class(
        "OneView (not padded) without newlines, or AnyRes with newlines and either a budget or tile_several=true"
    )


def _no_class(needs: str) -> UserError:
    return UserError(f"transformers has no class that computes what this model does: it would need {needs}.")


def _config(model: VisionLanguageModel, kind: str) -> dict[str, Any]:
    tower: Any = model.vision
    text = model.language.hf.config.to_dict()
    keys: dict[str, Any] = {"text_config": text, "vision_config": tower.tower.config.to_dict()}
    keys |= {"image_token_id": _media_id(model, "image"), "tie_word_embeddings": text["tie_word_embeddings"]}
    if kind == "idefics3":
        keys["vision_config"].pop("model_type")
        return keys | {"scale_factor": cast(PixelShuffle, model.reducer).factor}
    numbers = tower.layers if len(tower.layers) > 1 else tower.layers[0]
    keys |= {"vision_feature_layer": numbers, "projector_hidden_act": "gelu"}
    keys["vision_feature_select_strategy"] = _select_strategy(tower)
    if kind == "llava":
        return keys | {"image_seq_length": tower.tokens}
    keys["image_grid_pinpoints"] = _pinpoints(model)
    if kind == "llava_onevision":
        keys |= {"vision_aspect_ratio": f"anyres_max_{model.fusion.budget}"}
        keys["video_token_id"] = _media_id(model, "video")
    return keys


def _media_id(model: VisionLanguageModel, kind: str) -> int:
    """The id of the token that stands for an image or a video.

    Raises:
        UserError: the tokenizer has none.
    """
    token = (model.media_tokens or {}).get(kind, f"<{kind}>")
    tokenizer = model.language.tokenizer
    if token not in tokenizer.get_vocab():
        raise UserError(
            f"transformers' class puts a token '{token}' for each {kind}, and this tokenizer has none: start "
            "from a released vision-language model, or export without --format transformers."
        )
    return tokenizer.get_vocab()[token]


def _pinpoints(model: VisionLanguageModel) -> list[list[int]]:
    side, tiling = model.vision.pixel_shape[1], cast(AnyRes, model.tiling)
    return [[rows * side, columns * side] for rows, columns in tiling.grids]


def _state(model: VisionLanguageModel, kind: str) -> dict[str, Tensor]:
    """All weights under the names of transformers' class."""
    names = ("vision_model", "text_model") if kind == "idefics3" else ("vision_tower", "language_model")
    tower: Any = model.vision
    own = getattr(tower.tower, "vision_model", tower.tower) if kind == "idefics3" else tower.tower
    state = {f"model.{names[0]}.{name}": tensor for name, tensor in own.state_dict().items()}
    prefix = f"{model.language.hf.base_model_prefix}."
    for name, tensor in model.language.merged_state().items():
        inner = name.removeprefix(prefix)
        state[name if inner == name else f"model.{names[1]}.{inner}"] = tensor
    own_connector = dict(model.fusion.named_parameters())
    state |= {f"model.{theirs}": own_connector[ours] for theirs, ours in CONNECTOR.items() if ours in own_connector}
    return {name: tensor.detach() for name, tensor in state.items()}


def _processor(model: VisionLanguageModel, kind: str) -> Any:
    """Transformers' processor of the class."""
    tokenizer = model.language.tokenizer
    images, keys = _images(model, kind)
    make: Any = getattr(transformers, PROCESSORS[kind])
    return make(images, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **keys)


def _images(model: VisionLanguageModel, kind: str) -> tuple[Any, dict[str, Any]]:
    """The image processor of the class: one view's, with the tiling around it; and what its processor needs besides."""
    vision: Any = model.vision
    tiling: Any = model.tiling
    one_view, side = vision.preprocessing.image_processor, vision.pixel_shape[1]
    colours = {name: getattr(one_view, name) for name in ("image_mean", "image_std", "resample", "rescale_factor")}
    if kind == "idefics3":
        sizes: dict[str, Any] = {"size": {"longest_edge": tiling.longest_edge}}
        sizes |= {"max_image_size": {"longest_edge": side}, "do_image_splitting": tiling.split}
        return _of_class("Idefics3ImageProcessorPil", sizes, colours), {"image_seq_len": model.feature_spec.tokens}
    keys: dict[str, Any] = {"vision_feature_select_strategy": _select_strategy(vision)}
    if kind == "llava_onevision":
        size = {"size": {"height": side, "width": side}}
        keys |= {"num_image_tokens": vision.tokens, "vision_aspect_ratio": f"anyres_max_{model.fusion.budget}"}
        keys["video_processor"] = _of_class("LlavaOnevisionVideoProcessor", size, colours)
        pinpoints = {"image_grid_pinpoints": _pinpoints(model)}
        return _of_class("LlavaOnevisionImageProcessorPil", size, colours, pinpoints), keys
    keys |= {"patch_size": side // vision.grid[0], "num_additional_image_tokens": vision.standing_before}
    if kind == "llava":
        return one_view, keys
    names = [name for name in ("size", "crop_size", "do_center_crop") if hasattr(one_view, name)]
    sizes = {name: getattr(one_view, name) for name in names} | {"image_grid_pinpoints": _pinpoints(model)}
    return _of_class("LlavaNextImageProcessorPil", sizes, colours), keys


def _of_class(name: str, *settings: dict[str, Any]) -> Any:
    make: Any = getattr(transformers, name)
    return make(**{key: value for part in settings for key, value in part.items()})


def _select_strategy(vision: Any) -> str:
    """``default`` drops what stands first in a view: the class token."""
    return "full" if vision.prefix or not vision.standing_before else "default"

"""Published vision-language models come in: as they are, or as the start of another fusion.

    model: {_target_: lavi.checkpoints.published_vlm.published_vlm, source: llava-hf/llava-onevision-qwen2-0.5b-ov-hf}

    model:                                             # FastV on it, without training
      _target_: lavi.checkpoints.published_vlm.published_vlm
      source: llava-hf/llava-onevision-qwen2-0.5b-ov-hf
      fusion: {_target_: lavi.fusion.pruning.FastV, newline: true, budget: 9}

    module: {start_from: llava-hf/llava-onevision-qwen2-0.5b-ov-hf}     # tower, language model and projector of it

Its configuration is translated into the section ``model`` of a recipe (:func:`section_of`): tower, reducer, fusion,
tiling and media tokens are components like any others, and the model is exported and resumed like any other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig

from lavi.config.text import TARGET
from lavi.config.types import Check, Count
from lavi.errors import UserError, one_line
from lavi.fusion.base import Fusion
from lavi.fusion.concat import ConcatFusion
from lavi.language.lora import LoRA, original_name
from lavi.loading.published import configuration_of
from lavi.loading.vlm import (
    TILED_BY_GRID,
    TILED_WITH_MARKERS,
    connector_state,
    language_model_of,
    open_vlm,
    opened_once,
    tower_state,
    vlm_config,
)
from lavi.loading.without_weights import weights_wanted, without_weights
from lavi.model import VisionLanguageModel
from lavi.recipe import Recipe
from lavi.reduction.base import Reducer
from lavi.vision.base import VisionBackbone
from lavi.vision.hf import HFVision

MODEL = "lavi.model.VisionLanguageModel"
VISION = "lavi.vision.hf.HFVision"
LANGUAGE = "lavi.language.load.LanguageModel"
CONCAT = "lavi.fusion.concat.ConcatFusion"
TILING = "lavi.data.tiling"

PARTS = ("vision", "language", "fusion", "reducer", "tiling")

MAY_BE_OTHERS = ("vision", "fusion", "reducer")
"""Those that a recipe may give, in the place of the checkpoint's own."""
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")

Node = dict[str, Any]


def published_vlm(
    source: str,
    *,
    vision: VisionBackbone | None = None,
    fusion: Fusion | None = None,
    reducer: Reducer | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
    lora: Annotated[dict[str, Any], Check(LoRA.of)] | None = None,
    context_length: Count | None = None,
    timestamps: bool = False,
    image_numbers: bool = False,
    built_from: Node | None = None,
) -> VisionLanguageModel:
    """A published vision-language model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Idefics3 or SmolVLM.

    Args:
        source: hub name or local folder of the checkpoint, as transformers saves it.
        vision: another vision backbone of the same width, such as the checkpoint's own that works on fewer tokens
            (:mod:`lavi.vision.reduced`); None: the checkpoint's own, as it is.
        fusion: another way for vision to meet language. One with a projector of the checkpoint's shape (pruning, VISOR)
            starts with the checkpoint's; None: the checkpoint's own, concatenation.
        reducer: makes fewer visual tokens of a view's; not where the checkpoint has one of its own (Idefics3, SmolVLM).
        dtype, attention, lora: of the language model.
        context_length, timestamps, image_numbers: as of :class:`lavi.model.VisionLanguageModel`.
        built_from: the section of a recipe that says so.

    Raises:
        UserError: nothing there, a checkpoint of another class, one that lacks weights or says too little; a fusion
            that arranges its visual tokens otherwise.
    """
    section = section_of(source, dtype=dtype, attention=attention, lora=lora)
    section |= {"context_length": context_length, "timestamps": timestamps, "image_numbers": image_numbers}
    if reducer is not None and section["reducer"] is not None:
        raise UserError(f"the projector of '{source}' reads {section['reducer'][TARGET]}: it takes no other reducer.")
    recipe = Recipe({"model": section}, {}, source)
    parts: dict[str, Any] = {"vision": vision, "fusion": fusion, "reducer": reducer}
    given = [name for name, part in parts.items() if part is not None]
    section |= {name: (built_from or {}).get(name) for name in given}
    with opened_once():
        for name in PARTS:
            if parts.get(name) is None and section[name] is not None:
                parts[name] = recipe.build(f"model.{name}")
        others = {key: value for key, value in section.items() if key not in (TARGET, *PARTS)}
        by_recipe = all(section[name] is not None for name in given)  # else nobody can say how to build it again
        model = VisionLanguageModel(**parts, **others, built_from=section if by_recipe else None)
        if weights_wanted():
            _start_connector(model.fusion, connector_state(open_vlm(source)), source)
    return model


def start_from_vlm(model: VisionLanguageModel, source: str) -> set[str]:
    """Copy a published checkpoint's tower, language model and connector into a model built from other ones.

    Returns:
        The names of the parameters that had other numbers before.

    Raises:
        UserError: a tower or a language model of another shape.
    """
    vlm = open_vlm(source)
    wrapped = next((name for name, part in model.named_modules() if isinstance(part, HFVision)), "vision")
    tower = {f"{wrapped}.tower.{name}": tensor for name, tensor in tower_state(vlm).items()}
    connector = {f"fusion.{name}": tensor for name, tensor in connector_state(vlm).items()}
    language = language_model_of(vlm, dtype=vlm.dtype, attention="sdpa").state_dict()
    language = {f"language.hf.{name}": tensor for name, tensor in language.items()}
    state = tower | language | (connector if isinstance(model.fusion, ConcatFusion) else {})
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one, other = (state.get(original_name(of)) for of in (first[id(parameter)], name))
        if one is not None and other is not None and not torch.equal(one, other):
            raise UserError(
                f"'{source}' is no start for this model: its {name} is a weight of its own, and here one with "
                f"{first[id(parameter)]}: set model.language.config.tie_word_embeddings=false."
            )
    changed = set()
    for name, parameter in model.named_parameters():
        tensor, halves = state.get(original_name(name)), name.startswith(("vision.", "language."))
        fits = tensor is not None and tensor.shape == parameter.shape
        if ".lora_" in name or not (fits or halves):  # a projector of another shape is learned anew
            continue
        if tensor is None or not fits:
            theirs = "none" if tensor is None else f"{list(tensor.shape)}"
            raise UserError(
                f"'{source}' is no start for this model: its {name} has shape {list(parameter.shape)}, and the "
                f"checkpoint {theirs}: take the checkpoint as the source of model.vision and model.language."
            )
        if not torch.equal(parameter, tensor.to(parameter)):
            changed.add(name)
            with torch.no_grad():
                parameter.copy_(tensor)
    return changed


def is_released(recipe: Recipe) -> bool:
    """Whether the model of a recipe is a published one."""
    return recipe.component("model") is published_vlm


def as_released(recipe: Recipe) -> Recipe:
    """The same recipe, a published model in it as it was released, told by its parts; any other as it is."""
    if not is_released(recipe):
        return recipe
    node = {key: value for key, value in recipe.settings["model"].items() if key not in MAY_BE_OTHERS}
    return written_out(recipe.replaced("model", node))


def written_out(recipe: Recipe) -> Recipe:
    """The same recipe, to be counted: a model that is a published one is told by its parts, as other models are."""
    node = recipe.settings["model"]
    if not is_released(recipe):
        return recipe
    of_language = {key: node[key] for key in ("dtype", "attention", "lora") if key in node}
    with without_weights():  # shapes are all that is asked for
        section = section_of(node["source"], **of_language)
    own = ("context_length", "timestamps", "image_numbers", *MAY_BE_OTHERS)
    section |= {key: node[key] for key in own if node.get(key)}
    return recipe.replaced("model", section)


def section_of(source: str, **language: Any) -> Node:
    """A published vision-language model as the section ``model`` of a recipe, its weights by ``source``.

    Args:
        language: further arguments of its language model.

    Raises:
        UserError: nothing there, a checkpoint of another class, or a part that this library has not.
    """
    config = vlm_config(source)
    of_kind = _with_markers if config.model_type in TILED_WITH_MARKERS else _with_projector
    parts = of_kind(config, _preprocessor(source))
    return {
        TARGET: MODEL,
        "vision": {TARGET: VISION, "source": source} | parts.pop("vision"),
        "language": {TARGET: LANGUAGE, "source": source} | language,
        "reducer": None,
    } | parts


def _with_projector(config: PretrainedConfig, preprocessor: Any) -> Node:
    """LLaVA's: two linear layers, visual tokens row by row.

    Raises:
        UserError: another activation between the layers, or a projector without biases.
    """
    if config.projector_hidden_act != "gelu" or not getattr(config, "multimodal_projector_bias", True):
        raise UserError(
            f"its projector (with '{config.projector_hidden_act}') is no two linear layers with biases and a GELU."
        )
    has_class_token = config.vision_config.model_type not in WITHOUT_CLASS_TOKEN
    vision: Node = {
        "layer": config.vision_feature_layer,
        "class_token": has_class_token and config.vision_feature_select_strategy == "full",
    }
    media = {"image": "<image>"}
    fusion: Node = {TARGET: CONCAT, "newline": config.model_type in TILED_BY_GRID, "budget": None}
    if config.model_type not in TILED_BY_GRID:
        pads = bool(getattr(preprocessor, "do_pad", False))
        one_view: Node = {TARGET: f"{TILING}.OneView", "pad_to_square": pads}
        return {"vision": vision, "fusion": fusion, "tiling": one_view, "media_tokens": media}
    tiling: Node = {TARGET: f"{TILING}.AnyRes"} | _grids(config.image_grid_pinpoints, config.vision_config.image_size)
    if config.model_type == "llava_next":
        tiling["tile_several"] = True
    else:
        fusion["budget"] = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        media["video"] = "<video>"
    return {"vision": vision, "fusion": fusion, "tiling": tiling, "media_tokens": media}


def _grids(pinpoints: list[list[int]], side: int) -> Node:
    """Sizes (height, width) of tiled images as arguments of :class:`lavi.data.tiling.AnyRes`."""
    grids = [[height // side, width // side] for height, width in pinpoints]
    most = max(max(grid) for grid in grids)
    sides = range(1, most + 1)
    if grids == [[rows, columns] for rows in sides for columns in sides]:
        return {"max_grid": most}
    return {"grids": grids}


def _with_markers(config: PretrainedConfig, preprocessor: Any) -> Node:
    """Idefics3's and SmolVLM's: a pixel shuffle and one linear layer, tokens of the vocabulary around the views."""
    return {
        "vision": {"layer": -1, "final_norm": True},
        "reducer": {TARGET: "lavi.reduction.pixel_shuffle.PixelShuffle", "factor": config.scale_factor},
        "fusion": {
            TARGET: CONCAT,
            "projector": {TARGET: "lavi.nn.projectors.LinearProjector"},
            "markers": {TARGET: "lavi.fusion.tile_markers.TileMarkers"},
        },
        "tiling": {
            TARGET: f"{TILING}.SplitImage",
            "longest_edge": preprocessor.size["longest_edge"],
            "split": bool(preprocessor.do_image_splitting),
        },
        "media_tokens": {"image": "<image>"},
    }


def _preprocessor(source: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(configuration_of(source), backend="pil")
    except Exception as error:
        raise UserError(
            f"'{source}' does not say how its images are prepared ({one_line(error)}): copy preprocessor_config.json "
            "or processor_config.json from the checkpoint it comes from."
        ) from error


def _start_connector(fusion: Fusion, state: dict[str, Tensor], source: str) -> None:
    """Copy a checkpoint's connector into a fusion that has one.

    Raises:
        UserError: the fusion has another one.
    """
    if not isinstance(fusion, ConcatFusion):
        return
    own = {
        name: parameter
        for name, parameter in fusion.named_parameters()
        if name.startswith("projector.") or name == "newline"
    }
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in state.items()}:
        ours, theirs = (", ".join(f"{name} {list(p.shape)}" for name, p in some.items()) for some in (own, state))
        raise UserError(
            f"{type(fusion).__name__} joins the halves by {ours}, and '{source}' by {theirs}: give the fusion the same "
            "projector, newline and markers, and the model a tower as wide."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])

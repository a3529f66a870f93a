"""A model in a folder: an ordinary checkpoint of each half, the weights of what joins them, and what builds it.

FOLDER/recipe.yaml           the recipe's model section; values that begin with ./ are paths inside the folder; below
                             data.format.video the frames of a video that it was trained on, where that is known
       language/             an ordinary transformers checkpoint with its tokenizer, adapters merged
       tokenizer/            the tokenizer alone: beside a configuration, transformers may take another class for it
       vision/               what the backbone wrote
       fusion.safetensors    every other weight; the versions that wrote it in its header

It needs none of the checkpoints that the model was built from, and holds no pickle. A vision backbone can be saved
when it has ``save_pretrained(folder)``, which writes it and returns the arguments that build the same one from there; a
``Path`` among them is inside the folder.
"""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from lavi.checkpoints.weight_files import load_into, make_readable, open_safetensors, write_state
from lavi.config.paths import home_path
from lavi.errors import UserError, reason
from lavi.model import VisionLanguageModel
from lavi.recipe import TARGET, Recipe

RECIPE, FUSION = "recipe.yaml", "fusion.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
INSIDE = "./"


def build(recipe: Recipe) -> Any:
    """The model of a recipe; what starts random is drawn from the recipe's seed."""
    provided = {"built_from": recipe.settings["model"]} if recipe.takes("model", "built_from") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.settings.get("seed", 0))
        return recipe.build("model", **provided)


def with_resolved_arguments(recipe: Recipe, model: VisionLanguageModel) -> Recipe:
    """The recipe with what the model read from other files written out: a run does not change when they do."""
    for key, value in model.fusion.resolved_arguments().items():
        recipe = recipe.replaced(f"model.fusion.{key}", value)
    return recipe


def save_pretrained(model: VisionLanguageModel, folder: str | Path, *, video: dict[str, Any] | None = None) -> None:
    """Write ``model`` as the folder that the head of this file shows.

    Args:
        video: the frames of a video that it was trained on, as a recipe names them (``data.format.video``).

    Raises:
        UserError: the folder exists or cannot be written; the model was not built from a recipe; its backbone cannot
            be saved.
    """
    if model.built_from is None:
        raise UserError(
            "this model was put together by hand, so nothing says how to build it again: build it from a recipe with "
            "lavi.checkpoints.model_folder.build, or load a run with lavi.checkpoints.run_folder.load_run."
        )
    if not hasattr(model.vision, "save_pretrained"):
        raise UserError(
            f"{type(model.vision).__name__} cannot be saved: a vision backbone needs save_pretrained(folder), as "
            "lavi.vision.hf.HFVision has it."
        )
    folder = home_path(folder)
    with new_folder(folder) as part:
        needed = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
        if needed > (free := shutil.disk_usage(part).free):
            raise UserError(
                f"{folder} needs {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} are free there: make room, or "
                "choose another folder."
            )
        _write(
            model,
            with_resolved_arguments(Recipe({"model": model.built_from}, {}, RECIPE), model).settings["model"],
            part,
            {"data": {"format": {"video": video}}} if video else {},
        )


def check_new_folder(folder: Path) -> None:
    """Whether :func:`save_pretrained` will be able to make a folder.

    Raises:
        UserError: it exists, or it cannot be created.
    """
    _make_part(folder).rmdir()


def _make_part(folder: Path) -> Path:
    if folder.exists():
        raise UserError(f"{folder} exists and is left as it is: choose another folder.")
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{part} is in the way: it is left of a command that was stopped, or of one that still writes. Remove it, "
            "or choose another folder."
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({reason(error)}): choose another folder.") from None
    return part


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` in one step; removed if writing fails."""
    part = _make_part(folder)
    try:
        yield part
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"{folder} cannot be written ({reason(error)}), and nothing is left of it: make room, or choose "
                "another folder."
            ) from None
        error.add_note(f"Nothing is left of {folder}.")
        raise


DROPPED = ("config", "lora", "gguf_file")
"""What built a language model whose weights are in the folder now."""


def _write(model: VisionLanguageModel, built_from: dict[str, Any], folder: Path, more: dict[str, Any]) -> None:
    node = copy.deepcopy(built_from)  # the model's own stays as it is
    language = {key: value for key, value in node["language"].items() if key not in DROPPED}
    node["language"] = language | {"source": f"{INSIDE}language", "tokenizer": f"{INSIDE}tokenizer"}
    model.language.save_pretrained(folder / "language")
    model.language.tokenizer.save_pretrained(folder / "tokenizer")
    arguments: dict[str, Any] = model.vision.save_pretrained(folder / "vision")  # type: ignore[operator]
    node["vision"] = {TARGET: node["vision"][TARGET], **_paths_inside(arguments)}
    Recipe({}, {}, RECIPE).replaced("model", node)  # refuses what could not be built again
    write_state(_other_weights(model), folder / FUSION)
    for file in folder.rglob("*.safetensors"):
        make_readable(file)
    text = yaml.safe_dump({"model": node} | more, sort_keys=False, allow_unicode=True, width=110)
    (folder / RECIPE).write_text(text, encoding="utf-8")


def _paths_inside(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a backbone, and of those within it, whose paths are of the whole folder."""
    out = {}
    for key, value in arguments.items():
        if isinstance(value, dict):
            value = _paths_inside(value)
        out[key] = f"{INSIDE}{'vision' / value}" if isinstance(value, Path) else value
    return out


def _other_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights outside the tower and the language model."""
    return {name: t for name, t in model.state_dict().items() if name.split(".")[0] not in ("vision", "language")}


def from_pretrained(folder: str | Path, *, trust: bool = False) -> VisionLanguageModel:
    """The model that :func:`save_pretrained` wrote into a folder, ready to answer.

    Args:
        trust: build whatever its recipe names, not only classes of known packages.

    Raises:
        UserError: no such folder, a newer lavi wrote it, or its weights do not fit what its recipe builds.
    """
    folder = home_path(folder)
    file = folder / RECIPE
    if not file.is_file() or not (folder / FUSION).is_file():
        missing = RECIPE if not file.is_file() else FUSION
        raise UserError(f"{folder} holds no model: it has no {missing} (export a run with `python -m lavi.export`).")
    for inside in folder.rglob("*"):
        if inside.suffix in PICKLES:
            raise UserError(f"{inside} is a pickle, which could run anything: only safetensors are read.")
    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        if TARGET not in node:
            raise KeyError(TARGET)
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{file} has no section 'model' that names a component by {TARGET}.") from None
    with open_safetensors(folder / FUSION) as weights:  # first, so that a newer lavi is named before what it brought
        recipe = Recipe({}, {}, str(file), trusted=trust).replaced("model", _resolved(node, folder))
        model = build(recipe)
        load_into(_other_weights(model), weights, folder / FUSION, reason="does not fit the model of its recipe")
    return model.eval()


def _resolved(node: Any, folder: Path) -> Any:
    """A recipe's node whose paths inside ``folder`` begin with it."""
    if isinstance(node, dict):
        return {key: _resolved(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, folder) for value in node]
    return str(folder / node) if isinstance(node, str) and node.startswith(INSIDE) else node

"""A model in a folder: an ordinary checkpoint of each half, the weights of what joins them, and what builds it.

FOLDER/recipe.yaml           the recipe's model section; values that begin with ./ are paths inside the folder
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
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lavi.errors import UserError, nearest
from lavi.language.lora import original_name
from lavi.recipe import TARGET, Recipe

if TYPE_CHECKING:
    from lavi.model import VisionLanguageModel

RECIPE, TRAINED, FUSION = "recipe.yaml", "trained.safetensors", "fusion.safetensors"
PACKAGES = ("lavi", "torch", "lightning", "transformers", "peft", "open_clip_torch", "webdataset")
CARRIED = "carried"
"""Where a module, and the header of its checkpoint, name the parameters that the run it started from brought."""
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
INSIDE = "./"

# --- files of weights -------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_state(state: Mapping[str, Tensor], file: Path, **header: str) -> None:
    """Write weights, and in the header the versions and ``header``; a file that is there is replaced in one step."""
    part = file.with_name(f"{file.name}.part")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        part,
        metadata={"versions": json.dumps(versions()), **header},
    )
    os.replace(part, file)


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that train, each shared one once (tied embeddings have two names)."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def kept_names(module: nn.Module) -> set[str]:
    """Names of what differs from the original checkpoints: what trains, and what another run brought (``carried``)."""
    return trained_names(module) | getattr(module, CARRIED, set())


@contextmanager
def opened(file: Path, *, instead: str = "") -> Iterator[Any]:
    """A file of weights, open for reading.

    Args:
        instead: what to do where there is none.

    Raises:
        UserError: there is none, it cannot be read, or a newer lavi wrote it.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}{instead}.")
    try:
        with safe_open(file, framework="pt") as weights:
            _refuse_newer(file, weights.metadata() or {})
            yield weights
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable checkpoint ({error}).") from None


def _refuse_newer(file: Path, header: Mapping[str, str]) -> None:
    theirs, ours = json.loads(header.get("versions", "{}")).get("lavi"), versions().get("lavi")
    if theirs and ours and Version(theirs) > Version(ours):
        raise UserError(f"{file} was written by lavi {theirs}, and this is lavi {ours}: upgrade lavi to read it.")


def compare(wanted: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
    """Hold the names and shapes in an open file against those ``wanted``; loads nothing.

    Raises:
        UserError: they differ, for ``reason``.
    """
    given = set(weights.keys())
    for kind, names in (("lacks", set(wanted) - given), ("has besides", given - set(wanted))):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise UserError(f"{file} {reason}: it {kind} {len(names)} parameters ({some} ...).")
    for name, tensor in wanted.items():
        compare_shape(tensor, weights, name, file, reason=reason)


def compare_shape(tensor: Tensor, weights: Any, name: str, file: Path, *, reason: str) -> None:
    """Hold one weight of an open file against the one it is for.

    Raises:
        UserError: its shape is another one, for ``reason``.
    """
    shape = weights.get_slice(name).get_shape()
    if list(tensor.shape) != shape:
        raise UserError(f"{file} {reason}: {name} is {shape} in the file, {list(tensor.shape)} in the model.")


def fill(wanted: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
    """:func:`compare`, then copy the weights of an open file into ``wanted``."""
    compare(wanted, weights, file, reason=reason)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights.get_tensor(name))


def start_from(module: nn.Module, run: Path) -> set[str]:
    """Load what ``run`` trained (and what it had started from) into the parameters of ``module``; their names.

    Adapters do not matter to the names: a run that trained a language model is a start for adapters around it.

    Raises:
        UserError: not a run folder, or ``module`` has no such parameter, or one of another shape.
    """
    mine = {original_name(name): (name, parameter) for name, parameter in module.named_parameters()}
    found: dict[str, Tensor] = {}
    file = run / TRAINED
    with opened(file, instead=": give module.start_from a run folder of `python -m lavi.fit`") as weights:
        for name in weights.keys():  # noqa: SIM118
            if original_name(name) not in mine:
                near = "give model.language the same lora." if ".lora_" in name else nearest(name, mine)
                raise UserError(f"{run} has trained '{name}', which the model of this recipe lacks: {near}")
            own, parameter = mine[original_name(name)]
            compare_shape(parameter, weights, name, file, reason="is no start for this recipe")
            found[own] = weights.get_tensor(name)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in found:
                parameter.copy_(found[name])
    return set(found)


# --- whole models -----------------------------------------------------------------------------------------------------


def build(recipe: Recipe) -> VisionLanguageModel:
    """The model of a recipe, which it remembers; what starts random is drawn from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.settings.get("seed", 0))
        model: VisionLanguageModel = recipe.build("model")
    model.made_from = recipe.settings["model"]  # type: ignore[assignment]
    return model


def save_pretrained(model: VisionLanguageModel, folder: Path) -> None:
    """Write ``model`` as the folder that the head of this file shows.

    Raises:
        UserError: the folder exists; the model was not built from a recipe; its backbone cannot be saved.
    """
    node: dict[str, Any] | None = getattr(model, "made_from", None)
    if node is None:
        raise UserError(
            "this model was put together by hand, so nothing says how to build it again: build it from a recipe with "
            "lavi.pretrained.build, or load a run with lavi.checkpoint.load_run."
        )
    if not hasattr(model.vision, "save_pretrained"):
        raise UserError(
            f"{type(model.vision).__name__} cannot be saved: a vision backbone needs save_pretrained(folder), as "
            "lavi.vision.hf.HFVision has it."
        )
    if folder.exists():
        raise UserError(f"{folder} exists and is left as it is: choose another folder.")
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True)
    try:
        _write(model, copy.deepcopy(node), part)
    except BaseException:
        shutil.rmtree(part)
        raise
    part.rename(folder)


def _write(model: VisionLanguageModel, node: dict[str, Any], folder: Path) -> None:
    language = {key: value for key, value in node["language"].items() if key not in ("config", "lora")}
    node["language"] = language | {"source": f"{INSIDE}language", "tokenizer": f"{INSIDE}tokenizer"}
    model.language.save_pretrained(folder / "language")
    model.language.tokenizer.save_pretrained(folder / "tokenizer")
    arguments: dict[str, Any] = model.vision.save_pretrained(folder / "vision")  # type: ignore[operator]
    paths = {k: f"{INSIDE}{'vision' / v}" if isinstance(v, Path) else v for k, v in arguments.items()}
    node["vision"] = {TARGET: node["vision"][TARGET], **paths}
    Recipe({}, {}, RECIPE).replaced("model", node)  # refuses what could not be built again
    write_state(_rest(model), folder / FUSION)
    (folder / RECIPE).write_text(yaml.safe_dump({"model": node}, sort_keys=False, allow_unicode=True, width=110))


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """The weights outside the tower and the language model."""
    return {name: t for name, t in model.state_dict().items() if name.split(".")[0] not in ("vision", "language")}


def from_pretrained(folder: Path, *, trust: bool = False) -> VisionLanguageModel:
    """The model that :func:`save_pretrained` wrote into a folder, ready to answer.

    Args:
        trust: build whatever its recipe names, not only classes of known packages.

    Raises:
        UserError: no such folder, a newer lavi wrote it, or its weights do not fit what its recipe builds.
    """
    file = folder / RECIPE
    if not file.is_file() or not (folder / FUSION).is_file():
        missing = RECIPE if not file.is_file() else FUSION
        raise UserError(f"{folder} holds no model: it has no {missing} (export a run with `python -m lavi.export`).")
    for inside in folder.rglob("*"):
        if inside.suffix in PICKLES:
            raise UserError(f"{inside} is a pickle, which could run anything: only safetensors are read.")
    try:
        node = yaml.safe_load(file.read_text())["model"]
        if TARGET not in node:
            raise KeyError(TARGET)
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{file} has no section 'model' that names a component by {TARGET}.") from None
    with opened(folder / FUSION) as weights:  # first, so that a newer lavi is named before what it brought
        recipe = Recipe({}, {}, str(file), trusted=trust).replaced("model", _resolved(node, folder))
        model = build(recipe)
        fill(_rest(model), weights, folder / FUSION, reason="does not fit the model of its recipe")
    return model.eval()


def _resolved(node: Any, folder: Path) -> Any:
    """A recipe's node with the paths that are inside ``folder`` made whole."""
    if isinstance(node, dict):
        return {key: _resolved(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [_resolved(value, folder) for value in node]
    return str(folder / node) if isinstance(node, str) and node.startswith(INSIDE) else node

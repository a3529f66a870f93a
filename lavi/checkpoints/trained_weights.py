"""The weights of a run that differ from the checkpoints its recipe names: those it trained, and those it inherited.

A run inherits the weights of the run that it started from. It keeps them in its own checkpoints, also where they are
frozen: the earlier run may be deleted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lavi.checkpoints.weight_files import check_compatible, check_shape, load_into, open_safetensors
from lavi.errors import UserError, nearest
from lavi.language.lora import LoRA, original_name

log = logging.getLogger("lavi")
TRAINED = "trained.safetensors"
"""The file of these weights in a run folder."""
INHERITED, RANKS = "inherited", "ranks"
"""Keys of its header: the names of the inherited weights, and the ranks that trained it."""
WITHIN = r"((?:^|\.)vision\.)tower\."
"""In the name of a parameter of a tower that another backbone goes around."""
NO_RUN = ": give a run folder of `python -m lavi.fit`"


class StartsFromRun:
    """A module whose recipe may name a run to start from."""

    start_from: str | None = None
    """Folder of that run."""
    inherited: frozenset[str] = frozenset()
    """Names of what it brought."""

    def inherit(self, names: Iterable[str]) -> None:
        """Note which parameters and buffers are from the run that this one started from."""
        self.inherited = frozenset(names)


def inherited_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that another run brought."""
    return module.inherited if isinstance(module, StartsFromRun) else frozenset()


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps, by name: parameters that train or that another run brought, and buffers beside them.

    Each shared parameter comes once (tied embeddings have two names). Buffers, such as the statistics of a batch norm,
    change where the tower, the fusion or the language model that has them trains.
    """
    inherited = inherited_names(module)
    kept = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad or name in inherited
    }
    training = {_part_of(name) for name, parameter in kept.items() if parameter.requires_grad}
    buffers = saved_buffers(module)
    return kept | {name: b for name, b in buffers.items() if _part_of(name) in training or name in inherited}


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, child in module.named_modules()
        for name, buffer in child.named_buffers(recurse=False)
        if name not in child._non_persistent_buffers_set
    }


def _part_of(name: str) -> tuple[str, ...]:
    """``model.vision`` of ``model.vision.tower.weight``."""
    return tuple(name.split(".")[:2])


def load_trained(module: nn.Module, file: Path) -> None:
    """Load the weights of a run into ``module``, whose other parameters come from their own checkpoints.

    Raises:
        UserError: no such file, not readable, or of another recipe: names or shapes differ.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        _check_strength(module, weights, file)
        tensors = _named_as_in(set(weights.keys()), _saved_in(module, weights))
        load_into(tensors, weights, file, reason="belongs to another recipe")


def _named_as_in(stored: set[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names they were stored with: a tower may have a backbone around it now that it had not.

    What goes around it (:class:`lavi.vision.reduced.ReducedTower`) has it as ``tower``.
    """
    within = {_without_wrapper(name): tensor for name, tensor in tensors.items()}
    return within if set(tensors) != stored == set(within) else tensors


def _without_wrapper(name: str) -> str:
    """``model.vision.weight`` of ``model.vision.tower.weight``."""
    return re.sub(WITHIN, r"\1", name, count=1)


def check_trained(module: nn.Module, file: Path, *, ranks: str) -> None:
    """Check the weights of a run that goes on against its recipe, and take over the names of those it inherited.

    Raises:
        UserError: as :func:`load_trained`, or the run was trained by other ``ranks``.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        _check_strength(module, weights, file)
        check_compatible(_saved_in(module, weights), weights, file, reason="belongs to another recipe")
        theirs = _header(weights).get(RANKS, ranks)
    if theirs != ranks:
        raise UserError(
            f"{file.parent} was trained by {theirs}, not by {ranks}, and can only go on so: resume it with the same "
            "trainer.devices and trainer.strategy, or begin anew with module.start_from."
        )


def _saved_in(module: nn.Module, weights: Any) -> dict[str, Tensor]:
    """The tensors of ``module`` that an open file should hold; those it inherited are named in the header."""
    if isinstance(module, StartsFromRun) and module.start_from is not None:
        module.inherit(json.loads(_header(weights).get(INHERITED, "[]")))
    saved, buffers, stored = saved_tensors(module), saved_buffers(module), set(weights.keys())
    if absent := [name for name in saved if name in buffers and not {name, _without_wrapper(name)} & stored]:
        log.warning(
            "%d buffers, such as %s, are not among the weights of this run, which was written before they were kept: "
            "they have the values of their own checkpoint.", len(absent), absent[0],
        )  # fmt: skip
    return {name: tensor for name, tensor in saved.items() if name not in absent}


def step_of_trained(file: Path) -> str | None:
    """The step that the weights are of, as their header has it."""
    with open_safetensors(file, instead=NO_RUN) as weights:
        return _header(weights).get("step")


def _header(weights: Any) -> dict[str, str]:
    return weights.metadata() or {}


def _check_strength(module: nn.Module, weights: Any, file: Path) -> None:
    """Adapters are scaled by alpha / r: those of another alpha would be another model.

    Raises:
        UserError: the run that wrote the file had another alpha / r than ``module`` has.
    """
    recipe = _header(weights).get("recipe")
    if recipe is None or not any(".lora_" in name for name in weights.keys()):  # noqa: SIM118
        return
    from peft.tuners.lora import LoraLayer

    model = yaml.safe_load(recipe)["model"]
    published_or_parts = (model, model.get("language") or {})
    settings = next((of["lora"] for of in published_or_parts if of.get("lora") is not None), None)
    if settings is None:  # a model of one's own
        return
    lora = LoRA.of(settings)
    ours = {layer.scaling["default"] for layer in module.modules() if isinstance(layer, LoraLayer)}
    if ours and ours != {lora.alpha / lora.rank}:
        raise UserError(
            f"{file.parent} has adapters of lora.alpha={lora.alpha:g} at lora.rank={lora.rank}; with another alpha "
            "they would be another model: set the same."
        )


def has_language(run: Path) -> bool:
    """Whether a run's weights have any of its language model besides adapters."""
    with open_safetensors(run / TRAINED, instead=NO_RUN) as weights:
        return any(".language." in f".{name}" and ".lora_" not in name for name in weights.keys())  # noqa: SIM118


def load_start(module: nn.Module, run: Path) -> set[str]:
    """Load the weights of another run into ``module``; the names of what was loaded.

    Adapters do not matter to the names: a run that trained a language model is a start for adapters around it.

    Raises:
        UserError: not a run folder, or ``module`` has no such parameter, or one of another shape, or adapters of
            another strength.
    """
    state = dict(module.named_parameters()) | saved_buffers(module)
    own = {original_name(name): (name, tensor) for name, tensor in state.items()}
    tensors: dict[str, Tensor] = {}
    file = run / TRAINED
    with open_safetensors(file, instead=": give module.start_from a run folder of `python -m lavi.fit`") as weights:
        _check_strength(module, weights, file)
        for name in weights.keys():  # noqa: SIM118
            stands = original_name(name)
            if stands not in own:  # the tower may have a backbone around it now
                stands = re.sub(r"((?:^|\.)vision\.)", r"\1tower.", stands, count=1)
            if stands not in own:
                near = "give model.language the same lora." if ".lora_" in name else nearest(name, own)
                raise UserError(f"{run} has trained '{name}', which the model of this recipe lacks: {near}")
            own_name, tensor = own[stands]
            check_shape(tensor, weights, name, file, reason="is no start for this recipe")
            tensors[own_name] = weights.get_tensor(name)
    with torch.no_grad():
        for name, loaded in tensors.items():
            state[name].copy_(loaded)
    return set(tensors)

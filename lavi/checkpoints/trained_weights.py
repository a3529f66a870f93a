"""The weights of a run that differ from the checkpoints its recipe names: those it trained, and those it inherited.

A run inherits the weights of the run that it started from. It keeps them in its own checkpoints, also where they are
frozen: the earlier run may be deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavi.checkpoints.weight_files import check_compatible, check_shape, load_into, open_safetensors
from lavi.errors import UserError, nearest
from lavi.language.lora import original_name

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
    """Names of the parameters whose weights it brought."""

    def inherit(self, names: Iterable[str]) -> None:
        """Note which parameters have their weights from the run that this one started from."""
        self.inherited = frozenset(names)


def inherited_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters whose weights another run brought."""
    return module.inherited if isinstance(module, StartsFromRun) else frozenset()


def saved_parameter_names(module: nn.Module) -> set[str]:
    """Names of the parameters that a checkpoint keeps, each shared one once (tied embeddings have two names)."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return trained | inherited_names(module)


def load_trained(module: nn.Module, file: Path) -> None:
    """Load the weights of a run into ``module``, whose other parameters come from their own checkpoints.

    Raises:
        UserError: no such file, not readable, or of another recipe: names or shapes differ.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        parameters = _named_as_in(set(weights.keys()), _saved_parameters(module, weights))
        load_into(parameters, weights, file, reason="belongs to another recipe")


def _named_as_in(stored: set[str], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters by the names they were stored with: a tower may have a backbone around it now that it had not.

    What goes around it (:class:`lavi.vision.reduced.ReducedTower`) has it as ``tower``.
    """
    within = {re.sub(WITHIN, r"\1", name, count=1): parameter for name, parameter in parameters.items()}
    return within if set(parameters) != stored == set(within) else parameters


def check_trained(module: nn.Module, file: Path, *, ranks: str) -> None:
    """Check the weights of a run that goes on against its recipe, and take over the names of those it inherited.

    Raises:
        UserError: as :func:`load_trained`, or the run was trained by other ``ranks``.
    """
    with open_safetensors(file, instead=NO_RUN) as weights:
        check_compatible(_saved_parameters(module, weights), weights, file, reason="belongs to another recipe")
        theirs = _header(weights).get(RANKS, ranks)
    if theirs != ranks:
        raise UserError(
            f"{file.parent} was trained by {theirs}, not by {ranks}, and can only go on so: resume it with the same "
            "trainer.devices and trainer.strategy, or begin anew with module.start_from."
        )


def _saved_parameters(module: nn.Module, weights: Any) -> dict[str, Tensor]:
    """The parameters of ``module`` that an open file should hold; those it inherited are named in the header."""
    if isinstance(module, StartsFromRun) and module.start_from is not None:
        module.inherit(json.loads(_header(weights).get(INHERITED, "[]")))
    names = saved_parameter_names(module)
    return {name: parameter for name, parameter in module.named_parameters() if name in names}


def step_of_trained(file: Path) -> str | None:
    """The step that the weights are of, as their header has it."""
    with open_safetensors(file, instead=NO_RUN) as weights:
        return _header(weights).get("step")


def _header(weights: Any) -> dict[str, str]:
    return weights.metadata() or {}


def load_start(module: nn.Module, run: Path) -> set[str]:
    """Load the weights of another run into the parameters of ``module``; the names of these parameters.

    Adapters do not matter to the names: a run that trained a language model is a start for adapters around it.

    Raises:
        UserError: not a run folder, or ``module`` has no such parameter, or one of another shape.
    """
    parameters = {original_name(name): (name, parameter) for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    file = run / TRAINED
    with open_safetensors(file, instead=": give module.start_from a run folder of `python -m lavi.fit`") as weights:
        for name in weights.keys():  # noqa: SIM118
            stands = original_name(name)
            if stands not in parameters:  # the tower may have a backbone around it now
                stands = re.sub(r"((?:^|\.)vision\.)", r"\1tower.", stands, count=1)
            if stands not in parameters:
                near = "give model.language the same lora." if ".lora_" in name else nearest(name, parameters)
                raise UserError(f"{run} has trained '{name}', which the model of this recipe lacks: {near}")
            own_name, parameter = parameters[stands]
            check_shape(parameter, weights, name, file, reason="is no start for this recipe")
            tensors[own_name] = weights.get_tensor(name)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
    return set(tensors)

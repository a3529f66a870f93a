"""Files of weights: what a model keeps, the versions that wrote it, and reading it back only where it fits."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lavi.errors import UserError, nearest
from lavi.language.lora import original_name

TRAINED = "trained.safetensors"
"""What a run keeps, in its folder."""
INHERITED = "inherited"
"""Where a module, and the header of its checkpoint, name the parameters that the run it started from brought."""
PACKAGES = ("lavi", "torch", "lightning", "transformers", "peft", "open_clip_torch", "webdataset")


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; what was written replaces ``file`` in one step, once it is on the disk.

    If writing fails, ``file`` stays as it was, and what was written is removed.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def save_state(state: Mapping[str, Tensor], file: Path, **header: str) -> None:
    """Write weights, and in the header the versions and ``header``."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        file,
        metadata={"versions": json.dumps(versions()), **header},
    )
    make_readable(file)


def make_readable(file: Path) -> None:
    """Give a file the permissions of any new file; what safetensors writes only its owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def write_state(state: Mapping[str, Tensor], file: Path, **header: str) -> None:
    """:func:`save_state`; a file that is there is replaced in one step."""
    with replacing(file) as part:
        save_state(state, part, **header)


def trained_names(module: nn.Module) -> set[str]:
    """Names of the parameters that train, each shared one once (tied embeddings have two names)."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def saved_parameter_names(module: nn.Module) -> set[str]:
    """Names of what differs from the original checkpoints: what trains, and what another run brought."""
    return trained_names(module) | getattr(module, INHERITED, set())


@contextmanager
def open_safetensors(file: Path, *, instead: str = "") -> Iterator[Any]:
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


def check_compatible(wanted: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
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
        check_shape(tensor, weights, name, file, reason=reason)


def check_shape(tensor: Tensor, weights: Any, name: str, file: Path, *, reason: str) -> None:
    """Hold one weight of an open file against the one it is for.

    Raises:
        UserError: its shape is another one, for ``reason``.
    """
    shape = weights.get_slice(name).get_shape()
    if list(tensor.shape) != shape:
        raise UserError(f"{file} {reason}: {name} is {shape} in the file, {list(tensor.shape)} in the model.")


def load_into(wanted: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
    """:func:`check_compatible`, then copy the weights of an open file into ``wanted``."""
    check_compatible(wanted, weights, file, reason=reason)
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
    with open_safetensors(file, instead=": give module.start_from a run folder of `python -m lavi.fit`") as weights:
        for name in weights.keys():  # noqa: SIM118
            if original_name(name) not in mine:
                near = "give model.language the same lora." if ".lora_" in name else nearest(name, mine)
                raise UserError(f"{run} has trained '{name}', which the model of this recipe lacks: {near}")
            own, parameter = mine[original_name(name)]
            check_shape(parameter, weights, name, file, reason="is no start for this recipe")
            found[own] = weights.get_tensor(name)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in found:
                parameter.copy_(found[name])
    return set(found)

"""Files of weights (safetensors): written whole, with the versions that wrote them; read only where they fit."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lavi.config.files import replacing
from lavi.errors import UserError

PACKAGES = ("lavi", "torch", "lightning", "transformers", "peft", "open_clip_torch", "timm", "webdataset")
"""Those whose versions are written into headers and records."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result, where they are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


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


def check_compatible(parameters: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
    """Check that an open file has the weights of all ``parameters``, in their shapes, and no others; loads nothing.

    Raises:
        UserError: it does not; ``reason`` says what that means.
    """
    stored = set(weights.keys())
    for kind, names in (("lacks", set(parameters) - stored), ("has besides", stored - set(parameters))):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise UserError(f"{file} {reason}: it {kind} {len(names)} parameters ({some} ...).")
    for name, tensor in parameters.items():
        check_shape(tensor, weights, name, file, reason=reason)


def check_shape(tensor: Tensor, weights: Any, name: str, file: Path, *, reason: str) -> None:
    """Check that one weight of an open file has the shape of the parameter it is for.

    Raises:
        UserError: it has another; ``reason`` says what that means.
    """
    shape = weights.get_slice(name).get_shape()
    if list(tensor.shape) != shape:
        raise UserError(f"{file} {reason}: {name} is {shape} in the file, {list(tensor.shape)} in the model.")


def load_into(parameters: Mapping[str, Tensor], weights: Any, file: Path, *, reason: str) -> None:
    """:func:`check_compatible`, then copy the weights of an open file into ``parameters``."""
    check_compatible(parameters, weights, file, reason=reason)
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(weights.get_tensor(name))

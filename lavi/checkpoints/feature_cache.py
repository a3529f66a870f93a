"""Whether features that were computed before are those that a model would compute now.

    a vision backbone's fingerprint:
        weights    a digest of its parameters and buffers
        layouts    how its tiling lays images of some sizes out
        pixels     of one drawn picture, as they reach it: preprocessing, image size
        features   of that picture: which layer, which tokens

Weights and layouts must be the same; pixels and features nearly, since machines round differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lavi.batch import Layout
from lavi.data.data_module import DataModule, FeatureRequest
from lavi.errors import UserError
from lavi.model import VisionLanguageModel
from lavi.vision.base import VisionBackbone

LAID_OUT = ((224, 224), (96, 64), (480, 640), (640, 480), (300, 1200), (1200, 300), (900, 1600), (2000, 2000))
"""(height, width) of the images whose layouts are compared."""
LAID_OUT_IN_TILES = ((3, 5), (5, 4), (7, 6), (12, 9), (9, 16))
"""The same of images of so many views: tilings that differ in the most views alone are told apart."""
PROBE_SIZE = (96, 64)
"""Height and width of the picture."""
PROBE_VALUES = 64
"""Numbers that are kept of its pixels, and of its features."""
TOLERANCE = {"pixels": 1e-3, "features": 2e-2}
"""The most that these may differ, relative to their length. Pixels come from the CPU; features in bf16 differ by some
thousandths."""
AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "16-mixed": torch.float16, "16": torch.float16}
"""What a trainer's precision casts to."""


@dataclass(frozen=True)
class Fingerprint:
    """Of a vision backbone with its preprocessing and tiling; plain numbers and texts."""

    weights: str
    layouts: str
    shape: list[int]
    """(views, N, Dv) of the picture's features."""
    pixels: list[float]
    features: list[float]

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing in which another one differs; None: nothing."""
        if self.weights != other.weights:
            return "of a vision backbone with other weights, in another dtype, or with other reductions of its tokens"
        if self.layouts != other.layouts:
            return "of images that were cut into other views: another tiling or image size"
        if not _alike(self.pixels, other.pixels, TOLERANCE["pixels"]):
            return "of images that were prepared in another way: another image size, preprocessing or tiling"
        if self.shape != other.shape or not _alike(self.features, other.features, TOLERANCE["features"]):
            return "of another layer, or of other tokens of the vision backbone"
        return None

    @property
    def plan(self) -> dict[str, Any]:
        """What unfinished features must have been made with, to be gone on with: the same to the last digit kept."""
        pixels = hashlib.sha256(" ".join(f"{value:.2f}" for value in self.pixels).encode()).hexdigest()
        return {"weights": self.weights, "layouts": self.layouts, "shape": self.shape, "pixels": pixels}


def _alike(first: Sequence[float], second: Sequence[float], tolerance: float) -> bool:
    one, other = np.array(first), np.array(second)
    return one.shape == other.shape and bool(np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other))


@torch.no_grad()
def fingerprint(model: VisionLanguageModel) -> Fingerprint:
    """The fingerprint of a model's vision backbone, tiling and preprocessing."""
    height, width = PROBE_SIZE
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(rows / (3 + c)) * np.cos(columns / (5 - c)) for c in range(3)]
    picture = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    pixels, layout = model.processor.views([picture])[0]
    pixels = pixels[:: max(1, len(pixels) - 1)]  # the first and the last view
    was_training = model.vision.training
    model.vision.eval()
    alone = [Layout(grid=layout.grid)] * len(pixels)
    features = model.encode(pixels.to(_device_of(model.vision)), alone).float().cpu()  # (views, N, Dv)
    model.vision.train(was_training)
    return Fingerprint(_digest(model.vision), _layouts(model), list(features.shape), _values(pixels), _values(features))


def _device_of(vision: nn.Module) -> torch.device:
    return next((parameter.device for parameter in vision.parameters()), torch.device("cpu"))


def _digest(vision: VisionBackbone) -> str:
    digest = hashlib.sha256(vision.variant.encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _layouts(model: VisionLanguageModel) -> str:
    """A digest of the layouts of images of some sizes, alone and beside others."""
    processor = model.processor
    _, *tile = processor.preprocessing.pixel_shape
    sizes = [*LAID_OUT, *((rows * tile[0], columns * tile[1]) for rows, columns in LAID_OUT_IN_TILES)]
    layouts = [
        processor.tiling.layout(Image.new("1", (width, height)), processor.preprocessing, alone=alone)
        for height, width in sizes
        for alone in (True, False)
    ]
    return hashlib.sha256(json.dumps(layouts).encode()).hexdigest()


def _values(tensor: Tensor) -> list[float]:
    """Values of a tensor, evenly spread."""
    values = tensor.flatten()
    return [float(value) for value in values[torch.linspace(0, len(values) - 1, PROBE_VALUES).long()]]


def feature_request(
    model: VisionLanguageModel, *, device: torch.device, precision: str, dtype: str, batch_size: int, threads: int
) -> FeatureRequest:
    """What a data module needs to write a model's features.

    Args:
        device: where the vision backbone is.
        precision: of the trainer that will read them: the backbone runs in it.
        dtype: of the features.

    Raises:
        UserError: features would not do for this model.
    """
    check_features_suffice(model)
    own, mixed = fingerprint(model), AUTOCAST_DTYPES.get(precision)

    @torch.no_grad()
    def encode(pixels: Tensor, layouts: Sequence[Layout]) -> Tensor:
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            return model.encode(pixels.to(device), layouts)

    made_by = own.plan | {"precision": precision, "dtype": dtype}
    together = model.vision.reads_layouts
    return FeatureRequest(encode, made_by, asdict(own), getattr(torch, dtype), together, batch_size, threads)


def check_features_suffice(model: VisionLanguageModel) -> None:
    """Whether a model needs no more of the vision backbone than its features.

    Raises:
        UserError: its reducer reads more, or its backbone the questions.
    """
    if model.vision.reads_questions:
        raise UserError(
            f"{type(model.vision).__name__} encodes an image anew for each question: name data with pixels."
        )
    if model.reducer is not None and model.reducer.reads_backbone:
        raise UserError(
            f"{type(model.reducer).__name__} reads the vision backbone at work, and features alone are kept of that: "
            "name data with pixels."
        )


def check_feature_caches(model: VisionLanguageModel, data: Any, splits: Sequence[str]) -> bool:
    """Refuse features that are not those of a model; whether there are any.

    Args:
        splits: of the data, that are about to be read; those that the data do not have are passed over.

    Raises:
        UserError: they are of another backbone, layer, image size, preprocessing or tiling; or features are not enough.
    """
    if not isinstance(data, DataModule):
        return False
    caches: dict[str, dict[str, Any]] = {}
    for split in splits:
        caches |= data.feature_caches(split) if split in data.splits else {}
    if not caches:
        return False
    check_features_suffice(model)
    own = fingerprint(model)
    for folder, notes in caches.items():
        theirs = Fingerprint(**{field.name: notes[field.name] for field in fields(Fingerprint)})
        if difference := own.difference(theirs):
            raise UserError(
                f"the features in {folder} are {difference}: make them anew (python -m lavi.cache_features), or set "
                "model.vision and model.tiling as they were."
            )
    return True

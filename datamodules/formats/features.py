"""Features of the images and videos of a sample, beside them in a shard (``python -m lavi.cache_features``).

KEY.json                    "features": the layout of each image and video, and the times of a video's frames
KEY.jpg ...                 as they were
KEY.features.safetensors    "0", "1" ...: (views, N, Dv) of each, as the vision backbone gave them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from datamodules.shards.read import BrokenSample, Raw
from lavi.batch import CachedVisual, Layout, Visual

if TYPE_CHECKING:  # shards without features are packed and looked at without it
    from torch import Tensor

MEMBER = "features.safetensors"
"""The type of the member with the features."""
DESCRIBED = "features"
"""The key of a sample's JSON that says what they are of."""
PAIRS = ("tiles", "size", "grid")
"""Fields of a layout that are pairs."""


class SeenVisual(NamedTuple):
    """An image or a video on its way to its features."""

    pixels: Tensor
    """(views, C, H, W)."""
    layout: Layout
    seconds: list[float]
    duration: float | None
    alone: bool | None
    """As :class:`lavi.batch.CachedVisual` has it."""


def with_features(record: dict[str, Any], visuals: Sequence[SeenVisual], features: Sequence[Tensor]) -> dict[str, Any]:
    """The JSON and the member of a sample with features.

    Args:
        features: (views, N, Dv) of each of its images and videos.
    """
    from safetensors.torch import save

    described = []
    for visual in visuals:
        layout = visual.layout._asdict().items()
        fields = {name: value for name, value in layout if value != Layout._field_defaults[name]}
        times = {"seconds": visual.seconds, "duration": visual.duration} if visual.layout.video else {}
        described.append(fields | times | ({} if visual.alone is None else {"alone": visual.alone}))
    tensors = {str(number): one.contiguous() for number, one in enumerate(features)}
    return {"json": record | {DESCRIBED: described}, MEMBER: save(tensors)}


def read_features(raw: Raw, record: dict[str, Any], decode: Callable[[], list[Visual]]) -> list[CachedVisual]:
    """The images and videos of a sample by their features.

    Args:
        decode: gives all of them as they are.

    Raises:
        BrokenSample: the member does not open, or does not fit what the JSON says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(raw[MEMBER])
        visuals = [
            _cached(dict(fields), tensors[str(number)], _DecodeOne(decode, number))
            for number, fields in enumerate(record[DESCRIBED])
        ]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BrokenSample(raw["__key__"], f"its member '{MEMBER}' cannot be read ({error})") from None
    if len(tensors) != len(visuals) or not all(map(_is_whole, visuals)):
        raise BrokenSample(raw["__key__"], f"its member '{MEMBER}' has other images than its JSON")
    return visuals


def _cached(fields: dict[str, Any], features: Tensor, decode: _DecodeOne) -> CachedVisual:
    beside = {name: fields.pop(name) for name in ("seconds", "duration", "alone") if name in fields}
    pairs: dict[str, Any] = {name: tuple(fields[name]) for name in PAIRS if fields.get(name) is not None}
    return CachedVisual(features, Layout(**(fields | pairs)), decode, **beside)


def _is_whole(visual: CachedVisual) -> bool:
    features = visual.features
    return features.is_floating_point() and features.dim() == 3 and len(features) == visual.layout.views


class _DecodeOne:
    """Decodes one of a sample's images or videos."""

    def __init__(self, decode: Callable[[], list[Visual]], number: int) -> None:
        self.decode, self.number = decode, number

    def __call__(self) -> Visual:
        return self.decode()[self.number]

"""Features of the images and videos of a sample, beside them in a shard (``python -m lavi.cache_features``).

KEY.json                    "features": what each image or video was like: its layout, times of its frames
KEY.jpg ...                 as they were
KEY.features.safetensors    "0", "1" ...: (views, N, Dv) of each, as the vision backbone gave them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from datamodules.shards.read import BrokenSample, Raw
from lavi.batch import CachedVisual, Layout, Video, Visual

if TYPE_CHECKING:  # shards without features are packed and looked at without it
    from torch import Tensor

MEMBER = "features.safetensors"
"""The type of the member with the features."""
RECORD = "features"
"""The key of a sample's JSON that says what they are of."""
PAIRS = ("tiles", "size", "grid")
"""Fields of a layout that are pairs."""


def with_features(
    record: dict[str, Any], visuals: Sequence[Visual], layouts: Sequence[Layout], features: Sequence[Tensor]
) -> dict[str, Any]:
    """The JSON and the member of a sample with features.

    Args:
        features: (views, N, Dv) of each of its images and videos.
    """
    from safetensors.torch import save

    described = [
        {name: value for name, value in layout._asdict().items() if value != Layout._field_defaults[name]}
        | ({"seconds": visual.seconds, "duration": visual.duration} if isinstance(visual, Video) else {})
        for visual, layout in zip(visuals, layouts, strict=True)
    ]
    tensors = {str(number): one.contiguous() for number, one in enumerate(features)}
    return {"json": record | {RECORD: described}, MEMBER: save(tensors)}


def read_features(raw: Raw, record: dict[str, Any], show: Callable[[], list[Visual]]) -> list[CachedVisual]:
    """The images and videos of a sample by their features.

    Args:
        show: decodes all of them.

    Raises:
        BrokenSample: the member does not open, or does not fit what the JSON says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(raw[MEMBER])
        described = [dict(one) for one in record[RECORD]]
        times = [(one.pop("seconds", []), one.pop("duration", None)) for one in described]
        layouts = [_layout(one) for one in described]
        features = [tensors[str(number)] for number in range(len(layouts))]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BrokenSample(raw["__key__"], f"its member '{MEMBER}' cannot be read ({error})") from None
    if len(tensors) != len(layouts) or any(
        not one.is_floating_point() or one.dim() != 3 or len(one) != layout.views
        for one, layout in zip(features, layouts, strict=True)
    ):
        raise BrokenSample(raw["__key__"], f"its member '{MEMBER}' has other images than its JSON")
    return [
        CachedVisual(of_one, layout, _Shown(show, number), seconds, duration)
        for number, (of_one, layout, (seconds, duration)) in enumerate(zip(features, layouts, times, strict=True))
    ]


def _layout(fields: dict[str, Any]) -> Layout:
    pairs: dict[str, Any] = {name: tuple(fields[name]) for name in PAIRS if fields.get(name) is not None}
    return Layout(**(fields | pairs))


class _Shown:
    """Decodes one of a sample's images or videos."""

    def __init__(self, show: Callable[[], list[Visual]], number: int) -> None:
        self.show, self.number = show, number

    def __call__(self) -> Visual:
        return self.show()[self.number]

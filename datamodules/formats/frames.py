"""Videos in a sample's JSON: clips, and videos that come as images of their frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from lavi.batch import Video
from lavi.data.frame_sampling import FrameSampling
from lavi.data.videos import CLIP_SLACK, span
from lavi.errors import UserError


class OpenedWhenAsked(Sequence[Image.Image]):
    """Images, each opened when it is asked for: of a thousand frames a few are kept."""

    def __init__(self, items: Sequence[Any], open_one: Callable[[Any], Image.Image]) -> None:
        self.items, self.open_one = items, open_one

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return OpenedWhenAsked(self.items[index], self.open_one)
        return self.open_one(self.items[index])


def from_frames(
    images: Sequence[Image.Image],
    sampling: FrameSampling,
    *,
    fps: float | None,
    clip: tuple[float, float] | None = None,
    clip_slack: float = CLIP_SLACK,
) -> Video:
    """A video of frames that were already taken out as images, thinned by the rule for videos.

    Args:
        images: in order, at equal intervals; each counts as a key frame.
        fps: how many there are of a second; None: not known. Then the video has no seconds, and ``how=fps`` keeps what
            ``uniform`` keeps.
        clip: from which second to which; by default all.
        clip_slack: up to so many seconds behind the last frame a clip's end is the end.

    Raises:
        UserError: there are no images, or ``fps`` is not positive; a clip that lies outside, or of unknown ``fps``.
    """
    if not images:
        raise UserError("a video of extracted frames has no frames: give it at least one image.")
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"extracted frames come at a positive number a second, not fps={fps!r}.")
    if fps is None:
        if clip is not None:
            raise UserError(
                "its 'clip' is in seconds, and how many frames are a second is not known: pack it with its 'fps'"
            )
        evenly = sampling if sampling.how == "keyframes" else FrameSampling(frames=sampling.frames)
        return Video([images[i] for i in evenly.pick(range(len(images)), 0, len(images))])
    seconds = [i / fps for i in range(len(images))]
    lasts = len(images) / fps
    start, stop = clip or (0.0, lasts)
    if not 0 <= start < min(stop, lasts) or stop > lasts + clip_slack:
        raise UserError(f"the clip {span(start, stop)} lies outside its frames, which last {lasts:.2f} seconds")
    stop = min(stop, lasts)
    indices = sampling.pick(seconds, start, stop)
    return Video([images[i] for i in indices], [max(0.0, seconds[i] - start) for i in indices], stop - start)


def extracted(
    images: Sequence[Image.Image],
    frames: Any,
    fps: Any,
    sampling: FrameSampling,
    *,
    clip: tuple[float, float] | None = None,
) -> list[Video]:
    """Images that are the frames of videos: the first ``frames[0]`` of the first one, and so on.

    Raises:
        UserError: the JSON's ``frames`` or ``fps`` are none, or speak of another number of images; as
            :func:`from_frames`.
    """
    if not isinstance(frames, list) or not all(is_number(count, int) and count > 0 for count in frames):
        raise UserError("its 'frames' are not a list with the number of each video's frames")
    if fps is not None and not (is_number(fps) and fps > 0):
        raise UserError("its 'fps' is no number, and must be above 0")
    if sum(frames) != len(images):
        raise UserError(f"its 'frames' speak of {sum(frames)} images, and it has {len(images)}")
    starts = [sum(frames[:number]) for number in range(len(frames))]
    return [
        from_frames(images[start : start + count], sampling, fps=fps, clip=clip)
        for start, count in zip(starts, frames, strict=True)
    ]


def clip_of(value: Any) -> tuple[float, float] | None:
    """The JSON's ``clip``, in seconds.

    Raises:
        UserError: it is not a start and an end.
    """
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))):
        raise UserError("its 'clip' is no time, and must be [start, end] in seconds")
    return float(value[0]), float(value[1])


def is_number(value: Any, kind: Any = int | float) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e18

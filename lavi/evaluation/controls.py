"""Controls of an evaluation: the same questions about the images of others, about none, and about noisy ones.

A model that answers the first two as well as its own does not look; what noise costs is how much it depends on detail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from lavi.batch import CachedVisual, Sample, Video, Visual, is_video
from lavi.data.images import upright_rgb

SHUFFLED = "shuffled images"
"""The control with the images of other samples."""
NO_IMAGE = "no image"
"""The control without images."""
WINDOW = 64
"""Samples that exchange their images with each other."""
LARGEST_WINDOW = 256 * 2**20
"""Bytes of decoded images above which fewer samples exchange theirs; of pixels, above which fewer prompts are answered
at a time."""


def noise_control(deviation: float) -> str:
    """The name of the control with noise of this deviation."""
    return f"noise of {deviation:g}"


def with_images_of_others(samples: Iterable[Sample], *, window: int = WINDOW) -> Iterator[Sample]:
    """The samples with each other's images: of one half a window away that has as many, of the same kinds.

    A sample without images stays as it is; one whose number or kinds of images no other has is left out.
    """
    waiting: dict[tuple[bool, ...], list[Sample]] = {}
    spare: dict[tuple[bool, ...], Sequence[Visual | CachedVisual]] = {}
    """Images of a sample that was exchanged before, for one that is left alone at the end."""
    for sample in samples:
        kinds = tuple(map(is_video, sample.images))
        if not kinds:
            yield sample
            continue
        alike = waiting.setdefault(kinds, [])
        alike.append(sample)
        full = len(alike) == window or sum(map(_image_bytes, alike)) > LARGEST_WINDOW / len(waiting)
        if full and len(alike) > 1:
            spare[kinds] = alike[0].images
            yield from _exchange_images(alike)
            alike.clear()
    for kinds, alike in waiting.items():
        if len(alike) > 1:
            yield from _exchange_images(alike)
        elif alike and kinds in spare:
            yield replace(alike[0], images=spare[kinds])


def _exchange_images(samples: Sequence[Sample]) -> Iterator[Sample]:
    half = len(samples) // 2
    for sample, other in zip(samples, [*samples[half:], *samples[:half]], strict=True):
        yield replace(sample, images=other.images)


def _image_bytes(sample: Sample) -> int:
    """Bytes of the decoded images and frames of a sample, or of their features."""
    return sum(
        visual.features.nbytes
        if isinstance(visual, CachedVisual)
        else sum(3 * image.width * image.height for image in (visual.frames if isinstance(visual, Video) else [visual]))
        for visual in sample.images
    )


def with_noise(sample: Sample, deviation: float, *, seed: int, cells: tuple[int, int] | None = None) -> Sample:
    """The sample with Gaussian noise on its images; features are left for the images themselves.

    Args:
        deviation: of the noise in each cell and colour, where 1 lies between black and white.
        cells: rows and columns of the noise, which is enlarged to the image: as many as a vision backbone sees, so that
            noise on a large image does not vanish when it is made smaller. None: those of each image.
    """
    rng = np.random.default_rng(seed)
    return replace(sample, images=[_noisy(visual, deviation, rng, cells) for visual in sample.images])


def _noisy(
    visual: Visual | CachedVisual, deviation: float, rng: np.random.Generator, cells: tuple[int, int] | None
) -> Visual:
    if isinstance(visual, CachedVisual):
        visual = visual.decode()
    if isinstance(visual, Video):
        return replace(visual, frames=[_noisy_image(frame, deviation, rng, cells) for frame in visual.frames])
    return _noisy_image(visual, deviation, rng, cells)


def _noisy_image(
    image: Image.Image, deviation: float, rng: np.random.Generator, cells: tuple[int, int] | None
) -> Image.Image:
    pixels = np.asarray(upright_rgb(image), dtype=np.float32)  # (height, width, 3)
    height, width = pixels.shape[:2]
    rows, columns = cells or (height, width)
    noise = rng.standard_normal((rows, columns, 3), dtype=np.float32)
    enlarged = noise[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
    return Image.fromarray((pixels + 255 * deviation * enlarged).clip(0, 255).round().astype(np.uint8))

"""Opening images, the same way wherever one comes from: a shard, a file on the command line."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lavi.batch import Video, Visual
from lavi.errors import UserError

MAX_PIXELS = 100_000_000
"""An image of more pixels than this is refused before it is decoded: it would be a decompression bomb."""

BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, TypeError, struct.error)
"""What Pillow raises for files that are none, or damaged."""


def open_image(
    source: Path | str | bytes, *, name: str | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Open an image to RGB, as people see it.

    Turned upright as its EXIF says; transparency on white; deep greys scaled to 8 bits, not clipped; of an animation
    the first frame.

    Args:
        source: a file, or its bytes.
        name: what an error calls it; by default the file.
        formats: of Pillow's, those that may be; None: all but EPS.

    Raises:
        UserError: no such file, not an image, one cut short or damaged, or one of more than :data:`MAX_PIXELS`.
    """
    called = name or ("this" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _read(Path(source))
    try:
        image = Image.open(io.BytesIO(data), formats=formats or _formats())
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{called} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} decoded.")
        image.load()  # before the EXIF, whose damage is forgiven: of a picture loaded again nothing is said
        _turn_upright(image)
        return _rgb(image)
    except Image.DecompressionBombError:
        raise UserError(f"{called} is a decompression bomb: it has more than {MAX_PIXELS} pixels.") from None
    except UnidentifiedImageError:
        kind = what_it_is(data)
        reason = f"it is {kind}" if kind else "no format known here"
        raise UserError(f"{called} is not an image that opens ({reason}).") from None
    except BROKEN as error:
        raise UserError(f"{called} is not an image that opens ({error}).") from None


JSON_TEXT = "a JSON text"
_FIRST_BYTES = (
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (8, b"WEBP", "a WEBP image"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftypheic", "a HEIC image"),
    (4, b"ftypmif1", "a HEIC image"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftyp", "an mp4 or mov video"),
    (0, b"\x1a\x45\xdf\xa3", "an mkv or webm video"),
    (0, b"\x1f\x8b", "compressed by gzip: decompress it with `gunzip`"),
    (0, b"BZh", "compressed by bzip2: decompress it with `bunzip2`"),
    (0, b"\xfd7zXZ\0", "compressed by xz: decompress it with `unxz`"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: decompress it with `unzstd`"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"PAR1", "a parquet file"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (257, b"ustar", "a tar file"),
)
_FIRST_WORDS = (
    ("<!doctype html", "an HTML page: a download that failed leaves one"),
    ("<html", "an HTML page: a download that failed leaves one"),
    ("<?xml", "an XML text: a download that failed leaves one"),
    ("<svg", "an SVG drawing"),
    ("{", JSON_TEXT),
    ("[", JSON_TEXT),
)


def what_it_is(head: bytes) -> str | None:
    """What a file is, whatever its name says, by its first bytes; None: nothing that people take for their data."""
    if not head.strip(b"\0 \r\n\t"):
        return "all zeros or blanks" if head else "empty"
    for at, signature, name in _FIRST_BYTES:
        if head.startswith(signature, at):
            return name
    text = head[:200].decode("utf-8-sig", errors="replace").lstrip().lower()
    return next((name for beginning, name in _FIRST_WORDS if text.startswith(beginning)), None)


def side_by_side(pictures: Sequence[Image.Image], *, gap: int = 4) -> Image.Image:
    """Pictures in a row on white, ``gap`` pixels apart."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    strip = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + gap
    return strip


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no image {file}.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read as an image ({error.strerror}).") from None


def _formats() -> list[str]:
    """All that Pillow reads, but for EPS: that would run Ghostscript on it."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def upright(visual: Visual) -> Visual:
    """An image as :func:`open_image` would give it; a video as it is."""
    return visual if isinstance(visual, Video) else upright_rgb(visual)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that is open already, as :func:`open_image` would give it; the image itself is not changed.

    Raises:
        UserError: it is damaged.
    """
    try:
        image.load()
    except BROKEN as error:
        raise UserError(f"the image is damaged ({error}).") from None
    with suppress(*BROKEN):
        image = ImageOps.exif_transpose(image)
    return _rgb(image)


def _turn_upright(image: Image.Image) -> None:
    with suppress(*BROKEN):  # of an image that opens, damaged EXIF is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _eight_bits(image: Image.Image) -> Image.Image:
    """A deep grey image to 8 bits; where the mode does not say what is white: the least white that holds all values."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    whites = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    brightest = float(values.max())
    white = next((white for white in whites if brightest <= white), brightest)
    return Image.fromarray((values * (255 / white)).clip(0, 255).round().astype(np.uint8))

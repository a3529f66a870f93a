"""Opening images: what people see is what a model gets, and what is no image says so in one sentence."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from datamodules.formats.conversations import Conversations
from datamodules.shards.read import BrokenSample
from lavi.data import images
from lavi.data.images import BROKEN, open_image, upright_rgb
from lavi.errors import UserError

decode = Conversations().decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def corners() -> Image.Image:
    """3 x 2, each corner known by its colour: red, green above; blue, white below."""
    image = Image.new("RGB", (3, 2), (9, 9, 9))
    for corner, colour in (((0, 0), RED), ((2, 0), GREEN), ((0, 1), BLUE), ((2, 1), WHITE)):
        image.putpixel(corner, colour)
    return image


def palette() -> Image.Image:
    """2 x 1: red, blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_colours_and_places_are_kept(kind: str, tmp_path: Path) -> None:
    data = encoded(corners(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image", str(tmp_path / "image")):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(image, corners())


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000), (1, 5000)], ids=str)
def test_small_and_long_images_open(size: tuple[int, int]) -> None:
    assert open_image(encoded(Image.new("RGB", size))).size == size


def test_greys_are_grey_and_black_and_white_is_both() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    assert np.array_equal(open_image(encoded(grey)), np.repeat(np.arange(256)[None, :, None], 3, axis=2))
    assert open_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None])
    assert deep.mode == "I;16"
    assert np.array_equal(np.asarray(open_image(encoded(deep, kind)))[0, :, 0], np.arange(256))


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 100, 255], [0, 100, 255]),
        (np.int32, [0, 257, 65535], [0, 1, 255]),
        (np.int32, [-5, 0, 131070], [0, 0, 255]),
        (np.float32, [0.0, 0.2, 1.0], [0, 51, 255]),
        (np.float32, [0.0, 100.0, 250.0], [0, 100, 250]),
        (np.float32, [np.nan, 0.0, 1.0], [0, 0, 255]),
    ],
)
def test_numbers_of_unknown_range_become_the_nearest_usual_one(
    dtype: type, values: list[float], expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert np.asarray(open_image(encoded(image, "TIFF")))[0, :, 0].tolist() == expected


def test_transparency_lies_on_white() -> None:
    clear, half = Image.new("RGBA", (2, 1), (*RED, 0)), Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    assert open_image(encoded(clear)).getpixel((0, 0)) == WHITE
    assert open_image(encoded(half)).getpixel((0, 0)) == (127,) * 3
    assert open_image(encoded(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == WHITE
    keyed = open_image(encoded(corners(), transparency=RED))
    assert (keyed.getpixel((0, 0)), keyed.getpixel((2, 0))) == (WHITE, GREEN)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_and_without_transparency(kind: str) -> None:
    plain = open_image(encoded(palette(), kind))
    keyed = open_image(encoded(palette(), kind, transparency=0))
    assert [plain.getpixel((x, 0)) for x in (0, 1)] == [RED, BLUE]
    assert [keyed.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_become_light(kind: str) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = open_image(encoded(ink, kind)).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "top_left"), [(1, RED), (3, WHITE), (6, BLUE), (8, GREEN), (2, GREEN)])
def test_images_stand_upright(kind: str, orientation: int, top_left: tuple[int, ...]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(encoded(corners(), kind, exif=exif, **settings))
    assert image.size == ((2, 3) if orientation in (6, 8) else (3, 2))
    assert image.getpixel((0, 0)) == top_left


def test_damaged_exif_does_not_lose_the_picture() -> None:
    assert np.array_equal(open_image(encoded(corners(), exif=b"Exif\0\0nothing of the kind")), corners())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings))
    assert image.getpixel((0, 0)) == RED


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
WRONG = {
    "empty": (b"", "is not an image that opens"),
    "text": (b"text, not pixels", "is not an image that opens"),
    "cut short": (encoded(Image.effect_noise((64, 64), 50).convert("RGB"))[:500], "is not an image that opens"),
    "a program": (POSTSCRIPT, "is not an image that opens"),
    "a bomb": (encoded(Image.new("1", (50000, 50000))), "bomb"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_image_says_so_and_what_it_was(case: str, tmp_path: Path) -> None:
    data, reason = WRONG[case]
    file = tmp_path / "wrong.png"
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"wrong.png .*{reason}") as caught:
        open_image(file)
    assert "object at" not in str(caught.value)
    with pytest.raises(BrokenSample, match=f"sample 'k': its member '0.png' .*{reason}"):
        decode({"__key__": "k", "txt": b"a", "0.png": data})


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html><html>404", "an HTML page: a download that failed leaves one"),
        (b"\xef\xbb\xbf \n<HTML>", "an HTML page: a download that failed leaves one"),
        (b'<?xml version="1.0"?><Error>', "an XML text: a download that failed leaves one"),
        (b'{"error": "not found"}', "a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer: fetch the file itself"),
        (b"\0\0\0\x18ftypmp42" + bytes(20), "an mp4 or mov video"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "an mkv or webm video"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC image"),
        (bytes(100), "all zeros or blanks"),
        (b"", "empty"),
    ],
    ids=str,
)
def test_what_stands_in_an_images_place_is_named(data: bytes, what: str) -> None:
    with pytest.raises(BrokenSample, match=f"its member 'jpg' is not an image that opens \\(it is {what}"):
        decode({"__key__": "k", "txt": b"a", "jpg": data})


def test_an_image_in_a_videos_place_is_named() -> None:
    with pytest.raises(BrokenSample, match=r"'mp4' does not open as a video \(it is a PNG image\)"):
        decode({"__key__": "k", "txt": b"a", "mp4": encoded(corners())})


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="has 11x10 pixels, more than the 100"):
        open_image(encoded(Image.new("RGB", (11, 10))), name="it")


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setitem(Image.OPEN, "EPS", (lambda file, name: pytest.fail("it was opened"), lambda prefix: True))
    with pytest.raises(UserError):
        open_image(POSTSCRIPT)


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no image .*gone\.jpg"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="cannot be read as an image"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "GIF"])
def test_a_damaged_picture_is_no_picture(kind: str) -> None:
    """What Pillow refuses to decode is refused, wherever it is damaged: nothing black or torn is trained on."""
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    settings = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    data = bytearray(encoded(noise, kind, **settings))
    middle = slice(len(data) // 2, len(data) // 2 + 40)
    data[middle] = bytes(255 - value for value in data[middle])
    refused = 0
    for damaged in (bytes(data), bytes(data[: len(data) // 2]), bytes(data[: len(data) * 9 // 10])):
        try:
            image = Image.open(io.BytesIO(damaged))
        except BROKEN:  # its very head
            continue
        try:
            image.load()
        except BROKEN:
            refused += 1
            with pytest.raises(UserError, match="not an image that opens"):
                open_image(damaged)
            with pytest.raises(UserError, match="is damaged"):
                upright_rgb(Image.open(io.BytesIO(damaged)))
    assert refused


def test_no_damage_escapes_as_another_error() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((20, 24), 60).convert("RGB")
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"] + ["AVIF"] * features.check("avif")
    whole = [encoded(noise, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})) for kind in kinds]
    numbers = random.Random(0)
    opened = refused = 0
    for _ in range(3000):
        data = bytearray(numbers.choice(whole))
        for _ in range(numbers.choice([1, 2, 16])):
            data[numbers.randrange(min(len(data), numbers.choice([32, 200, len(data)])))] = numbers.randrange(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
            opened += 1
        except UserError:
            refused += 1
    assert opened > 300
    assert refused > 300

"""Decoding pictures from strangers: what is read, and how everything else is refused."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
from hostler.errors import InvalidRequest
from PIL import Image

from workers.text.images import LOW_DETAIL_SIDE, decode

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves() -> Image.Image:
    """Red on the left, blue on the right, wider than high."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
def test_the_four_formats_are_read_as_rgb(kind: str) -> None:
    image = decode(encoded(halves(), kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), RED, strict=True)) < 40  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "PDF", "TGA"])
def test_decoders_of_other_formats_never_see_the_bytes(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP or GIF"):
        decode(encoded(halves(), kind))


def test_a_picture_taken_sideways_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    image = decode(encoded(halves(), "PNG", exif=exif))
    assert image.size == (20, 40)
    assert (image.getpixel((10, 5)), image.getpixel((10, 35))) == (RED, BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        clear = clear.convert("P")
        options = {"transparency": 0}
    elif mode == "LA":
        clear = clear.convert("LA")
    assert decode(encoded(clear, "PNG", **options)).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_level() -> None:
    grey = Image.new("I;16", (4, 4), 0x8000)
    assert decode(encoded(grey, "PNG")).getpixel((1, 1)) == (128, 128, 128)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1_000_000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(100_000, 100_000), (9_000, 9_000), (31_000, 1), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header_without_decoding(size: tuple[int, int]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            decode(png_header(*size))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_refused_by_name(kind: str) -> None:
    frames = encoded(halves(), kind, save_all=True, append_images=[Image.new("RGB", (40, 20), BLUE)], duration=50)
    with pytest.raises(InvalidRequest, match="animated"):
        decode(frames)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
def test_damaged_files_are_refused_or_read_but_never_raise_anything_else(kind: str) -> None:
    rng = random.Random(0)
    noisy = Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3))
    whole = encoded(noisy, kind)
    refused = 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 30)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except InvalidRequest:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"not an image" * 100])
def test_stubs_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(data)


def test_low_detail_makes_large_pictures_smaller_and_leaves_small_ones() -> None:
    large = encoded(Image.new("RGB", (2000, 1000), RED), "JPEG")
    assert decode(large, low_detail=True).size == (LOW_DETAIL_SIDE, LOW_DETAIL_SIDE // 2)
    assert decode(large).size == (2000, 1000)
    assert decode(encoded(halves(), "PNG"), low_detail=True).size == (40, 20)

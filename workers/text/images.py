"""Bytes of an uploaded picture → a decoded RGB image, within bounds. Above: `vision.py`; below: Pillow.

The bytes come from strangers. Only four formats' decoders ever see them, the header's size is checked before one
pixel is decoded, and whatever a decoder raises costs this request only.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from hostler.errors import InvalidRequest
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
"""Decoded it is 192 MB. The largest phone cameras make pictures of 50 million."""
MAX_SIDE = 30_000
LOW_DETAIL_SIDE = 512
_ANIMATED = ("PNG", "WEBP", "GIF")
_DECODER_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,  # Pillow's own for broken PNG chunks
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, *, low_detail: bool = False) -> Image.Image:
    """Return the picture upright, in RGB, transparency laid over white.

    Args:
        data: the file's bytes.
        low_detail: scale it down to 512 pixels on its longer side.

    Raises:
        InvalidRequest: not an image of the four formats, broken, animated, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes: ours are checked here; of broken EXIF: read as none
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check(image)
            if low_detail:
                image.draft("RGB", (2 * LOW_DETAIL_SIDE, 2 * LOW_DETAIL_SIDE))
            image.load()
            upright = _rgb(ImageOps.exif_transpose(image))
    except InvalidRequest:
        raise
    except _DECODER_ERRORS:
        names = ", ".join(FORMATS[:-1])
        raise InvalidRequest(
            f"An image could not be decoded: it is broken, or not {names} or {FORMATS[-1]}.", param="messages"
        ) from None
    if low_detail:
        upright.thumbnail((LOW_DETAIL_SIDE, LOW_DETAIL_SIDE), Image.Resampling.BICUBIC)
    return upright


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InvalidRequest(
            f"An image of {width} × {height} pixels is too large: at most {MAX_PIXELS // 10**6} million pixels and "
            f"{MAX_SIDE} on a side. Scale it down.",
            param="messages",
        )
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        raise InvalidRequest("An image is animated. Send the frame that you mean as a still image.", param="messages")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, which a plain conversion would clip to white
        image = image.convert("I").point(lambda level: level / 256).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")

"""Media parts of a chat message → bytes. Above: `messages`; below: `fields`.

Only bytes that travel inside the request are read here. Addresses of images are noted for `linked_images`, which the
route asks later; other addresses and file ids are refused by name.
"""

from __future__ import annotations

import base64
import binascii

from hostler.errors import InvalidRequest, UnsupportedParameter
from hostler.inference.v1 import inference_pb2 as pb

from gateway.fields import Fields, show
from gateway.links import Link

_MAX_MIME_CHARS = 128
_MAX_URL_CHARS = 8192
_NO_CAP = 1 << 62


def image_part(part: Fields, links: list[Link]) -> pb.Part:
    """Return an image from `{"image_url": {"url": "data:…", "detail": …}}` (or the URL alone).

    An http address is added to `links`, and its part has no data.
    """
    value = part.raw("image_url")
    if isinstance(value, str):
        return pb.Part(image=image_of_url(value, part.name_of("image_url"), links))
    image = part.required_child("image_url")
    url = image.string("url", _NO_CAP)
    if url is None:
        raise image.missing("url")
    media = image_of_url(url, image.name_of("url"), links)
    media.detail = image.choice("detail", ("auto", "low", "high", "original")) or ""
    return pb.Part(image=media)


def image_of_url(url: str, name: str, links: list[Link]) -> pb.Media:
    """Return the image in a data: URL; an http address is added to `links`, and its image has no data.

    Raises:
        InvalidRequest: neither of them, or the data is not valid base64; errors name the field `name`.
    """
    if not url[:8].lower().startswith(("http://", "https://")):
        return _from_data_url(url, name)
    if len(url) > _MAX_URL_CHARS:
        raise InvalidRequest(f"Invalid '{name}': an address of more than {_MAX_URL_CHARS} characters.", param=name)
    links.append(Link(url, name))
    return pb.Media()


def audio_part(part: Fields) -> pb.Part:
    """Return audio from `{"input_audio": {"data": base64, "format": "wav"}}`."""
    audio = part.required_child("input_audio")
    data = audio.string("data", _NO_CAP)
    if data is None:
        raise audio.missing("data")
    kind = audio.string("format", 32) or ""
    if data.startswith("data:"):
        return pb.Part(audio=_from_data_url(data, audio.name_of("data")))
    decoded = decode_base64(data, audio.name_of("data"))
    return pb.Part(audio=pb.Media(data=decoded, mime_type=f"audio/{kind}" if kind else ""))


def file_part(part: Fields) -> pb.Part:
    """Return a file from `{"file": {"file_data": "data:…", "filename": …}}`."""
    return read_file(part.required_child("file"))


def read_file(file: Fields) -> pb.Part:
    """Return a file from `{"file_data": "data:…", "filename": …}`."""
    if file.raw("file_id") is not None:
        raise UnsupportedParameter(
            f"'{file.name_of('file_id')}' is not supported. Send the file itself in 'file_data'.",
            param=file.name_of("file_id"),
        )
    data = file.string("file_data", _NO_CAP)
    if data is None:
        raise file.missing("file_data")
    name = file.name_of("file_data")
    media = _from_data_url(data, name) if data.startswith("data:") else pb.Media(data=decode_base64(data, name))
    media.detail = file.string("filename", 256) or ""
    return pb.Part(file=media)


def _from_data_url(url: str, name: str) -> pb.Media:
    if not url.startswith("data:"):
        if url.startswith(("http://", "https://")):
            raise UnsupportedParameter(
                f"'{name}': addresses are not fetched. Send the bytes as a data: URL.", param=name
            )
        raise InvalidRequest(f"Invalid '{name}': expected a data: URL, but got {show(url[:40])}.", param=name)
    head, comma, payload = url[5:].partition(",")
    mime_type, _, encoding = head.partition(";")
    if not comma or not head.endswith("base64") or not encoding or len(mime_type) > _MAX_MIME_CHARS:
        raise InvalidRequest(f"Invalid '{name}': expected data:<type>;base64,<data>.", param=name)
    return pb.Media(data=decode_base64(payload, name), mime_type=mime_type)


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes that a field `name` holds as base64.

    Raises:
        InvalidRequest: empty, or not base64.
    """
    if not text:
        raise InvalidRequest(f"Invalid '{name}': the data is empty.", param=name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"Invalid '{name}': not valid base64.", param=name) from None

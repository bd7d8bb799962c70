"""A multipart body → its fields and its file: caps, patience, the streaming parser. Above: routes; below: `body`.

The body is parsed as it arrives and given up at the first byte too many, so that what is kept never exceeds the caps,
whether the client says its length or sends chunks. Names and types that a client gives its file are not believed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import python_multipart.exceptions
from hostler.errors import InvalidRequest, PayloadTooLarge, PermissionDenied, UnsupportedMedia
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive

from gateway.body import body_chunks

MAX_FILE_BYTES = 25 * 2**20
"""OpenAI's."""

_MAX_FIELD_BYTES = 64 * 1024
_MAX_FIELDS = 64
_MAX_OVERHEAD_BYTES = 1024 * 1024
_TOO_LARGE = f"The file is larger than {MAX_FILE_BYTES // 2**20} MB. Send a smaller one, or in parts."


@dataclass(frozen=True, slots=True)
class Form:
    """A parsed body.

    Attributes:
        fields: name → values, in order.
        file: the bytes of the part that was asked for; None if there is none.
        file_name: as claimed.
        file_type: as claimed.
    """

    fields: Mapping[str, list[str]]
    file: bytes | None = field(default=None, repr=False)
    file_name: str = ""
    file_type: str = ""


def refuse_foreign_pages(headers: Headers, allowed_origins: Collection[str]) -> None:
    """Refuse a form that a page of another site sends: browsers ask first for JSON, but not for forms (CSRF).

    Raises:
        PermissionDenied: it comes from an origin that is neither this server nor allowed by `cors`.
    """
    origin = headers.get("origin")
    if origin is None or "*" in allowed_origins or origin in allowed_origins:
        return
    if origin.partition("://")[2] != headers.get("host"):
        raise PermissionDenied("This page may not use the server. Allow its origin with 'cors'.")


async def read_form(headers: Headers, receive: Receive, file_field: str) -> Form:
    """Read and parse a multipart body whose part `file_field` is a file of at most `MAX_FILE_BYTES`.

    Raises:
        UnsupportedMedia: the body is something else.
        PayloadTooLarge: the file, or all of it, is too large.
        RequestTimeout: nothing came for a minute.
        ClientGone: the client left while sending.
        InvalidRequest: malformed, cut short, or with fields that are too many or too long.
    """
    kind, options = parse_options_header(headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise UnsupportedMedia("The body must be a form with a file: send 'Content-Type: multipart/form-data'.")
    if not boundary or len(boundary) > 256:
        raise InvalidRequest("The Content-Type header names no boundary for multipart/form-data.")
    reading = _Reading(file_field)
    parser = reading.parser(boundary)
    try:
        async for chunk in body_chunks(headers, receive, MAX_FILE_BYTES + _MAX_OVERHEAD_BYTES, _TOO_LARGE):
            parser.write(chunk)
        parser.finalize()
    except python_multipart.exceptions.FormParserError:
        raise InvalidRequest("The request's body is not valid multipart/form-data.") from None
    return reading.form()


class _Reading:
    """What has been parsed so far."""

    def __init__(self, file_field: str) -> None:
        self._file_field = file_field
        self._fields: dict[str, list[str]] = {}
        self._num_fields = 0
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._part = bytearray()
        self._is_file = False
        self._file: bytes | None = None
        self._file_name = ""
        self._file_type = ""
        self._ended = False

    def parser(self, boundary: bytes) -> MultipartParser:
        """Return a parser that fills this."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_end,
                "on_end": self._finish,
            },
        )

    def form(self) -> Form:
        """Return the whole form.

        Raises:
            InvalidRequest: the body ended before the form did.
        """
        if not self._ended:
            raise InvalidRequest("The request's body ends in the middle of the form.")
        return Form(self._fields, self._file, self._file_name, self._file_type)

    def _begin(self) -> None:
        self._headers = {}
        self._part = bytearray()
        self._num_fields += 1
        if self._num_fields > _MAX_FIELDS:
            raise InvalidRequest(f"The form has more than {_MAX_FIELDS} fields.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = _text(options.get(b"name", b""), "a field's name")
        self._is_file = self._name == self._file_field
        if self._is_file:
            if self._file is not None:
                raise InvalidRequest(f"There is more than one '{self._name}'.", param=self._name)
            self._file_name = options.get(b"filename", b"").decode("utf-8", errors="replace")[:256]
            self._file_type = self._headers.get(b"content-type", b"").decode("latin-1")[:128]

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        most = MAX_FILE_BYTES if self._is_file else _MAX_FIELD_BYTES
        if len(self._part) + end - start > most:
            if self._is_file:
                raise PayloadTooLarge(_TOO_LARGE)
            raise InvalidRequest(f"A field of the form is longer than {_MAX_FIELD_BYTES} bytes.")
        self._part += data[start:end]

    def _on_end(self) -> None:
        if self._is_file:
            self._file = bytes(self._part)
        elif self._name:
            self._fields.setdefault(self._name, []).append(_text(bytes(self._part), f"'{self._name[:64]}'"))
        self._part = bytearray()

    def _finish(self) -> None:
        self._ended = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what[0].upper()}{what[1:]} is not UTF-8.") from None

"""A request's body → one JSON object: the cap, the patience, the one parser. Above: routes; below: `errors`."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from hostler.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from starlette.datastructures import Headers
from starlette.types import Receive

from gateway.errors import ClientGone, RequestTimeout

READ_TIMEOUT_S = 60.0
# A body of this many bytes or fewer can hold no more values than a few milliseconds of parsing.
_SMALL_BYTES = 256 * 1024
# Parsing holds the interpreter, so its cost must be bounded before it begins: 8 MB of "[],[],…" take two
# seconds. Brackets inside strings count, too; nothing that fits a context has so many.
_MAX_CONTAINERS = 150_000
_MAX_KEYS = 150_000


async def read_json(headers: Headers, receive: Receive, max_bytes: int) -> dict[str, Any]:
    """Read and parse the body.

    Raises:
        UnsupportedMedia: the content type says that it is something else.
        PayloadTooLarge: more than `max_bytes`, known from the header or while reading.
        RequestTimeout: nothing came for a minute.
        ClientGone: the client left while sending.
        InvalidRequest: not a JSON object.
    """
    _check_content_type(headers)
    return parse_json(await read_body(headers, receive, max_bytes))


def _check_content_type(headers: Headers) -> None:
    # A page of another site may send forms and plain text here without asking first (CSRF), but not JSON.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json") or (not kind and "origin" not in headers):
        return
    raise UnsupportedMedia("The body must be JSON: send 'Content-Type: application/json'.")


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """Read the body, never more than `max_bytes` of it.

    Raises:
        PayloadTooLarge, RequestTimeout, ClientGone: as `read_json` says.
    """
    too_large = f"The request's body is larger than {max_bytes} bytes. Send less."
    chunks = [chunk async for chunk in body_chunks(headers, receive, max_bytes, too_large)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def body_chunks(
    headers: Headers, receive: Receive, max_bytes: int, too_large: str
) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes, never more than `max_bytes` of it; `too_large` is said of what is longer.

    Raises:
        PayloadTooLarge, RequestTimeout, ClientGone: as `read_json` says.
        InvalidRequest: its declared length is no number.
    """
    declared = headers.get("content-length")
    if declared is not None and (not declared.isascii() or not declared.isdigit()):
        raise InvalidRequest("The Content-Length header is not a number.")
    if declared is not None and (len(declared) > 18 or int(declared) > max_bytes):
        raise PayloadTooLarge(too_large)
    num_bytes = 0
    while True:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                message = await receive()
        except TimeoutError:
            raise RequestTimeout("The request's body stopped arriving.") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise PayloadTooLarge(too_large)
        yield chunk
        if not message.get("more_body", False):
            return


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse one JSON object, strictly: no NaN, no infinite numbers, no lone surrogates, bounded depth and size.

    Raises:
        InvalidRequest: with the place of the fault, never its text.
    """
    if len(body) > _SMALL_BYTES:
        if body.count(b"[") + body.count(b"{") > _MAX_CONTAINERS or body.count(b'":') > _MAX_KEYS:
            raise InvalidRequest("The request's body holds too many JSON values.")
        value = _parse_without_pauses(body)
    else:
        value = _parse(body)
    if not isinstance(value, dict):
        raise InvalidRequest("The request's body must be a JSON object.")
    return value


def _parse(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not body:
            raise InvalidRequest("The request has no body; a JSON object is needed.") from None
        raise InvalidRequest(
            f"The request's body is not valid JSON (line {error.lineno}, column {error.colno})."
        ) from None


def _parse_without_pauses(body: bytes) -> Any:
    # Hundreds of thousands of new containers would set the cycle collector off several times.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _parse(body)
    finally:
        if enabled:
            gc.enable()

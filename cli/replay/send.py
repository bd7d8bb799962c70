"""Sends a client's requests to a server and judges the replies. Above: `cli.doctor_client`, tests; below: httpx."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import httpx

from cli.replay.exchange import Exchange, Reply, Verdict
from cli.replay.judge import problems_of

_MAX_BYTES = 16 * 1024 * 1024


def headers_of(exchange: Exchange, key: str | None) -> dict[str, str]:
    """Return a request's headers; without a key clients send a word in its place."""
    shown = key or "unused"
    bearer = {"Authorization": f"Bearer {shown}"} if exchange.sends_key in ("bearer", "both") else {}
    other = {"x-api-key": shown} if exchange.sends_key in ("x-api-key", "both") else {}
    return {**exchange.headers, **bearer, **other}


def send(http: httpx.Client, exchange: Exchange, key: str | None) -> Reply:
    """Send one request and read its reply to the end.

    Raises:
        httpx.HTTPError: no answer, or it broke off.
    """
    headers = headers_of(exchange, key)
    pieces: list[bytes] = []
    num_bytes = 0
    with http.stream(exchange.method, exchange.path, json=exchange.body, headers=headers) as response:
        for piece in response.iter_bytes():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > _MAX_BYTES:
                break
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return Reply(response.status_code, {k.lower(): v for k, v in response.headers.items()}, text)


def replay(http: httpx.Client, exchanges: Sequence[Exchange], key: str | None) -> Iterator[Verdict]:
    """Send one request after the other and yield how each went."""
    for exchange in exchanges:
        began = time.monotonic()
        try:
            reply = send(http, exchange, key)
        except httpx.HTTPError as error:
            problem = f"no answer: {error or type(error).__name__}"
            yield Verdict(exchange, 0, (problem,), time.monotonic() - began)
            continue
        yield Verdict(exchange, reply.status, tuple(problems_of(exchange, reply)), time.monotonic() - began)

"""The measuring client: streams chat replies over raw HTTP/1.1 and notes when each byte arrived.

Above: `load`. Below: asyncio and httptools only. JSON is read after a stream has ended, never while others
are being timed, so that the client takes as little as possible of a machine that it shares with the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import orjson


@dataclass(slots=True)
class StreamResult:
    """One reply.

    Attributes:
        began_s: when the request was written, on the clock of `time.perf_counter`.
        arrivals_s: when each event with text arrived.
        num_tokens: of the reply, as the server counted them; else the number of events with text.
        is_counted_by_server: whether the server said how many tokens there were.
        error: why it is not a full reply, or "".
    """

    began_s: float
    ended_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    is_counted_by_server: bool = False
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to the first text."""
        return self.arrivals_s[0] - self.began_s

    @property
    def inter_token_s(self) -> float:
        """Mean seconds between tokens after the first; servers may send several tokens in one event."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / max(1, self.num_tokens - 1)

    @property
    def max_gap_s(self) -> float:
        """Longest silence between two events with text."""
        return max((b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)), default=0.0)


class _Exchange(asyncio.Protocol):
    """One request and its streamed reply on one connection; httptools calls the `on_` methods."""

    def __init__(self, request: bytes, on_chunk: Callable[[], None] | None) -> None:
        self._request = request
        self._on_chunk = on_chunk
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self.began_s = 0.0
        self.chunks: list[tuple[float, bytes]] = []
        self.is_complete = False
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self.began_s = time.perf_counter()
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the time and take the bytes apart."""
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, whole or not."""
        self._end(exc)

    def on_body(self, chunk: bytes) -> None:
        """Keep the bytes with their time."""
        self.chunks.append((self._now_s, chunk))
        if self._on_chunk is not None:
            self._on_chunk()

    def on_message_complete(self) -> None:
        """End the exchange as whole."""
        self.is_complete = True
        self._end(None)

    @property
    def status(self) -> int:
        """HTTP status, 0 before there is one."""
        try:
            return int(self._parser.get_status_code())
        except httptools.HttpParserError:
            return 0

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


def _read_events(result: StreamResult, chunks: list[tuple[float, bytes]]) -> None:
    """Fill in what the events say; an event's time is that of the bytes that completed it."""
    pending = b""
    num_events = 0
    parts: list[str] = []
    for arrived_s, chunk in chunks:
        *events, pending = (pending + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if not line.startswith(b"data:") or (payload := line[5:].strip()) == b"[DONE]":
                    continue
                document: dict[str, Any] = orjson.loads(payload)
                if document.get("error"):
                    result.error = str(document["error"])
                if usage := document.get("usage"):
                    result.num_tokens = usage["completion_tokens"]
                    result.is_counted_by_server = True
                    result.num_prompt_tokens = usage["prompt_tokens"]
                for choice in document.get("choices") or ():
                    if text := (choice.get("delta") or {}).get("content"):
                        result.arrivals_s.append(arrived_s)
                        parts.append(text)
                        num_events += 1
    result.text = "".join(parts)
    result.num_tokens = result.num_tokens or num_events


async def stream_chat(
    url: str, body: dict[str, Any], within_s: float, on_chunk: Callable[[], None] | None = None
) -> StreamResult:
    """Send one streaming request and return its reply; failures are in `error`, nothing is raised.

    `on_chunk` is called in the loop for each piece of the reply's body, as it arrives.
    """
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    payload = orjson.dumps(body)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nAccept: text/event-stream\r\nConnection: close\r\n\r\n"
    )
    began_s = time.perf_counter()
    exchange = None
    transport = None
    try:
        async with asyncio.timeout(within_s):
            loop = asyncio.get_running_loop()
            transport, exchange = await loop.create_connection(
                lambda: _Exchange(head.encode() + payload, on_chunk), host, port
            )
            problem = await exchange.ended
    except TimeoutError:
        problem = TimeoutError(f"no end within {within_s:g} s")
    except OSError as error:
        problem = error
    finally:
        if transport is not None:
            transport.close()
    result = StreamResult(began_s=exchange.began_s if exchange else began_s, ended_s=time.perf_counter())
    if exchange is None or exchange.status != 200:
        answer = b"".join(chunk for _, chunk in exchange.chunks)[:300].decode(errors="replace") if exchange else ""
        result.error = f"HTTP {exchange.status}: {answer}" if exchange and exchange.status else repr(problem)
        return result
    _read_events(result, exchange.chunks)
    if not result.error and not exchange.is_complete:
        result.error = f"the stream broke off: {problem!r}"
    if not result.error and not result.arrivals_s:
        result.error = "the reply has no text"
    return result

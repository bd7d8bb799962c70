"""uvicorn, bent to our rules. The only file that knows it. Above: `__main__`; below: the application.

What it adds: an inherited listening socket, a stop that drains and exits 0, caps on request heads, errors of broken
HTTP in our JSON shape, small send buffers, and an abort that does not wait for a reader who reads nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvicorn
from hostler.errors import InvalidRequest
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import error_body
from gateway.lifetime import Lifetime
from gateway.streamed_reply import ABORT_EXTENSION

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
HEAD_TIMEOUT_S = 30.0
# What a refused client may still send before we hang up; reading it lets the client see the reply.
MAX_DISCARDED_BYTES = 256 * 1024 * 1024
SEND_BUFFER_BYTES = 128 * 1024
KEEP_ALIVE_S = 65
BACKLOG = 2048
# After the drain each client still gets its error frame.
_FAREWELL_S = 3


class Connection(HttpToolsProtocol):
    """One client connection."""

    _num_head_bytes = 0
    _num_discarded_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, with a deadline for the first request's head."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin one request; its scope can abort the connection."""
        super().on_message_begin()
        self._num_head_bytes = 0
        extensions: dict[str, Any] = {ABORT_EXTENSION: self.transport.abort}
        self.scope["extensions"] = extensions
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header."""
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; of a request that was answered already, only so much."""
        if self.cycle is not None and self.cycle.response_complete:
            self._num_discarded_bytes += len(body)
            if self._num_discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
                return
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        """Parse; a head over the cap ends the connection."""
        if self._num_head_bytes > MAX_HEAD_BYTES or self.transport.is_closing():
            return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and hang up."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error_body(InvalidRequest("The request is not valid HTTP, or its head is too long.")))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise ValueError("request head too long")  # the parser turns it into its own error: a 400

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class GatewayServer(uvicorn.Server):
    """A server whose stop has two steps: `drain_s` for running requests, then an error for the rest.

    Args:
        on_stop: called once the stop begins.
        on_drained: called once the drain's time is over.
    """

    def __init__(
        self, config: uvicorn.Config, *, drain_s: float, on_stop: Callable[[], None], on_drained: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._on_stop = on_stop
        self._on_drained = on_drained

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, however often they come; unlike uvicorn's own, end with exit status 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Accept no more, let requests finish, and end those that have not by the deadline."""
        if self.should_exit:
            return
        log.info("draining", extra={"drain_s": self._drain_s})
        self.should_exit = True
        for server in getattr(self, "servers", []):
            server.close()
        self._on_stop()
        asyncio.get_running_loop().call_later(self._drain_s, self._on_drained)


def build_server(app: ASGIApp, *, drain_s: float, lifetime: Lifetime) -> GatewayServer:
    """Return the server for an application whose requests share `lifetime`; `serve` runs it."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s) + _FAREWELL_S,
    )
    return GatewayServer(config, drain_s=drain_s, on_stop=lifetime.stop, on_drained=lifetime.expire)


def serve(server: GatewayServer, *listeners: socket.socket) -> None:
    """Serve on listening sockets, TCP or Unix, until a signal says stop."""
    for listener in listeners:
        # Accepted sockets inherit it. Without, the kernel takes megabytes for a reader that has stalled.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    server.run(sockets=list(listeners))

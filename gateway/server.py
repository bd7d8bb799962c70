"""uvicorn, bent to our rules. The only file that knows it. Above: `__main__`; below: the application.

What it adds: an inherited listening socket, a stop that drains and exits 0, caps on request heads, errors of broken
HTTP in our JSON shape, small send buffers, and an abort that does not wait for a reader who reads nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import re
import resource
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Literal, cast

import orjson
import uvicorn
from hostler.errors import HostlerError, InvalidApiKey, InvalidRequest
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.doors import READ_NO_MORE_EXTENSION
from gateway.errors import error_body
from gateway.lifetime import Lifetime
from gateway.streamed_reply import ABORT_EXTENSION

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
HEAD_TIMEOUT_S = 30.0
# What a refused client may still send before we hang up; reading it lets the client see the reply.
MAX_DISCARDED_BYTES = 256 * 1024 * 1024
# A stranger's body is not read unless it is small; then its connection can serve the next request.
SMALL_BODY_BYTES = 32 * 1024
# So long a connection stays whose body is left unread: closed at once, the reply would be lost with it.
LINGER_S = 2.0
SEND_BUFFER_BYTES = 128 * 1024
KEEP_ALIVE_S = 65
BACKLOG = 2048
# After the drain each client still gets its error frame.
_FAREWELL_S = 3
# For so long a gateway that has a successor still answers on connections that it has, and closes each behind its reply.
_HANDOVER_S = 1.0


# A key that no header may hold is a wrong key, not broken HTTP.
_UNREADABLE_KEY = re.compile(rb"(?im)^(?:authorization|x-api-key):[^\r\n]*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_KEY_HEADERS = (b"authorization:", b"x-api-key:")


def _fails_by_its_key(head: bytes) -> bool:
    """Return whether a head that cannot be read, or does not end, is so by the key in it. Looks at its beginning."""
    beginning = head[: 2 * MAX_HEAD_BYTES]
    last_line = beginning[beginning.rfind(b"\n") + 1 :][:32].lower()
    is_endless = len(head) > MAX_HEAD_BYTES and last_line.startswith(_KEY_HEADERS)
    return is_endless or _UNREADABLE_KEY.search(beginning) is not None


class _Lingering:
    """A transport that is closed a while after it was asked to be."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop

    def write(self, data: bytes) -> None:
        """Send."""
        self._transport.write(data)

    def close(self) -> None:
        """Close later."""
        self._loop.call_later(LINGER_S, self._transport.abort)


class Connection(HttpToolsProtocol):
    """One client connection."""

    # Set for the whole process once another gateway accepts in its place.
    last_reply = False
    _num_head_bytes = 0
    _num_discarded_bytes = 0
    _num_pieces_bytes = 0
    _in_head = False
    _has_long_key = False
    _head_came = False
    _was_refused = False
    _last_data = b""
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
        self._num_head_bytes = self._num_pieces_bytes = 0
        self._in_head = True
        extensions: dict[str, Any] = {
            ABORT_EXTENSION: self.transport.abort,
            READ_NO_MORE_EXTENSION: self.read_no_more,
        }
        self.scope["extensions"] = extensions
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header."""
        self._has_long_key = len(value) > MAX_HEAD_BYTES and name.lower() in (b"authorization", b"x-api-key")
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._stop_head_timer()
        super().on_headers_complete()
        self._in_head = False
        self._head_came = True
        if self.last_reply:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; of a request that was answered already, only so much."""
        if self.cycle is not None and self.cycle.response_complete:
            self._num_discarded_bytes += len(body)
            if self._num_discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
                return
        super().on_body(body)

    def read_no_more(self) -> None:
        """Leave what is still to come of a large body unread, and hang up once the reply has had time to arrive."""
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        is_small = length.isdigit() and int(length) <= SMALL_BODY_BYTES
        if not self.cycle.more_body or is_small:
            return
        self.flow.pause_reading()
        self.flow.read_paused = False  # so that the end of the reply does not lift it
        self.cycle.keep_alive = False  # which the reply says, too
        self.cycle.transport = cast(asyncio.Transport, _Lingering(self.transport, self.loop))

    def data_received(self, data: bytes) -> None:
        """Parse; a head over the cap ends the connection, a body waits to be asked for."""
        if self._was_refused or self.transport.is_closing():
            return
        # The parser tells of a header when all of it has come. What comes of a head after the piece that began it is
        # counted here, so that nobody makes us wait for the end of a megabyte.
        self._num_pieces_bytes += len(data) if self._in_head else 0
        self._last_data = self._last_data + data if self._in_head else data
        super().data_received(data)
        if self._in_head and self._num_pieces_bytes > MAX_HEAD_BYTES:
            self.send_400_response("request head too long")
        if self._was_refused or not self._in_head:
            self._last_data = b""
        if self._head_came:
            self._head_came = False
            if self.cycle.more_body:
                self.flow.pause_reading()  # until the application asks for the body, which it does of no stranger's

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or too long a head, and hang up once the client had time to see the answer."""
        if self._was_refused or self.transport.is_closing():
            return
        self._was_refused = True
        error: HostlerError = InvalidRequest("The request is not valid HTTP, or its head is too long.")
        if self._has_long_key or _fails_by_its_key(self._last_data):
            error = InvalidApiKey("Wrong API key.")
        body = orjson.dumps(error_body(error))
        status = HTTPStatus(error.http_status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        )
        self._stop_head_timer()
        self.transport.write(head.encode("ascii") + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)  # unread until then, the rest would take the reply with it

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

    `SIGTERM` and `SIGINT` are such a stop. `SIGUSR1` says that a successor accepts on the same socket: it stops, too,
    but has `reload_drain_s`; a `SIGTERM` shortens that.

    Args:
        ready_fd: where one byte is written once requests are accepted; None: nobody wants to know.
        lifetime: of the requests; it hears when the stop begins and when the drain's time is over.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_s: float,
        reload_drain_s: float = 3600.0,
        ready_fd: int | None = None,
        lifetime: Lifetime,
    ) -> None:
        super().__init__(config)
        self._public: tuple[uvicorn.Config, socket.socket] | None = None
        self._drain_s = drain_s
        self._reload_drain_s = reload_drain_s
        self._ready_fd = ready_fd
        self._retired = False
        self._leaving = False
        self._lifetime = lifetime

    def add_public(self, app: ASGIApp, listener: socket.socket) -> None:
        """Serve a second application on a second listening socket; both stop and drain as one."""
        self._public = _uvicorn_config(app, self._drain_s, lifespan="off"), listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so; on the public socket once what it shares with the local one is there."""
        _grow_file_table()
        await super().startup(sockets)
        if self._public is not None:
            await self._open_public(*self._public)
        if self._ready_fd is not None and self.started:
            os.write(self._ready_fd, b"1")
            os.close(self._ready_fd)

    async def _open_public(self, config: uvicorn.Config, listener: socket.socket) -> None:
        config.load()

        def connect() -> asyncio.Protocol:
            return Connection(config=config, server_state=self.server_state, app_state=self.lifespan.state)

        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_server(connect, sock=listener, backlog=config.backlog))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT, however often they come; unlike uvicorn's own, end with exit status 0."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.retire)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Accept no more, let requests finish, and end those that have not by the deadline."""
        if self._leaving:
            return
        self._leaving = True
        log.info("draining", extra={"drain_s": self._drain_s})
        self._accept_no_more()
        self._exit()
        asyncio.get_running_loop().call_later(self._drain_s, self._lifetime.expire)

    def retire(self) -> None:
        """Accept no more, since a successor does; let requests finish for as long as a reload grants them."""
        if self._leaving or self._retired:
            return
        self._retired = self._lifetime.has_successor = True
        log.info("retiring", extra={"drain_s": self._reload_drain_s})
        self.config.timeout_graceful_shutdown = math.ceil(self._reload_drain_s + _HANDOVER_S) + _FAREWELL_S
        self._accept_no_more()
        # What was accepted a moment ago has not been read yet, and a client may just be sending its next request.
        Connection.last_reply = True
        loop = asyncio.get_running_loop()
        loop.call_later(_HANDOVER_S, self._exit)
        loop.call_later(_HANDOVER_S + self._reload_drain_s, self._lifetime.expire)

    def _accept_no_more(self) -> None:
        for server in getattr(self, "servers", []):
            server.close()

    def _exit(self) -> None:
        if not self.should_exit:
            self.should_exit = True
            self._lifetime.stop()


def _grow_file_table() -> None:
    """Have the kernel's table of our open files grow now: in a process with threads it takes 10 ms, of one client's."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % sys.maxsize  # -1: none
    with open(os.devnull, "rb") as file:
        os.close(fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, min(BACKLOG, limit - 1)))


def build_server(
    app: ASGIApp,
    *,
    drain_s: float,
    lifetime: Lifetime,
    reload_drain_s: float = 3600.0,
    ready_fd: int | None = None,
) -> GatewayServer:
    """Return the server for an application whose requests share `lifetime`; `serve` runs it.

    The rest is as `GatewayServer` has it.
    """
    config = _uvicorn_config(app, drain_s, lifespan="on")
    return GatewayServer(
        config,
        drain_s=drain_s,
        reload_drain_s=reload_drain_s,
        ready_fd=ready_fd,
        lifetime=lifetime,
    )


def _uvicorn_config(app: ASGIApp, drain_s: float, *, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s) + _FAREWELL_S,
    )


def serve(server: GatewayServer, *listeners: socket.socket) -> None:
    """Serve on listening sockets, TCP or Unix, until a signal says stop."""
    for listener in listeners:
        # Accepted sockets inherit it. Without, the kernel takes megabytes for a reader that has stalled.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    server.run(sockets=list(listeners))

"""A stand-in for ngrok's edge on loopback: TLS under a public name, its headers, its page for browsers, its moods.

Above: the tests of public mode; below: asyncio, and trustme for the certificates. One request for each connection.
The knobs of `Moods` may be turned while it runs.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trustme

NAME = "roundhouse.ngrok-free.app"
_BROWSER = b"mozilla/"
_SKIP = b"ngrok-skip-browser-warning:"


@dataclass
class Moods:
    """What the way does to replies.

    Attributes:
        flush_s: bytes are held back and passed on so often; 0: at once; None: when the reply ends.
        idle_s: a reply that is silent for so long is cut off.
        cut_after_bytes: the connection is torn down after so many bytes of a reply.
    """

    flush_s: float | None = 0
    idle_s: float = 60.0
    cut_after_bytes: int | None = None


@dataclass
class StandIn:
    """A running edge.

    Attributes:
        authority: file with the certificate of the authority that clients must trust.
        heads: of the requests as they were passed on, lower case.
    """

    upstream_port: int
    authority: Path
    moods: Moods = field(default_factory=Moods)
    port: int = 0
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one request on and its reply back."""
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            head = await reader.readuntil(b"\r\n\r\n")
            fields = head.lower()
            if b"user-agent: " + _BROWSER in fields and _SKIP not in fields:
                await _answer(writer, 200, "ERR_NGROK_6024", b"<!DOCTYPE html><p>You are about to visit this site.")
            else:
                await self._pass(head, reader, writer)
        writer.close()

    async def _pass(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, *lines = head[:-4].split(b"\r\n")
        host = next(text[5:].strip() for text in lines if text.lower().startswith(b"host:"))
        length = next((int(text[15:]) for text in lines if text.lower().startswith(b"content-length:")), 0)
        kept = [text for text in lines if not text.lower().startswith((b"connection:", b"x-forwarded-"))]
        added = [b"X-Forwarded-For: 203.0.113.7", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: " + host]
        sent = b"\r\n".join([line, *kept, *added, b"Connection: close", b"", b""])
        self.heads.append(sent.lower())
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            await _answer(writer, 502, "ERR_NGROK_8012", b"The tunnel is up, and nobody answers behind it.")
            return
        try:
            forth.write(sent + (await reader.readexactly(length)))
            await forth.drain()
            await self._return(back, writer)
        finally:
            forth.close()

    async def _return(self, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        held, num_sent, last = b"", 0, loop.time()
        while piece := await asyncio.wait_for(back.read(65536), self.moods.idle_s):
            held += piece
            if self.moods.flush_s is None or loop.time() - last < self.moods.flush_s:
                continue
            writer.write(held)
            num_sent, held, last = num_sent + len(held), b"", loop.time()
            if self.moods.cut_after_bytes is not None and num_sent > self.moods.cut_after_bytes:
                writer.transport.abort()
                return
            await writer.drain()
        writer.write(held)
        await writer.drain()


async def _answer(writer: asyncio.StreamWriter, status: int, code: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status} -\r\nContent-Type: text/html\r\nNgrok-Error-Code: {code}\r\nConnection: close\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()


@contextmanager
def stand_in(upstream_port: int, directory: Path, port: int = 0) -> Iterator[StandIn]:
    """Run an edge in a thread of its own; it answers to `NAME` and to localhost."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME, "localhost").configure_cert(context)
    edge = StandIn(upstream_port, directory / "ca.pem")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    starting = asyncio.start_server(edge.serve, "127.0.0.1", port, ssl=context)
    server = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
    edge.port = server.sockets[0].getsockname()[1]
    try:
        yield edge
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _end(server: asyncio.Server) -> None:
    """Stop listening, and cut what is still passed on while there is a loop to do it in."""
    server.close()
    under_way = asyncio.all_tasks() - {asyncio.current_task()}
    for task in under_way:
        task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)

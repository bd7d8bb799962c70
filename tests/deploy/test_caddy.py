"""The Caddyfile: judged by Caddy, then run, with a stand-in for hostler's public port behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hostler.errors import PayloadTooLarge, Unavailable

from gateway.multipart import MAX_FILE_BYTES
from tests.checks.tree import ROOT

from . import tools

FILE = ROOT / "deploy" / "caddy" / "Caddyfile"
KEY = "a-key-that-must-not-be-logged"
WITHIN_S = 15.0
pytestmark = pytest.mark.timeout(300)


class Upstream:
    """Streams one event, then a second when it is told to; notes what it was asked and whether the reader left."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        self.got_a_body = False
        self.asked = asyncio.Event()
        self.is_slow = False
        self.server: asyncio.Server | None = None

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            if num_bytes := int(re.findall(r"(?i)content-length: (\d+)", self.heads[-1])[0]):
                await reader.readexactly(num_bytes)
                self.got_a_body = True
            begin = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            begin += b"f\r\ndata: first\r\n\r\n\r\n"
            self.asked.set()
            if not self.is_slow:
                writer.write(begin)
                await writer.drain()
            reads = asyncio.ensure_future(reader.read(1))
            goes_on = asyncio.ensure_future(self.go_on.wait())
            await asyncio.wait({reads, goes_on}, return_when=asyncio.FIRST_COMPLETED)
            goes_on.cancel()
            if reads.done():
                self.left.set()
            else:
                reads.cancel()
                writer.write(begin if self.is_slow else b"")
                writer.write(b"10\r\ndata: second\r\n\r\n\r\n0\r\n\r\n")
                await writer.drain()
        writer.close()


def adapted(upstream_port: int, port: int, text: str) -> dict[str, Any]:
    """Return the file as Caddy reads it, but listening on loopback alone, and not on port 80 as well."""
    done = subprocess.run(
        [tools.find("caddy"), "adapt", "--adapter", "caddyfile", "--config", "-"],
        input=text,
        env={"HOSTLER_UPSTREAM": f"127.0.0.1:{upstream_port}", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    config: dict[str, Any] = json.loads(done.stdout)
    (server,) = config["apps"]["http"]["servers"].values()
    server["listen"] = [f"127.0.0.1:{port}"]
    server["automatic_https"] = {"disable_redirects": True}
    return config


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """A running Caddy: where it listens, whom its clients must trust, and what it wrote."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.log = folder / "log"
        self._root = folder / "data" / "caddy" / "pki" / "authorities" / "local" / "root.crt"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection over TLS, once there is one to be had."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                with contextlib.suppress(OSError):
                    trust = ssl.create_default_context(cafile=str(self._root))
                    return await asyncio.open_connection("127.0.0.1", self.port, ssl=trust, server_hostname="localhost")
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[tuple[Proxy, Upstream]]:
    upstream = Upstream()
    server = upstream.server = await asyncio.start_server(upstream.answer, "127.0.0.1", 0)
    proxy = Proxy(free_port(), tmp_path)
    config = adapted(server.sockets[0].getsockname()[1], proxy.port, FILE.read_text(encoding="utf-8"))
    (tmp_path / "caddy.json").write_text(json.dumps(config), encoding="utf-8")
    log = os.open(proxy.log, os.O_WRONLY | os.O_CREAT)
    caddy = await asyncio.create_subprocess_exec(
        *(tools.find("caddy"), "run", "--config", str(tmp_path / "caddy.json")),
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    os.close(log)
    try:
        yield proxy, upstream
    finally:
        upstream.go_on.set()
        caddy.kill()
        await caddy.wait()
        server.close()


def request(path: str, *headers: str) -> bytes:
    head = (f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", f"X-Api-Key: {KEY}", *headers)
    return ("\r\n".join(head) + "\r\n\r\n").encode()


def test_caddy_takes_the_file_and_would_write_it_the_same() -> None:
    caddy = tools.find("caddy")
    environ = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "HOSTLER_DOMAIN": "llm.example.org"}
    for command in (["validate", "--adapter", "caddyfile", "--config"], ["fmt", "--diff"]):
        done = subprocess.run(
            [caddy, *command, str(FILE)], env=environ, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


async def test_each_event_is_passed_on_as_it_comes_and_nothing_tells_of_the_key(tmp_path: Path) -> None:
    async with running(tmp_path) as (proxy, upstream):
        reader, writer = await proxy.connect()
        writer.write(request("/v1/chat/completions", "Content-Length: 0", "Accept-Encoding: gzip", "Connection: close"))
        async with asyncio.timeout(WITHIN_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readuntil(b"data: first\r\n\r\n")  # While the second waits for a word of ours.
            upstream.go_on.set()
            assert b"data: second\r\n\r\n" in await reader.read()
        writer.close()
        assert "content-encoding" not in head
        assert "strict-transport-security: max-age=" in head
        assert "\r\nvia:" not in head
        (asked,) = upstream.heads
        assert "host: localhost\r\n" in asked.lower()
        assert f"Bearer {KEY}" in asked
    log = proxy.log.read_text(encoding="utf-8")
    assert "/v1/chat/completions" in log
    assert KEY not in log


async def hears_that_the_client_left(tmp_path: Path, *, is_slow: bool) -> bool:
    """Return whether the server hears it: during a stream, or (`is_slow`) before the first byte of a reply."""
    async with running(tmp_path) as (proxy, upstream):
        upstream.is_slow = is_slow
        reader, writer = await proxy.connect()
        writer.write(request("/v1/chat/completions", "Content-Length: 0"))
        async with asyncio.timeout(WITHIN_S):
            await upstream.asked.wait()
            if not is_slow:
                await reader.readuntil(b"data: first\r\n\r\n")
        writer.transport.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                await upstream.left.wait()
        return upstream.left.is_set()


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_client_that_leaves_ends_its_request(tmp_path: Path, is_slow: bool) -> None:
    assert await hears_that_the_client_left(tmp_path, is_slow=is_slow)


async def reply_to(proxy: Proxy, sent: bytes) -> tuple[int, str, dict[str, Any]]:
    """Return status, head and JSON of the reply."""
    reader, writer = await proxy.connect()
    writer.write(sent)
    async with asyncio.timeout(WITHIN_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(int(re.findall(r"content-length: (\d+)", head)[0]))
    writer.transport.abort()
    return int(head.split()[1]), head, json.loads(body)


async def test_a_body_like_the_largest_recording_comes_through(tmp_path: Path) -> None:
    async with running(tmp_path) as (proxy, upstream):
        reader, writer = await proxy.connect()
        num_bytes = MAX_FILE_BYTES + 2**16
        writer.write(request("/v1/audio/transcriptions", f"Content-Length: {num_bytes}") + bytes(num_bytes))
        async with asyncio.timeout(WITHIN_S):
            assert b" 200 " in await reader.readline()
        writer.transport.abort()
        assert upstream.got_a_body


async def test_a_larger_one_is_refused_here(tmp_path: Path) -> None:
    async with running(tmp_path) as (proxy, upstream):
        num_bytes = MAX_FILE_BYTES + 2**21
        sent = request("/v1/audio/transcriptions", f"Content-Length: {num_bytes}") + bytes(num_bytes)
        status, head, body = await reply_to(proxy, sent)
        assert (status, body["error"]["code"]) == (413, PayloadTooLarge.reason)
        assert body["error"]["type"] == "invalid_request_error"
        assert "content-type: application/json" in head
        assert "retry-after" not in head
        assert not upstream.got_a_body


async def test_while_there_is_no_server_the_answer_says_so_and_when_to_come_back(tmp_path: Path) -> None:
    async with running(tmp_path) as (proxy, upstream):
        assert upstream.server is not None
        upstream.server.close()
        status, head, body = await reply_to(proxy, request("/v1/chat/completions", "Content-Length: 0"))
        assert (status, body["error"]["code"]) == (503, Unavailable.reason)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert "retry-after: 5\r\n" in head

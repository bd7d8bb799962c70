"""`hostler mcp`: what it shows of the server's MCP servers; and hostler itself as one, asked by a real client."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from typer.testing import Result

from cli.mcp_tools import MAX_AUDIO_BYTES

Hostler = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
MODELS = [
    {"name": "chat", "aliases": [], "engine": "text", "state": "unloaded", "max_context_tokens": 8192, "dtype": "x"},
    {"name": "warm", "aliases": ["w"], "engine": "text", "state": "ready", "max_context_tokens": 8192, "dtype": "x"},
    {
        "name": "vectors",
        "aliases": [],
        "engine": "embedding",
        "state": "ready",
        "max_context_tokens": 512,
        "dtype": "x",
    },
    {"name": "ear", "aliases": [], "engine": "transcription", "state": "ready", "max_context_tokens": 0, "dtype": "x"},
]
SERVERS = [
    {
        "name": "files",
        "kind": "command",
        "target": "npx files",
        "tools": ["read"],
        "chat": True,
        "state": "failed",
        "transport": None,
        "num_running": 0,
        "error": "The MCP server ended with exit code 3.",
    }
]
TESTED = {"server": "files", "ok": True, "took_ms": 12, "state": "connected", "transport": "stdio", "error": None}
TOOLS = [{"name": "read", "description": "Read\n a file.", "read_only": True}]
PIECES = ["The capital ", "is Paris."]


class Gateway:
    """Answers as the gateway's routes do, and remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.tested: dict[str, Any] = {**TESTED, "tools": TOOLS, "notes": ["One note."], "stderr": ""}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["content-length"])))

            def answer(self, body: bytes) -> None:
                fake.seen.append((self.path, self.headers.get("authorization", ""), body))
                status, answer = fake.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/admin/status":
            return 200, json.dumps({"models": MODELS}).encode()
        if path == "/admin/mcp":
            return 200, json.dumps({"object": "list", "data": SERVERS}).encode()
        if path == "/admin/mcp/test":
            return 200, json.dumps(self.tested).encode()
        if path == "/v1/audio/transcriptions":
            return 200, b'{"text": "hello there"}'
        asked = json.loads(body)
        if asked["model"] == "nobody":
            return 404, b'{"error": {"message": "No model nobody."}}'
        if path == "/v1/embeddings":
            return 200, json.dumps({"data": [{"embedding": [len(t), 0.5]} for t in asked["input"]]}).encode()
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in PIECES]
        return 200, b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + b"data: [DONE]\n\n"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    fake = Gateway()
    yield fake
    fake.close()


def test_list_shows_each_server_and_what_is_wrong_with_it(hostler: Hostler, gateway: Gateway) -> None:
    result = hostler("mcp", "list", "--url", gateway.url, "--api-key", "sesame")
    assert result.stdout == (
        "files: npx files (failed, chat, 1 tools allowed)\n  The MCP server ended with exit code 3.\n"
    )
    assert gateway.seen[0][:2] == ("/admin/mcp", "Bearer sesame")
    assert json.loads(hostler("mcp", "list", "--json", "--url", gateway.url).stdout) == SERVERS


def test_test_shows_tools_and_time_or_fails_with_the_servers_last_words(hostler: Hostler, gateway: Gateway) -> None:
    result = hostler("mcp", "test", "files", "--url", gateway.url)
    assert result.stdout.splitlines() == [
        "files: connected (over stdio, 12 ms, 1 tools)",
        "  read (read only): Read a file.",
        "  One note.",
    ]
    gateway.tested |= {"ok": False, "error": "The MCP server ended.", "stderr": "no token"}
    failed = hostler("mcp", "test", "files", "--url", gateway.url)
    assert failed.exit_code == 1
    assert failed.stderr.splitlines() == [
        "hostler: files: The MCP server ended. (12 ms)",
        "hostler: it wrote: no token",
    ]


def command(gateway: Gateway, *args: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", "mcp", "serve", "--url", gateway.url, "--api-key", "sesame", *args]


def environment() -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "HOSTLER_RUN_DIR": os.environ["HOSTLER_RUN_DIR"]}


async def test_over_stdio_agents_ask_models_embed_and_transcribe(gateway: Gateway, tmp_path: Path) -> None:
    program, *args = command(gateway)
    recording = tmp_path / "words.wav"
    recording.write_bytes(b"RIFF")
    too_large = tmp_path / "long.wav"
    with too_large.open("wb") as file:
        file.truncate(MAX_AUDIO_BYTES + 1)
    async with Client(StdioServerParameters(command=program, args=args, env=environment(), cwd=tmp_path)) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names == ["list_models", "ask_model", "embed", "transcribe"]

        async def said(name: str, **arguments: Any) -> str:
            result = await client.call_tool(name, arguments)
            return "".join(block.text for block in result.content if block.type == "text")

        assert await said("ask_model", prompt="The capital?", system="Be brief.") == "The capital is Paris."
        asked = json.loads(gateway.seen[-1][2])
        assert (asked["model"], asked["messages"][0]["role"]) == ("warm", "system")
        assert gateway.seen[-1][1] == "Bearer sesame"
        assert "No model nobody." in await said("ask_model", prompt="x", model="nobody")
        listed = (await client.call_tool("list_models", {})).structured_content
        assert listed == {"result": [{k: v for k, v in model.items() if k != "dtype"} for model in MODELS]}
        assert await said("transcribe", path=str(recording)) == "hello there"
        assert b"RIFF" in gateway.seen[-1][2]
        assert "is larger than" in await said("transcribe", path=str(too_large))
        assert "No such file" in await said("transcribe", path=str(tmp_path / "none.wav"))


async def test_over_http_the_servers_key_is_demanded_and_files_stay_closed(gateway: Gateway, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.to_thread(
        subprocess.Popen,
        command(gateway, "--http", "--http-port", str(port)),
        env={**os.environ, **environment()},
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/mcp"
    try:
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer sesame"}) as http:
            async with asyncio.timeout(30):
                while True:
                    try:
                        refused = await http.post(url, headers={"Authorization": "Bearer x"})
                        break
                    except httpx2.TransportError:
                        await asyncio.sleep(0.1)
            assert refused.status_code == 401
            rebound = await http.post(url, headers={"Host": "evil.example"}, json={})
            assert rebound.status_code in (403, 421)
            async with Client(streamable_http_client(url, http_client=http)) as client:
                vectors = await client.call_tool("embed", {"texts": ["abc", "a"]})
                assert vectors.structured_content == {"result": [[3.0, 0.5], [1.0, 0.5]]}
                read = await client.call_tool("transcribe", {"path": "/etc/hostname"})
                assert read.is_error
    finally:
        process.terminate()
        process.wait(10)

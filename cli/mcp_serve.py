"""`hostler mcp serve`: the running server as an MCP server, for agents in other programs.

Above stands `cli.mcp_commands`; below, `cli.mcp_tools` (the tools), and the running server over HTTP. Standard output
is the wire, so nothing else is written to it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from cli import servers
from cli.exits import CliError

_TIMEOUT = httpx.Timeout(10.0, read=900.0)  # a first token may have to wait for a model to load
_REPORT_EVERY = 16


class Hostler:
    """The running server, asked over HTTP. Every failure is a `CliError` whose words an agent may read."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.api_key = api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=False)

    async def call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """Return the JSON object that it answers with."""
        try:
            response = await self._http.request(method, path, **request)
        except httpx.HTTPError:
            raise CliError(f"{self.url} does not answer. Is hostler running?") from None
        return _object(response.status_code, response.content)

    async def chat(self, body: dict[str, Any], on_piece: Callable[[int], Awaitable[None]]) -> str:
        """Return a model's answer; `on_piece` hears how many pieces have come."""
        pieces: list[str] = []
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                if not response.is_success:
                    _object(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                        continue
                    chunk = json.loads(line[5:])
                    if "error" in chunk:
                        raise CliError(_message(chunk, "The answer broke off."))
                    pieces += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
                    if len(pieces) % _REPORT_EVERY == 0:
                        await on_piece(len(pieces))
        except httpx.HTTPError:
            raise CliError(f"{self.url} does not answer. Is hostler running?") from None
        return "".join(pieces)

    async def models(self) -> list[dict[str, Any]]:
        """Return what can be asked for, and where it is."""
        status = await self.call("GET", "/admin/status")
        models: list[dict[str, Any]] = status["models"]
        return models

    async def model_of(self, kinds: tuple[str | None, ...], what: str) -> str:
        """Return the first model that does something, one that is loaded before others."""
        fit = [model for model in await self.models() if model["engine"] in kinds]
        if not fit:
            raise CliError(f"No model here can {what}.")
        return str(min(fit, key=lambda model: model["state"] != "ready")["name"])


def _object(status: int, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not 200 <= status < 300 or not isinstance(answer, dict):
        raise CliError(_message(answer, f"hostler answered {status}"))
    return answer


def _message(answer: Any, fallback: str) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error["message"]) if isinstance(error, dict) and error.get("message") else fallback


def run(url: str | None, api_key: str | None, port: int | None, http_port: int | None) -> None:
    """Serve until whoever started this closes its input, or with `http_port` until Ctrl-C.

    Raises:
        CliError: the `mcp` package is not installed, or no server runs.
    """
    try:
        from cli.mcp_tools import build
    except ImportError:
        raise CliError("this needs the mcp package: pip install 'hostler[mcp]'") from None
    key = api_key or os.environ.get("HOSTLER_API_KEY")
    if url is None:
        found = servers.find(port)
        config = servers.read_config(found.run_dir)
        url = servers.base_url(str(config.get("host", "127.0.0.1")), found.port)
        key = key or config.get("api_key")
    hostler = Hostler(url if "://" in url else f"http://{url}", key)

    async def serve() -> None:
        transcribes = any(model["engine"] == "transcription" for model in await hostler.models())
        server = build(hostler, transcribes=transcribes, reads_files=http_port is None)
        if http_port is None:
            await server.run_stdio_async()
            return
        sys.stderr.write(f"MCP server on http://127.0.0.1:{http_port}/mcp\n")
        await server.run_streamable_http_async(port=http_port)

    asyncio.run(serve())

"""What `hostler mcp serve` offers to agents.

Above stands `cli.mcp_serve`; below, the `mcp` package, which only this file of the room knows.
"""

from __future__ import annotations

import base64
import functools
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations

from cli.exits import CliError

if TYPE_CHECKING:
    from cli.mcp_serve import Hostler

MAX_AUDIO_BYTES = 25 * 10**6
_CHATTY = ("text", "scripted", None)

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def build(hostler: Hostler, *, transcribes: bool, reads_files: bool) -> MCPServer:
    """Return the MCP server.

    Args:
        transcribes: a model for speech is served.
        reads_files: recordings may be named by their path on this machine: the caller is its user's own program.
    """
    server = KeyedServer(
        "hostler",
        instructions="Language models that run on this machine. list_models says which; ask_model asks one.",
        log_level="WARNING",
    )
    server.key = hostler.api_key
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    def tool(function: Callable[..., Awaitable[Any]]) -> None:
        @functools.wraps(function)
        async def told(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except CliError as error:
                raise ToolError(str(error)) from None

        server.tool(annotations=reads)(told)

    async def list_models() -> list[dict[str, Any]]:
        """List the models on this machine: what each is for (engine), and whether it is loaded (state)."""
        keys = ("name", "aliases", "engine", "state", "max_context_tokens")
        return [{key: model[key] for key in keys} for model in await hostler.models()]

    async def ask_model(
        prompt: str,
        context: Context[Any],
        model: str = "",
        system: str = "",
        max_tokens: int = 1024,
        temperature: float | None = None,
    ) -> str:
        """Ask a language model on this machine, and return its answer. An empty `model` takes one that is loaded."""
        name = model or await hostler.model_of(_CHATTY, "answer questions")
        messages = [{"role": "system", "content": system}] if system else []
        body: dict[str, Any] = {"model": name, "messages": [*messages, {"role": "user", "content": prompt}]}
        body |= {"max_tokens": max_tokens} | ({} if temperature is None else {"temperature": temperature})

        async def on_piece(number: int) -> None:
            await context.report_progress(number)

        return await hostler.chat(body, on_piece)

    async def embed(texts: list[str], model: str = "") -> list[list[float]]:
        """Return an embedding vector for each text. An empty `model` takes the first that embeds."""
        name = model or await hostler.model_of(("embedding",), "embed texts")
        answer = await hostler.call("POST", "/v1/embeddings", json={"model": name, "input": texts})
        return [each["embedding"] for each in answer["data"]]

    async def transcribe(path: str = "", audio_base64: str = "", model: str = "", language: str = "") -> str:
        """Return the words of a recording, given by its path on this machine or as base64."""
        name = model or await hostler.model_of(("transcription",), "transcribe speech")
        fields = {"model": name, "response_format": "json"} | ({"language": language} if language else {})
        audio = _recording(path if reads_files else "", audio_base64)
        answer = await hostler.call(
            "POST", "/v1/audio/transcriptions", data=fields, files={"file": ("recording", audio)}
        )
        return str(answer["text"])

    for function in (list_models, ask_model, embed, *((transcribe,) if transcribes else ())):
        tool(function)
    return server


def _recording(path: str, encoded: str) -> bytes:
    try:
        if path and Path(path).stat().st_size > MAX_AUDIO_BYTES:
            raise CliError(f"{path} is larger than {MAX_AUDIO_BYTES} bytes.")
        audio = Path(path).read_bytes() if path else base64.b64decode(encoded, validate=True)
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise CliError("audio_base64 is not base64.") from None
    if not 0 < len(audio) <= MAX_AUDIO_BYTES:
        raise CliError(f"Give a recording of 1 to {MAX_AUDIO_BYTES} bytes.")
    return audio


class KeyedServer(MCPServer):
    """The package's server; who comes over HTTP must show `key`, if there is one."""

    key: str | None = None

    def streamable_http_app(self, **options: Any) -> Any:
        """Return the application that answers over HTTP."""
        return key_checked(super().streamable_http_app(**options), self.key)


def key_checked(app: App, key: str | None) -> App:
    """Return an application that answers nobody without the key."""
    if key is None:
        return app
    expected = f"Bearer {key}".encode()

    async def checked(scope: Scope, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] != "http" or hmac.compare_digest(given, expected):
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Send the server\'s key as a Bearer token."}'})

    return checked

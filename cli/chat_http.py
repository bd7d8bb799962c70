"""One chat completion over HTTP, as events. Any OpenAI-compatible server will do; ours is the usual one.

Above stands `cli.chat`; below, httpx. Nothing here prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from cli.certificates import trusted
from cli.exits import CliError

_TIMEOUT = httpx.Timeout(10.0, read=600.0)  # a first token may have to wait for a model to load
# Our own servers' comment while a model comes up.
_WAITING = ": loading: "


class ChatError(CliError):
    """The server refused, or broke the stream off; the message is the server's own where there is one."""


@dataclass(slots=True)
class Settings:
    """What every request of a conversation carries. Changed by the chat's commands."""

    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the reply; or, before it, what the wait is for."""

    text: str = ""
    reasoning: str = ""
    waiting: str = ""


@dataclass(slots=True)
class Reply:
    """A reply as it grows; timing by this machine's clock."""

    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float | None = None
    text: str = ""
    num_chunks: int = 0
    num_completion_tokens: int | None = None
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Count a piece."""
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s
        self.text += delta.text
        self.num_chunks += 1

    def summary(self) -> str:
        """Return tokens, tokens/s and time to first token in words."""
        if self.first_s is None or self.last_s is None:
            return "no reply"
        tokens = self.num_completion_tokens or self.num_chunks
        span_s = self.last_s - self.first_s
        rate = f"{(tokens - 1) / span_s:.1f} tokens/s, " if tokens > 1 and span_s > 0 else ""
        cut = ", cut off at max tokens" if self.finish_reason == "length" else ""
        return f"{tokens} tokens, {rate}first after {self.first_s - self.started_s:.2f} s{cut}"


def _message(body: Any, fallback: str) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return str(error) if isinstance(error, str) else fallback


class Client:
    """A connection to one server. Main thread; close it when done."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.api_key = api_key
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Not through a proxy: the server is ours, mostly on this machine.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=_TIMEOUT, trust_env=False, verify=trusted()
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers with.

        Raises:
            ChatError: no answer, a refusal, or something else than JSON.
        """
        try:
            response = self._http.request(method, path, json=body)
            answer = response.json()
        except httpx.HTTPError as error:
            raise ChatError(f"{self.url} does not answer ({error})") from None
        except ValueError:
            raise ChatError(f"{self.url}{path} does not answer in JSON") from None
        if not response.is_success or not isinstance(answer, dict):
            raise ChatError(_message(answer, f"{self.url} answered {response.status_code}"))
        return answer

    def models(self) -> list[str]:
        """Return the names of the models that can be asked for; raises as `model_objects`."""
        return [str(item["id"]) for item in self.model_objects()]

    def model_objects(self) -> list[dict[str, Any]]:
        """Return what /v1/models lists; each has at least an `id`.

        Raises:
            ChatError: no answer, or not the expected one.
        """
        try:
            response = self._http.get("/v1/models", timeout=10.0)
            body = response.json()
        except httpx.HTTPError as error:
            raise ChatError(f"{self.url} does not answer ({error})") from None
        except ValueError:
            raise ChatError(f"{self.url} is not an OpenAI-compatible server") from None
        if response.status_code != 200:
            raise ChatError(_message(body, f"{self.url} answered {response.status_code}"))
        data = body.get("data") if isinstance(body, dict) else None
        return [item for item in data or [] if isinstance(item, dict) and "id" in item]

    def stream(self, settings: Settings, messages: list[dict[str, str]], reply: Reply) -> Generator[Delta, None, None]:
        """Yield the reply's pieces and fill `reply`. Closing the iterator closes the stream: the server stops.

        Raises:
            ChatError: refused, broken off, or not the expected protocol.
        """
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        body: dict[str, Any] = {"model": settings.model, "messages": system + messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(_refusal(response))
                yield from _read(response, reply)
        except httpx.HTTPError as error:
            raise ChatError(f"the connection to {self.url} failed ({error or type(error).__name__})") from None


def _refusal(response: httpx.Response) -> str:
    try:
        text = _message(response.json(), f"the server answered {response.status_code}")
    except ValueError:
        text = f"the server answered {response.status_code}"
    retry = response.headers.get("retry-after")
    return f"{text} (try again in {retry} s)" if retry else text


def _read(response: httpx.Response, reply: Reply) -> Iterator[Delta]:
    for line in response.iter_lines():
        if line.startswith(_WAITING):
            yield Delta(waiting=line.removeprefix(_WAITING))
        if not line.startswith("data:"):
            continue  # comments keep the connection alive
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise ChatError("the server sent something that is not JSON") from None
        if "error" in chunk:
            raise ChatError(_message(chunk, "the server broke the reply off"))
        if usage := chunk.get("usage"):
            reply.num_completion_tokens = usage.get("completion_tokens")
        for choice in chunk.get("choices") or ():
            fields = choice.get("delta") or {}
            delta = Delta(fields.get("content") or "", fields.get("reasoning_content") or fields.get("reasoning") or "")
            if delta.text or delta.reasoning:
                reply.add(delta)
                yield delta
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    raise ChatError("the server closed the stream in the middle of the reply")

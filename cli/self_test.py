"""Four requests through the public address, as Cursor sends them, each with what to do if it fails.

Above: `cli.outside`; below: `cli.replay` (the requests as data, the judges) and httpx.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import httpx

from cli.certificates import trusted
from cli.replay import corpus
from cli.replay.exchange import Exchange, Reply
from cli.replay.frames import frames_of
from cli.replay.judge import problems_of
from cli.replay.prompts import flat_tools
from cli.replay.send import headers_of

_TIMEOUT = httpx.Timeout(15.0, read=300.0)
_PATH = "/v1/chat/completions"
_TOOL = "read_file"
_COUNT = "Count from one to forty in words."
_APART_S = 0.002
# What arrives quicker tells nothing of buffers on the way.
_LEAST_S = 0.3
_SLOW_S = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """How one went: `found`, or `problem` with what to do."""

    name: str
    found: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A reply and when its pieces came, in seconds after the request."""

    reply: Reply
    times_s: tuple[float, ...]


async def run(url: str, model: str, key: str | None) -> AsyncIterator[Check]:
    """Send one after the other and yield how each went. Raises nothing."""
    verify = next(e for e in corpus.replay_of("cursor", model) if e.expects == "chat")
    # Not drawn: by chance a reply can be too short to tell anything.
    counting = {"messages": [{"role": "user", "content": _COUNT}], "temperature": 0, "max_tokens": 64, "stream": True}
    agent = {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Read README.md."}]}],
        "tools": [tool for tool in flat_tools(1, 0) if tool["name"] == _TOOL],
        "tool_choice": {"type": "function", "name": _TOOL},
        "stream": True,
        "store": False,
    }
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    steps = (
        ("preflight", Exchange("preflight", "anything", "OPTIONS", _PATH, headers=asked, sends_key="no")),
        ("verify", verify),
        ("stream", Exchange("stream", "chat stream", path=_PATH, body={"model": model, **counting})),
        ("tool call", Exchange("tool call", "chat stream", path=_PATH, body={"model": model, **agent})),
    )
    judges = {"stream": _judge_stream, "tool call": _judge_call}
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, trust_env=False, verify=trusted()) as http:
        for name, exchange in steps:
            try:
                came = await _send(http, exchange, key)
            except httpx.HTTPError as error:
                yield Check(name, problem=f"no answer from {url} ({error or type(error).__name__}): is the proxy up?")
                continue
            problem = _from_the_way(came.reply) or "; ".join(problems_of(exchange, came.reply))
            if problem:
                yield Check(name, problem=problem)
            elif name in judges:
                yield replace(judges[name](came), name=name)
            else:
                yield Check(name, found=f"{came.reply.status} after {came.times_s[-1]:.2f} s")


async def _send(http: httpx.AsyncClient, exchange: Exchange, key: str | None) -> Arrival:
    began = time.monotonic()
    pieces, times_s = [], []
    headers = headers_of(exchange, key)
    async with http.stream(exchange.method, exchange.path, json=exchange.body, headers=headers) as response:
        async for piece in response.aiter_bytes():
            pieces.append(piece)
            times_s.append(time.monotonic() - began)
        text = b"".join(pieces).decode("utf-8", errors="replace")
        times_s.append(time.monotonic() - began)
        found = {name.lower(): value for name, value in response.headers.items()}
        return Arrival(Reply(response.status_code, found, text), tuple(times_s))


def _from_the_way(reply: Reply) -> str:
    """Return what somebody between us and us has answered instead; empty if it was the server."""
    if "x-request-id" in reply.headers:
        return ""
    if code := reply.headers.get("ngrok-error-code"):
        return f"ngrok answered {code} ({reply.status}) instead of this server: see https://ngrok.com/docs/errors"
    return f"something else than this server answered ({reply.status}): does the address lead to the public port?"


def _judge_stream(came: Arrival) -> Check:
    *arrivals, end = came.times_s
    first, apart, before = arrivals[0], 1, arrivals[0]
    for at in arrivals:
        apart += at - before >= _APART_S
        before = at
    if apart < 3 and end >= _LEAST_S:
        return Check("", problem=f"all of it came at once, after {first:.1f} s: switch off the proxy's buffering")
    if first > _SLOW_S:
        return Check("", problem=f"its first byte took {first:.1f} s: the proxy holds back small pieces")
    return Check("", found=f"first byte after {first:.2f} s, {apart} pieces apart, all after {end:.2f} s")


def _judge_call(came: Arrival) -> Check:
    name, arguments = "", ""
    for frame in frames_of(came.reply.text)[0]:
        for call in _calls_of(frame.data):
            function = call.get("function") or {}
            name += function.get("name") or ""
            arguments += function.get("arguments") or ""
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except ValueError:
        is_object = False
    if name != _TOOL or not is_object:
        return Check("", problem=f"the model did not call {_TOOL} with JSON: choose one that calls tools")
    return Check("", found=f"{name}({arguments[:60]})")


def _calls_of(data: Any) -> list[dict[str, Any]]:
    choices = data.get("choices") if isinstance(data, dict) else None
    return [call for choice in choices or () for call in (choice.get("delta") or {}).get("tool_calls") or ()]

"""A reply → what the client that sent the request would stumble over, in words. Pure. Above: `send`, tests."""

from __future__ import annotations

import json
from typing import Any

from cli.replay.exchange import Exchange, Reply
from cli.replay.frames import frames_of
from cli.replay.judge_chat import chat_problems, chat_stream_problems
from cli.replay.judge_events import (
    message_problems,
    messages_stream_problems,
    response_problems,
    responses_stream_problems,
)

_STREAMS = ("chat stream", "responses stream", "messages stream", "load progress")


def problems_of(exchange: Exchange, reply: Reply) -> list[str]:
    """Return what is wrong; nothing if the client can work with the reply."""
    if not 200 <= reply.status < 300:
        return [_refusal(exchange, reply)]
    problems = [] if "x-request-id" in reply.headers else ["the reply has no x-request-id"]
    if exchange.expects == "anything":
        return problems
    kind = reply.headers.get("content-type", "")
    wanted = "text/event-stream" if exchange.expects in _STREAMS else "application/json"
    if not kind.startswith(wanted):
        return [*problems, f"the reply is {kind or 'of no type'} instead of {wanted}"]
    return problems + (_stream(exchange, reply.text) if exchange.expects in _STREAMS else _whole(exchange, reply.text))


def _stream(exchange: Exchange, text: str) -> list[str]:
    if exchange.expects == "chat stream":
        options = (exchange.body or {}).get("stream_options") or {}
        return chat_stream_problems(text, wants_usage=bool(options.get("include_usage")))
    if exchange.expects == "responses stream":
        return responses_stream_problems(text)
    if exchange.expects == "messages stream":
        return messages_stream_problems(text)
    frames, problems = frames_of(text)
    last = frames[-1].data if frames else None
    if not isinstance(last, dict) or last.get("status") != "ready":
        problems.append("it does not end with the model being ready")
    return problems


def _whole(exchange: Exchange, text: str) -> list[str]:
    try:
        body: Any = json.loads(text)
    except ValueError:
        return ["the reply is not JSON"]
    if exchange.expects == "chat":
        return chat_problems(body)
    if exchange.expects == "responses":
        return response_problems(body)
    if exchange.expects == "messages":
        return message_problems(body)
    if exchange.expects == "token count":
        counted = isinstance(body, dict) and isinstance(body.get("input_tokens"), int)
        return [] if counted else ["the reply has no input_tokens"]
    listed = body.get("data") if isinstance(body, dict) else None
    if not isinstance(listed, list) or not listed:
        return ["no models are listed"]
    return [] if all({"id", "object"} <= set(item) for item in listed) else ["a model has no id or object"]


def _refusal(exchange: Exchange, reply: Reply) -> str:
    error = _error(reply.text)
    message, code = str(error.get("message") or reply.text[:120]), error.get("code")
    path = exchange.path.partition("?")[0]
    is_about_a_model = code == "model_not_found" or (code is None and "model" in message.lower())
    if reply.status == 404 and not (error and is_about_a_model):
        return f"{path} is not served here (404)"
    if reply.status == 401:
        advice = "send the server's key" if exchange.sends_key != "no" else "this client sends no key here"
        return f"the key is missing or wrong (401): {advice}"
    if code == "context_length_exceeded" or message.startswith("prompt is too long"):
        size = len(json.dumps(exchange.body))
        return f"its prompt, {size // 1000} KB, is too long for this model: {message}"
    if error.get("param") in ("tools", "tool_choice") or "does not call tools" in message:
        return f"it sends tools, and the model takes none: choose a model that calls tools ({message})"
    return f"refused with {reply.status}: {message}"


def _error(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}

"""A chat completions reply → what a client would stumble over. Pure. Above: `judge`; below: `frames`.

Each rule is one that a real client's parser has: OpenAI's SDKs, the AI SDK, Hugging Face's clients.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cli.replay.frames import frames_of

_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")


def chat_problems(reply: Any) -> list[str]:
    """Judge a whole reply."""
    if not isinstance(reply, dict):
        return ["the reply is not an object"]
    problems = _missing(reply, ("id", "object", "created", "model", "choices", "usage"))
    problems += [] if reply.get("object") == "chat.completion" else ["object is not 'chat.completion'"]
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        return [*problems, "there are no choices"]
    message = choices[0].get("message") or {}
    problems += [] if message.get("role") == "assistant" else ["the message's role is not 'assistant'"]
    problems += [] if "content" in message else ["the message has no content, not even null"]
    calls = message.get("tool_calls")
    problems += _finish(choices[0].get("finish_reason"), called=bool(calls))
    for call in calls or ():
        problems += _arguments(call.get("function") or {})
    return problems


@dataclass
class _Calls:
    started: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, call: dict[str, Any]) -> list[str]:
        index = call.get("index")
        if not isinstance(index, int):
            return ["a tool call has no index"]
        function = call.get("function") or {}
        if index not in self.started:
            self.started[index] = {"name": function.get("name"), "arguments": function.get("arguments") or ""}
            named = call.get("id") and call.get("type") == "function" and function.get("name")
            return [] if named else ["a tool call's first delta lacks id, type or name"]
        self.started[index]["arguments"] += function.get("arguments") or ""
        again = [name for name in ("id", "type") if name in call] + (["name"] if "name" in function else [])
        return [f"a tool call's later delta repeats {', '.join(again)} (null counts, too)"] if again else []


def chat_stream_problems(text: str, *, wants_usage: bool) -> list[str]:
    """Judge a stream, read to its end."""
    frames, problems = frames_of(text)
    problems += ["an `event:` line breaks openai-node, the AI SDK and Hugging Face's clients"] * any(
        frame.name for frame in frames
    )
    chunks = [frame.data for frame in frames if frame.data is not None]
    failed = next((chunk["error"] for chunk in chunks if isinstance(chunk, dict) and "error" in chunk), None)
    if failed is not None:
        return [*problems, f"it broke off: {failed.get('message')}"]
    if not frames or frames[-1].data is not None:
        problems.append("it does not end with data: [DONE]")
    if not chunks:
        return [*problems, "it has no chunks"]
    for name in ("id", "object", "created", "model", "choices"):
        if not all(isinstance(chunk, dict) and name in chunk for chunk in chunks):
            return [*problems, f"a chunk lacks {name}"]
    with_choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    alone = [chunk for chunk in chunks if not chunk["choices"]]
    if wants_usage and not (alone and isinstance(alone[-1].get("usage"), dict) and chunks[-1] is alone[-1]):
        problems.append("usage was asked for and does not come in a last chunk with empty choices")
    if not wants_usage and alone:
        problems.append("a chunk with empty choices, which nobody asked for, crashes Hugging Face's clients")
    if not with_choices or with_choices[0]["delta"].get("role") != "assistant":
        problems.append("the first delta has no role")
    return problems + _deltas(with_choices)


def _deltas(choices: list[dict[str, Any]]) -> list[str]:
    problems: list[str] = []
    calls = _Calls()
    for choice in choices:
        for call in choice["delta"].get("tool_calls") or ():
            problems += calls.add(call)
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if len(reasons) != 1:
        problems.append(f"finish_reason comes {len(reasons)} times instead of once")
    else:
        problems += _finish(reasons[0], called=bool(calls.started))
    if reasons != ["length"]:
        for call in calls.started.values():
            problems += _arguments(call)
    return problems


def _finish(reason: Any, *, called: bool) -> list[str]:
    if reason not in _REASONS:
        return [f"finish_reason is {reason!r}"]
    if called and reason not in ("tool_calls", "length"):
        return [f"a tool was called, but finish_reason is {reason!r}"]
    return []


def _arguments(function: dict[str, Any]) -> list[str]:
    try:
        json.loads(function.get("arguments") or "")
    except ValueError:
        return [f"the arguments of the call of {function.get('name')!r} are not JSON"]
    return []


def _missing(value: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    missing = [name for name in names if name not in value]
    return [f"the reply lacks {', '.join(missing)}"] if missing else []

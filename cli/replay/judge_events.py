"""Streams of responses and messages → what a client would stumble over. Pure. Above: `judge`; below: `frames`."""

from __future__ import annotations

from typing import Any

from cli.replay.frames import Frame, frames_of

_ENDS = ("response.completed", "response.incomplete", "response.failed")
_KEYS = ("id", "object", "created_at", "status", "model", "output", "parallel_tool_calls", "tool_choice", "tools")


def response_problems(response: Any) -> list[str]:
    """Judge a whole response."""
    if not isinstance(response, dict):
        return ["the reply is not an object"]
    missing = [name for name in (*_KEYS, "usage") if name not in response]
    problems = [f"the response lacks {', '.join(missing)}"] if missing else []
    if response.get("status") == "failed":
        problems.append(f"it failed: {(response.get('error') or {}).get('message')}")
    usage = response.get("usage") or {}
    if response.get("status") != "failed" and not {"input_tokens_details", "output_tokens_details"} <= set(usage):
        problems.append("usage lacks the details of input and output tokens")
    return problems


def responses_stream_problems(text: str) -> list[str]:
    """Judge a stream of /v1/responses, read to its end."""
    frames, problems = frames_of(text)
    events = [frame.data for frame in frames if isinstance(frame.data, dict)]
    kinds = [event.get("type") for event in events]
    if kinds[:2] != ["response.created", "response.in_progress"]:
        problems.append(f"it begins with {kinds[:2]} instead of response.created and response.in_progress")
    if not kinds or kinds[-1] not in _ENDS:
        return [*problems, "it does not end with response.completed, incomplete or failed"]
    problems += response_problems(events[-1].get("response"))
    numbers = [number for event in events if isinstance(number := event.get("sequence_number"), int)]
    if len(numbers) != len(events) or numbers != sorted(set(numbers)):
        problems.append("sequence_number does not rise with each event")
    unnamed = [frame for frame in frames if isinstance(frame.data, dict) and frame.name != frame.data.get("type")]
    problems += ["an event's `event:` line does not repeat its type"] * bool(unnamed)
    return problems + _items(events)


def _items(events: list[dict[str, Any]]) -> list[str]:
    problems: list[str] = []
    added, done, streamed = set(), set(), set()
    for event in events:
        kind, index = str(event.get("type")), event.get("output_index")
        if kind == "response.output_item.added":
            added.add(index)
        elif kind == "response.output_item.done":
            done.add(index)
            item = event.get("item") or {}
            if item.get("type") in ("message", "function_call", "custom_tool_call") and index not in streamed:
                problems.append(f"the {item['type']} comes without deltas, so the AI SDK loses it")
        elif kind.endswith(".delta"):
            streamed.add(index)
            problems += [] if index in added else ["a delta comes before its output_item.added"]
            if kind == "response.output_text.delta" and "logprobs" not in event:
                problems.append("an output_text.delta has no logprobs, not even an empty list")
    if added != done:
        problems.append("items are added and not done; without output_item.done Codex loses them")
    final = events[-1].get("response") or {}
    if len(final.get("output") or ()) != len(done):
        problems.append("the last event's response does not hold the items that were streamed")
    return list(dict.fromkeys(problems))


def message_problems(message: Any) -> list[str]:
    """Judge a whole reply of /v1/messages."""
    if not isinstance(message, dict):
        return ["the reply is not an object"]
    wanted = ("id", "type", "role", "model", "content", "stop_reason", "usage")
    missing = [name for name in wanted if name not in message]
    return [f"the message lacks {', '.join(missing)}"] if missing else []


def messages_stream_problems(text: str) -> list[str]:
    """Judge a stream of /v1/messages, read to its end."""
    frames, problems = frames_of(text)
    frames = [frame for frame in frames if frame.name != "ping"]
    if any(frame.name != (frame.data or {}).get("type") for frame in frames):
        problems.append("an event has no `event:` line of its type; Claude Code then asks again without streaming")
    kinds = [str((frame.data or {}).get("type")) for frame in frames]
    failed = next((frame.data for frame in frames if frame.data and frame.data.get("type") == "error"), None)
    if failed is not None:
        return [*problems, f"it broke off: {(failed.get('error') or {}).get('message')}"]
    if kinds[:1] != ["message_start"]:
        problems.append("it does not begin with message_start")
    if kinds[-2:] != ["message_delta", "message_stop"]:
        problems.append("it does not end with message_delta and message_stop")
    return problems + _blocks(frames)


def _blocks(frames: list[Frame]) -> list[str]:
    problems: list[str] = []
    open_index, next_index = None, 0
    for frame in frames:
        kind, index = (frame.data or {}).get("type"), (frame.data or {}).get("index")
        if kind == "content_block_start":
            if open_index is not None or index != next_index:
                problems.append("content blocks do not come one after the other")
            open_index, next_index = index, next_index + 1
        elif kind == "content_block_delta" and index != open_index:
            problems.append("a content_block_delta belongs to no open block")
        elif kind == "content_block_stop":
            problems += [] if index == open_index else ["a content_block_stop belongs to no open block"]
            open_index = None
        elif kind == "message_delta":
            delta, usage = frame.data.get("delta") or {}, frame.data.get("usage") or {}
            problems += [] if delta.get("stop_reason") else ["message_delta has no stop_reason"]
            problems += [] if "output_tokens" in usage else ["message_delta tells no output_tokens"]
    problems += ["a content block is never stopped"] if open_index is not None else []
    return list(dict.fromkeys(problems))

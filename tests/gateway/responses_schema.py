"""What every response, event and stream of /v1/responses must be; the oracle of its tests.

Two judges: the types of OpenAI's own client, validated strictly (the client itself never does), and the keys that Open
Responses demands. And the order of events that clients were seen to rely on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types.conversations import Conversation, ConversationItem
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.gateway.event_frames import frames_of

REQUIRED_KEYS = """
    id object created_at completed_at status incomplete_details model previous_response_id instructions output error
    tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs
    temperature reasoning usage max_output_tokens max_tool_calls store background service_tier metadata
    safety_identifier prompt_cache_key
""".split()  # noqa: SIM905
# Open Responses allows null for the others.
_NEVER_NULL = """
    id object created_at status model output tools tool_choice truncation parallel_tool_calls text top_p
    presence_penalty frequency_penalty top_logprobs temperature store background service_tier metadata
""".split()  # noqa: SIM905

_RESPONSE: TypeAdapter[Any] = TypeAdapter(Response)
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)
_CONVERSATION: TypeAdapter[Any] = TypeAdapter(Conversation)
_CONVERSATION_ITEM: TypeAdapter[Any] = TypeAdapter(ConversationItem)
_ENDINGS = {"response.completed", "response.incomplete", "response.failed"}


def check_response(response: dict[str, Any]) -> dict[str, Any]:
    """Validate one response object and return it."""
    _no_strangers(_RESPONSE.validate_python(response, strict=True))
    missing = [key for key in REQUIRED_KEYS if key not in response]
    assert not missing
    assert not [key for key in _NEVER_NULL if response[key] is None]
    assert all("strict" in tool for tool in response["tools"] if tool["type"] == "function")
    return response


def check_item(item: dict[str, Any]) -> None:
    """Validate one item of a list."""
    _ITEM.validate_python(item, strict=True)


def check_conversation(conversation: dict[str, Any], items: Iterable[dict[str, Any]] = ()) -> None:
    """Validate a conversation and its items."""
    _CONVERSATION.validate_python(conversation, strict=True)
    for item in items:
        _CONVERSATION_ITEM.validate_python(item, strict=True)


def check_stream(body: str, *, first_number: int = 0) -> list[dict[str, Any]]:
    """Validate a whole stream, frames and order, and return its events."""
    events = frames_of(body)
    check_events(events, first_number=first_number)
    return events


def check_events(events: list[dict[str, Any]], *, first_number: int = 0) -> None:
    """Validate events, their numbers and, from the beginning of a stream, their order."""
    for number, event in enumerate(events, start=first_number):
        _no_strangers(_EVENT.validate_python(event, strict=True))
        assert event["sequence_number"] == number
        if "response" in event:
            check_response(event["response"])
    kinds = [event["type"] for event in events]
    assert [kind for kind in kinds if kind in _ENDINGS] == [kinds[-1]]
    if first_number == 0:
        opening = ["response.created", "response.queued", "response.in_progress"]
        expected = opening if "response.queued" in kinds else [opening[0], opening[2]]
        assert kinds[: len(expected)] == expected
        assert not set(kinds[len(expected) :]) & set(opening)
        _check_items(events)


def _check_items(events: list[dict[str, Any]]) -> None:
    """Each item: added, then its own events, then done; its pieces joined are its whole; all are in the last event."""
    growing: dict[int, dict[str, Any]] = {}
    finished: dict[int, dict[str, Any]] = {}
    deltas: dict[tuple[int, str], str] = {}
    for event in events:
        kind, index = event["type"], event.get("output_index")
        if index is None:
            continue
        if kind == "response.output_item.added":
            assert index == len(growing) + len(finished)
            growing[index] = event["item"]
        elif kind == "response.output_item.done":
            added = growing.pop(index)
            assert (added["id"], added["type"]) == (event["item"]["id"], event["item"]["type"])
            finished[index] = event["item"]
        else:
            assert event["item_id"] == growing[index]["id"]
            stem, _, step = kind.rpartition(".")
            if step == "delta":
                deltas[index, stem] = deltas.get((index, stem), "") + event["delta"]
            elif step == "done" and "part" not in event:
                whole = next(event[key] for key in ("text", "arguments", "input") if key in event)
                assert deltas.get((index, stem), "") == whole
    last = events[-1]["response"]
    if last["status"] in ("completed", "incomplete"):
        assert growing == {}
        assert [finished[index] for index in sorted(finished)] == last["output"]


def _no_strangers(value: object) -> None:
    """OpenAI's types let unknown keys pass; a misspelt one of ours must not hide among them."""
    if isinstance(value, BaseModel):
        extra = set(value.model_extra or {}) - _ALLOWED.get(type(value).__name__, set())
        assert not extra, f"{type(value).__name__} has unknown keys {sorted(extra)}"
        for name in type(value).model_fields:
            _no_strangers(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _no_strangers(item)


# What Open Responses has beyond OpenAI's types, and what the item lists' types have beyond the output's.
_ALLOWED = {
    "Response": {"store", "presence_penalty", "frequency_penalty"},
    "ResponseCustomToolCall": {"status"},
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
}

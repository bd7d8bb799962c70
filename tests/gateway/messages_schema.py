"""What every message, event and error of /v1/messages must be; the oracle of its tests.

Two judges: the types of Anthropic's own client, validated strictly and without unknown keys (the client itself never
does), and the order of events that clients rely on. `check_stream` also feeds the client's own accumulator.
"""

from __future__ import annotations

from typing import Any

import orjson
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.gateway.event_frames import frames_of

_MESSAGE: TypeAdapter[Any] = TypeAdapter(Message)
_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
_MODEL: TypeAdapter[Any] = TypeAdapter(ModelInfo)
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def check_message(message: dict[str, Any]) -> dict[str, Any]:
    """Validate a whole message and return it."""
    _no_strangers(_MESSAGE.validate_json(orjson.dumps(message), strict=True))
    assert message["stop_reason"] is not None
    assert (message["stop_sequence"] is not None) == (message["stop_reason"] == "stop_sequence")
    return message


def check_error(body: dict[str, Any], status: int) -> str:
    """Validate an error and return its message."""
    assert body["type"] == "error"
    assert set(body) == {"type", "error", "request_id"}
    assert body["request_id"]
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == ERROR_TYPES[status]
    return str(body["error"]["message"])


def check_model(model: dict[str, Any]) -> None:
    """Validate one model of a list."""
    _no_strangers(_MODEL.validate_json(orjson.dumps(model), strict=True))


def check_stream(body: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Validate a whole stream; return its events without pings, and the message that they make."""
    events = frames_of(body)
    assert events[0]["type"] == "message_start"
    told = [event for event in events if event != {"type": "ping"}]
    return told, check_events(told)


def check_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Validate events and their order; return the message that Anthropic's client makes of them."""
    for event in events:
        _no_strangers(_EVENT.validate_json(orjson.dumps(event), strict=True))
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert len({"message_start", "message_delta", "message_stop"} & set(kinds[1:-2])) == 0
    started = events[0]["message"]
    assert (started["content"], started["stop_reason"], started["stop_sequence"]) == ([], None, None)
    _check_blocks(events[1:-2])
    return check_message(_accumulated(events))


_DELTAS = {
    "text": ["text_delta"],
    "thinking": ["thinking_delta", "signature_delta"],
    "tool_use": ["input_json_delta"],
}


def _check_blocks(events: list[dict[str, Any]]) -> None:
    """Blocks one after the other: start, deltas that suit the block, stop; a signature comes last, and once."""
    index, kind, deltas = -1, "", list[str]()
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            index, kind, deltas, is_open = index + 1, event["content_block"]["type"], [], True
        assert is_open
        assert event["index"] == index
        if event["type"] == "content_block_delta":
            assert event["delta"]["type"] in _DELTAS[kind]
            deltas.append(event["delta"]["type"])
        elif event["type"] == "content_block_stop":
            is_open = False
            if kind == "thinking":
                assert deltas[-1] == "signature_delta"
                assert deltas.count("signature_delta") == 1
    assert not is_open


def _accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    buffers: dict[int, bytes] = {}
    snapshot: Any = None
    for event in events:
        snapshot = accumulate_event(
            event=_EVENT.validate_json(orjson.dumps(event)), current_snapshot=snapshot, json_bufs=buffers
        )
    made = dict(snapshot.to_dict())
    assert made.pop("stop_details") is None  # the client's own addition
    return made


def _no_strangers(value: object) -> None:
    """Anthropic's types let unknown keys pass; a misspelt one of ours must not hide among them."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has unknown keys {sorted(value.model_extra)}"
        for name in type(value).model_fields:
            _no_strangers(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _no_strangers(item)

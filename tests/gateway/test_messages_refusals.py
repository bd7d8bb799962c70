"""What Anthropic's dialect refuses, by which name, and how long it takes to read the worst of bodies."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from hostler.errors import InvalidRequest, UnsupportedParameter

from gateway.dialects.anthropic_messages.conversation import MAX_MESSAGES
from gateway.dialects.anthropic_messages.request import parse_messages_request
from tests.gateway.test_messages_requests import IMAGE, LOOK, USE, USER, parse, result, text


def content(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "messages[0].content"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}, USER]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "content": [{**USE, "input": "x"}]}, USER]},
            "messages[0].content[0].input",
        ),
        ({"messages": [{"role": "assistant", "content": [{**USE, "id": None}]}, USER]}, "messages[0].content[0].id"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        ({"system": 7}, "system"),
        ({"system": [IMAGE]}, "system[0].type"),
        (content({"type": "text"}), "messages[0].content[0].text"),
        (content({"type": "video"}), "messages[0].content[0].type"),
        (content({"text": "x"}), "messages[0].content[0].type"),
        (content(result("x", call_id="")), "messages[0].content[0].tool_use_id"),
        (content({"type": "image", "source": {"type": "base64", "data": "!"}}), "messages[0].content[0].source.data"),
        (content({"type": "image", "source": {"type": "url"}}), "messages[0].content[0].source.url"),
        (content({"type": "image", "source": {}}), "messages[0].content[0].source.type"),
        (content(*[IMAGE] * 33), "messages"),
        ({"tools": [LOOK, LOOK]}, "tools[1].name"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"type": 7, "name": "x"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "gone"}, "tools": [LOOK]}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": [LOOK]}, "tool_choice.name"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "loud"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": [7]}, "stop_sequences[0]"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"service_tier": "gold"}, "service_tier"),
    ],
)
def test_what_no_shape_explains_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages_request({"model": "m", "max_tokens": 9, "messages": [USER], **fields})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mcp_servers": [{"type": "url", "url": "https://x"}]}, "mcp_servers"),
        (content({"type": "container_upload", "file_id": "f"}), "messages[0].content[0].type"),
        (content({"type": "image", "source": {"type": "file", "file_id": "f"}}), "messages[0].content[0].source.type"),
        (
            content({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}),
            "messages[0].content[0].source.type",
        ),
        (
            content({"type": "document", "source": {"type": "url", "url": "https://x"}}),
            "messages[0].content[0].source.type",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse_messages_request({"model": "m", "max_tokens": 9, "messages": [USER], **fields})
    assert caught.value.param == param


def test_the_largest_bodies_are_read_in_a_moment() -> None:
    many_blocks = [{"role": "user", "content": [text("x" * 100)] * 4000}] * 10
    many_turns = [{"role": "user", "content": "x" * 100}] * MAX_MESSAGES
    thoughts = [{"type": "thinking", "thinking": "x" * 1000, "signature": ""}] * 4000
    for messages in (many_blocks, many_turns, [USER, {"role": "assistant", "content": thoughts}, USER]):
        began_s = time.process_time()
        parse(messages)
        assert time.process_time() - began_s < 2


def test_no_body_is_worse_than_refused() -> None:
    odd: list[Any] = [None, True, 7, 1.5, "x", [], {}, [7], [None], {"type": 7}, [{"type": None}], [{"type": "text"}]]
    names = ("messages", "system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences", "metadata")
    for value in odd:
        bodies = [{name: value} for name in names]
        bodies += [{"messages": [{"role": role, "content": value}]} for role in ("user", "assistant", "system")]
        bodies += [content({"type": kind, "source": value, "content": value}) for kind in ("image", "document")]
        bodies += [content(result(value)), content({"type": "search_result", "content": value, "title": "t"})]
        for fields in bodies:
            with suppress(InvalidRequest):
                parse_messages_request({"model": "m", "max_tokens": 9, "messages": [USER], **fields})

"""Bodies of this dialect, or of several at once, that come to chat completions → `ChatRequest`. Above: `routes.chat`.

Cursor's agent posts `input` and flat tools to /chat/completions and wants chat's chunks back; it mixes Anthropic's
blocks into either list. So the content of a body says what it is, not its path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hostler.errors import InvalidRequest, UnsupportedParameter

from gateway.dialects.openai_chat.request import ChatRequest, parse_mcp_servers
from gateway.dialects.openai_responses.foreign import BLOCKS
from gateway.dialects.openai_responses.request import parse_responses_request
from gateway.fields import Fields

_STATEFUL = ("previous_response_id", "conversation")


def is_foreign(body: dict[str, Any]) -> bool:
    """Return whether a chat body must be read by this dialect: it has `input`, or blocks that chat does not know."""
    messages = body.get("messages")
    if messages is None:
        return body.get("input") is not None
    if not isinstance(messages, list):
        return False
    return any(_has_blocks(message.get("content")) for message in messages if isinstance(message, dict))


def _has_blocks(content: object) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in BLOCKS for part in content)


def parse_as_chat(body: dict[str, Any]) -> ChatRequest:
    """Validate and translate a foreign body.

    Raises:
        InvalidRequest, UnsupportedParameter: as `parse_responses_request` says, or it needs what is stored.
    """
    for name in _STATEFUL:
        if body.get(name) is not None:
            raise UnsupportedParameter(f"'{name}' is for /v1/responses. Send the whole conversation.", param=name)
    if body.get("background"):
        raise UnsupportedParameter("'background' is for /v1/responses.", param="background")
    merged = {**body, "input": body.get("messages") if body.get("input") is None else body["input"]}
    if body.get("response_format") is not None and body.get("text") is None:
        merged["text"] = {"format": body["response_format"]}
    request = parse_responses_request(merged)
    if request.tools.mcp:
        name = f"{request.tools.mcp[0].where}.type"
        raise UnsupportedParameter(f"'{name}' 'mcp' is for /v1/responses. Here it is 'mcp_servers'.", param=name)
    if any(item["type"] == "item_reference" for item in request.items):
        raise InvalidRequest("A reference to a stored item is for /v1/responses. Send the item itself.", param="input")
    fields = Fields(body)
    options = fields.child("stream_options")
    chat = request.with_items([], request.items)
    include_usage = bool(options and options.boolean("include_usage"))
    return replace(chat, include_usage=include_usage, mcp_servers=parse_mcp_servers(fields))

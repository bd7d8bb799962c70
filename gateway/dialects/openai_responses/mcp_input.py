"""Items of MCP servers' tools as clients send them back, and answers to requests for approval. Above: `items`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.fields import Fields, dump_json

_MAX_ID_CHARS = 256
_MAX_TOOLS = 512
_NO_CAP = 1 << 62  # the body's own cap bounds it


def _required(item: Fields, field: str) -> str:
    value = item.string(field, _MAX_ID_CHARS)
    if not value:
        raise item.missing(field)
    return value


def _list_tools(item: Fields) -> dict[str, Any]:
    tools = []
    for tool in item.children("tools", _MAX_TOOLS):
        schema = tool.object("input_schema") or {}
        dump_json(schema, tool.name_of("input_schema"))
        tools.append(
            {
                "name": _required(tool, "name"),
                "description": tool.string("description", _NO_CAP) or "",
                "input_schema": schema,
                "annotations": tool.object("annotations"),
            }
        )
    return {
        "server_label": _required(item, "server_label"),
        "tools": tools,
        "error": item.string("error", _NO_CAP),
    }


def _call(item: Fields) -> dict[str, Any]:
    error = item.raw("error")
    if isinstance(error, str):
        error = {"type": "mcp_protocol_error", "code": 0, "message": error}
    elif error is not None:
        error = item.object("error")
        dump_json(error, item.name_of("error"))
    return {
        "status": "completed" if error is None else "failed",
        "server_label": _required(item, "server_label"),
        "name": _required(item, "name"),
        "arguments": item.string("arguments", _NO_CAP) or "",
        "approval_request_id": item.string("approval_request_id", _MAX_ID_CHARS),
        "output": item.string("output", _NO_CAP),
        "error": error,
    }


def _approval_request(item: Fields) -> dict[str, Any]:
    return {
        "server_label": _required(item, "server_label"),
        "name": _required(item, "name"),
        "arguments": item.string("arguments", _NO_CAP) or "",
    }


def _approval_response(item: Fields) -> dict[str, Any]:
    approve = item.boolean("approve")
    if approve is None:
        raise item.missing("approve")
    return {
        "approval_request_id": _required(item, "approval_request_id"),
        "approve": approve,
        "reason": item.string("reason", 64 * 1024),
    }


READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "mcp_list_tools": _list_tools,
    "mcp_call": _call,
    "mcp_approval_request": _approval_request,
    "mcp_approval_response": _approval_response,
}

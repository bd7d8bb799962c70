"""Output items of MCP servers' tools while they grow: a listing, a call, a request for approval. Above: `builder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.dialects.openai_responses.items import item_id
from gateway.dialects.openai_responses.output_items import Event, added, done
from gateway.dialects.openai_responses.tools import ToolBinding
from gateway.mcp.calls import Outcome
from gateway.mcp.remote import Listing, McpFault, RemoteTool


class ListToolsItem:
    """What a server offers."""

    def __init__(self, index: int, label: str) -> None:
        self.item: dict[str, Any] = {
            "id": item_id("mcp_list_tools"),
            "type": "mcp_list_tools",
            "server_label": label,
            "tools": [],
            "error": None,
        }
        self._index = index
        self._where = {"item_id": self.item["id"], "output_index": index}

    def open(self) -> list[Event]:
        """Return the events that begin it."""
        return [added(self._index, self.item), {"type": "response.mcp_list_tools.in_progress", **self._where}]

    def close(self, status: str) -> list[Event]:
        """Return the events that end it without an answer."""
        return self.fail("The listing was not finished.")

    def complete(self, listing: Listing) -> list[Event]:
        """Take the server's answer; its notes, on tools that were left out, stand under `error`."""
        self.item["tools"] = [_listed(tool) for tool in listing.tools]
        self.item["error"] = " ".join(listing.notes) or None
        return [{"type": "response.mcp_list_tools.completed", **self._where}, done(self._index, self.item)]

    def fail(self, message: str) -> list[Event]:
        """Take a failure."""
        self.item["error"] = message
        return [{"type": "response.mcp_list_tools.failed", **self._where}, done(self._index, self.item)]


def _listed(tool: RemoteTool) -> dict[str, Any]:
    return {
        "name": tool.name,
        "description": tool.description,
        "input_schema": tool.input_schema,
        "annotations": tool.annotations or None,
    }


def listing_of(item: dict[str, Any]) -> Listing:
    """Return what an earlier turn's item listed."""
    tools = []
    for entry in item.get("tools") or ():
        schema, notes = entry.get("input_schema"), entry.get("annotations")
        tools.append(
            RemoteTool(
                entry.get("name") or "",
                entry.get("description") or "",
                schema if isinstance(schema, dict) else {},
                notes if isinstance(notes, dict) else {},
            )
        )
    return Listing(tuple(tools))


class McpCallItem:
    """A call that this server makes: its arguments while the model writes them, then its outcome.

    Attributes:
        binding: which tool.
        is_due: the model has written all of it, so it can be made.
    """

    def __init__(self, index: int, binding: ToolBinding, approval_request_id: str | None = None) -> None:
        self.binding = binding
        self.is_due = False
        self.item: dict[str, Any] = {
            "id": item_id("mcp_call"),
            "type": "mcp_call",
            "status": "in_progress",
            "server_label": binding.namespace,
            "name": binding.name,
            "arguments": "",
            "approval_request_id": approval_request_id,
            "output": None,
            "error": None,
        }
        self._index = index
        self._where = {"item_id": self.item["id"], "output_index": index}
        self._arguments: list[str] = []

    def open(self) -> list[Event]:
        """Return the events that begin it."""
        return [added(self._index, self.item), {"type": "response.mcp_call.in_progress", **self._where}]

    def add(self, fragment: str) -> list[Event]:
        """Take a piece of its arguments."""
        self._arguments.append(fragment)
        return [{"type": "response.mcp_call_arguments.delta", **self._where, "delta": fragment}]

    def written(self) -> list[Event]:
        """Return the event that ends its arguments: from now on it is due."""
        self.is_due = True
        arguments = self.item["arguments"] = "".join(self._arguments)
        return [{"type": "response.mcp_call_arguments.done", **self._where, "arguments": arguments}]

    def close(self, status: str) -> list[Event]:
        """Return the events that end it without having been made."""
        events = [] if self.is_due else self.written()
        self.is_due = False
        fault = McpFault("The call was not made: the response ended before it.")
        return [*events, *self.end(Outcome(fault=fault), status="incomplete")]

    def end(self, outcome: Outcome, status: str = "failed") -> list[Event]:
        """Take the outcome, and return the events that end it."""
        fault = outcome.fault
        if fault is None:
            self.item |= {"status": "completed", "output": outcome.text}
        else:
            self.item |= {"status": status, "error": _error(fault, outcome.text)}
        kind = "completed" if fault is None else "failed"
        return [{"type": f"response.mcp_call.{kind}", **self._where}, done(self._index, self.item)]


def _error(fault: McpFault, said: str) -> dict[str, Any]:
    if fault.kind == "tool":
        return {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": said or fault.message}]}
    kind = "http_error" if fault.kind == "http" else "mcp_protocol_error"
    return {"type": kind, "code": fault.code, "message": fault.message}


def error_text(item: dict[str, Any]) -> str:
    """Return why a call failed, in words; empty if it did not."""
    error = item.get("error")
    if isinstance(error, str):
        return error
    if not isinstance(error, dict):
        return ""
    content = error.get("content")
    if isinstance(content, list):
        texts: Sequence[Any] = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else str(error.get("message") or "failed")


class ApprovalRequestItem:
    """A call that waits for somebody's word. It has no events of its own, and appears once it is whole."""

    def __init__(self, binding: ToolBinding) -> None:
        self.item: dict[str, Any] = {
            "id": item_id("mcp_approval_request"),
            "type": "mcp_approval_request",
            "server_label": binding.namespace,
            "name": binding.name,
            "arguments": "",
        }

    def add(self, fragment: str) -> list[Event]:
        """Take a piece of its arguments."""
        self.item["arguments"] += fragment
        return []

    def appear(self, index: int) -> list[Event]:
        """Return its events."""
        return [added(index, self.item), done(index, self.item)]

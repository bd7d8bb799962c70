"""Worker events → a response: its events in order, and the object. Above: `gateway.responses`; below: `output_items`,
`mcp_items`.

The order that clients rely on: created, in_progress; for each item added, its parts and deltas, done; then exactly one
of completed, incomplete and failed. `sequence_number` rises by one.

A response is one turn of the model, or several: after a turn that called tools of MCP servers, `due` holds the calls,
and whoever makes them goes on with `settle` and the next turn's events, or with `complete`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from hostler.errors import HostlerError
from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_responses.mcp_items import ApprovalRequestItem, ListToolsItem, McpCallItem
from gateway.dialects.openai_responses.output_items import (
    CustomCallItem,
    Event,
    FunctionCallItem,
    MessageItem,
    OutputItem,
    ReasoningItem,
)
from gateway.dialects.openai_responses.response_object import error_object, usage_object, usage_sum
from gateway.dialects.openai_responses.tools import ToolBinding, ToolTable

_REASONS = {
    pb.FINISH_REASON_LENGTH: "max_output_tokens",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


class ResponseBuilder:
    """Builds one response.

    Args:
        response: the object as it begins (`response_object.new_response`); mutated.
        tools: what the names that the model calls stand for.
        wants_logprobs: output text carries them.
        as_summary: reasoning comes as a summary.
        with_seal: reasoning comes as `encrypted_content`, too.
        max_tool_calls: as many calls of MCP servers' tools may be made; None: any number.
    """

    def __init__(
        self,
        response: dict[str, Any],
        tools: ToolTable,
        *,
        wants_logprobs: bool = False,
        as_summary: bool = False,
        with_seal: bool = False,
        max_tool_calls: int | None = None,
    ) -> None:
        self._response = response
        self._tools = tools
        self._wants_logprobs = wants_logprobs
        self._as_summary = as_summary
        self._with_seal = with_seal
        self._number = 0
        self._opened = False
        self._items: list[OutputItem | ApprovalRequestItem] = []
        self._growing: MessageItem | ReasoningItem | None = None
        self._calls: dict[int, FunctionCallItem | CustomCallItem | McpCallItem | ApprovalRequestItem] = {}
        self._usages: list[pb.Usage] = []
        self._num_items_before = 0
        self.due: list[McpCallItem] = []
        """Calls of MCP servers' tools that the model has made in this turn, and nobody has carried out yet."""
        self.waits_for_client = False
        """Whether this turn left something to the client: a call of its own, or one to approve."""
        self.calls_left = max_tool_calls
        """How many calls of MCP servers' tools may still be made; beyond them the model's are not heard."""

    @property
    def is_over(self) -> bool:
        """Whether the response has ended."""
        return self._response["status"] not in ("queued", "in_progress")

    @property
    def usage(self) -> pb.Usage:
        """Of all turns so far."""
        return usage_sum(self._usages)

    @property
    def new_items(self) -> list[dict[str, Any]]:
        """The items since `begin_turn`."""
        return [item.item for item in self._items[self._num_items_before :]]

    def use_tools(self, tools: ToolTable) -> None:
        """Take what the names that the model may call from now on stand for."""
        self._tools = tools

    @property
    def is_open(self) -> bool:
        """Whether `open` has been called."""
        return self._opened

    def snapshot(self) -> dict[str, Any]:
        """Return the object as it is now."""
        return dict(self._response)

    def mark_not_stored(self) -> None:
        """Say that this response cannot be fetched later."""
        self._response["store"] = False

    def queue(self) -> list[Event]:
        """Return the events of a response that waits for its turn."""
        return [self._lifecycle("created"), self._lifecycle("queued")]

    def open(self) -> list[Event]:
        """Return the events that begin the response; again, or after `queue`, only what is new."""
        if self._opened:
            return []
        self._opened = True
        created = [] if self._number else [self._lifecycle("created")]
        self._response["status"] = "in_progress"
        return [*created, self._lifecycle("in_progress")]

    def add(self, event: pb.GenerateResponse) -> list[Event]:
        """Take one event of the worker and return those of the response; `finish` gives the last one, too."""
        kind = event.WhichOneof("event")
        if kind == "text":
            if not event.text.text and not event.text.logprobs:
                return []
            logprobs = event.text.logprobs if self._wants_logprobs else ()
            return self._numbered([*self._turn_to(MessageItem), *self._message().add(event.text.text, logprobs)])
        if kind == "reasoning":
            return self._numbered([*self._turn_to(ReasoningItem), *self._reasoning().add(event.reasoning.text)])
        if kind == "tool_call_start":
            return self._numbered([*self._close_growing(), *self._start_call(event.tool_call_start)])
        if kind == "tool_call_arguments":
            call = self._calls.get(event.tool_call_arguments.index)
            return self._numbered(call.add(event.tool_call_arguments.json_fragment)) if call is not None else []
        if kind == "tool_call_end":
            call = self._calls.pop(event.tool_call_end.index, None)
            return self._numbered(self._end_call(call, "completed")) if call is not None else []
        if kind == "finish":
            return self._finish(event.finish)
        return []

    def list_tools(self, label: str) -> tuple[ListToolsItem, list[Event]]:
        """Begin the listing of a server; its events go through `settle`."""
        item = ListToolsItem(len(self._items), label)
        self._items.append(item)
        return item, self._numbered(item.open())

    def approved_call(self, binding: ToolBinding, request: dict[str, Any]) -> tuple[McpCallItem, list[Event]]:
        """Begin a call that an earlier turn asked approval for."""
        item = McpCallItem(len(self._items), binding, request["id"])
        self._items.append(item)
        return item, self._numbered([*item.open(), *item.add(request["arguments"]), *item.written()])

    def settle(self, events: Iterable[Event]) -> list[Event]:
        """Number the events with which an item of this response ended elsewhere."""
        return self._numbered(events)

    def begin_turn(self) -> None:
        """Note that the model is asked once more."""
        self.due.clear()
        self._num_items_before = len(self._items)

    def complete(self, reason: str | None = None) -> list[Event]:
        """Return the last event.

        Args:
            reason: why the response is incomplete; None: it is complete.
        """
        status = "incomplete" if reason else "completed"
        self._response |= {
            "status": status,
            "output": self._output(),
            "usage": usage_object(self.usage),
            "incomplete_details": {"reason": reason} if reason else None,
            "completed_at": None if reason else int(time.time()),
        }
        return [self._lifecycle(status)]

    def fail(self, error: HostlerError) -> list[Event]:
        """Return the events of a failure: the rest of the opening, an `error`, and `response.failed`.

        Some clients read the one, some the other.
        """
        opening = self.open()
        self._response |= {"status": "failed", "error": error_object(error), "output": self._output()}
        told = {"type": "error", "code": error.reason, "message": error.message}
        told["param"] = self._response["error"]["param"]
        return [*opening, *self._numbered([told]), self._lifecycle("failed")]

    def _message(self) -> MessageItem:
        assert isinstance(self._growing, MessageItem)
        return self._growing

    def _reasoning(self) -> ReasoningItem:
        assert isinstance(self._growing, ReasoningItem)
        return self._growing

    def _turn_to(self, kind: type[MessageItem | ReasoningItem]) -> list[Event]:
        """Make the growing item one of a kind; return the events of the change."""
        if isinstance(self._growing, kind):
            return []
        closing = self._close_growing()
        index = len(self._items)
        if kind is MessageItem:
            self._growing = MessageItem(index)
        else:
            self._growing = ReasoningItem(index, as_summary=self._as_summary, with_seal=self._with_seal)
        self._items.append(self._growing)
        return [*closing, *self._growing.open()]

    def _close_growing(self, status: str = "completed") -> list[Event]:
        growing, self._growing = self._growing, None
        return growing.close(status) if growing is not None else []

    def _start_call(self, start: pb.ToolCallStart) -> list[Event]:
        before = self._calls.pop(start.index, None)
        closing = self._end_call(before, "completed") if before is not None else []
        binding = self._tools.binding(start.name)
        if binding.kind == "mcp":
            return [*closing, *self._start_remote_call(start.index, binding)]
        call_id = start.id or f"call_{uuid.uuid4().hex[:24]}"
        item = CustomCallItem if binding.kind == "custom" else FunctionCallItem
        call = item(len(self._items), call_id, binding)
        self._calls[start.index] = call
        self._items.append(call)
        self.waits_for_client = True
        return [*closing, *call.open()]

    def _start_remote_call(self, number: int, binding: ToolBinding) -> list[Event]:
        if self.calls_left == 0:
            return []
        if self.calls_left is not None:
            self.calls_left -= 1
        if binding.needs_approval:
            self._calls[number] = ApprovalRequestItem(binding)
            return []
        call = McpCallItem(len(self._items), binding)
        self._calls[number] = call
        self._items.append(call)
        return call.open()

    def _end_call(
        self, call: FunctionCallItem | CustomCallItem | McpCallItem | ApprovalRequestItem, status: str
    ) -> list[Event]:
        if isinstance(call, McpCallItem) and status == "completed":
            self.due.append(call)
            return call.written()
        if not isinstance(call, ApprovalRequestItem):
            return call.close(status)
        if status != "completed":
            return []
        self.waits_for_client = True
        self._items.append(call)
        return call.appear(len(self._items) - 1)

    def _finish(self, finish: pb.Finish) -> list[Event]:
        reason = _REASONS.get(finish.reason)
        status = "incomplete" if reason else "completed"
        self._usages.append(finish.usage)
        events: list[Event] = []
        if len(self._items) == self._num_items_before:
            events += self._turn_to(MessageItem)
        events += self._close_growing(status)
        for call in self._calls.values():
            events += self._end_call(call, status)
        self._calls.clear()
        if reason:
            for due in self.due:
                events += due.close(status)
            self.due.clear()
        ending = self._numbered(events)
        return ending if self.due else [*ending, *self.complete(reason)]

    def _output(self) -> list[dict[str, Any]]:
        return [item.item for item in self._items]

    def _lifecycle(self, what: str) -> Event:
        (event,) = self._numbered([{"type": f"response.{what}", "response": self.snapshot()}])
        return event

    def _numbered(self, events: Iterable[Event]) -> list[Event]:
        numbered = []
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
            numbered.append(event)
        return numbered

"""Output items while they grow: each knows its events from `output_item.added` to `output_item.done`. Above: `builder`.

An event is a dict without `sequence_number`, which the builder gives. Items of one response may grow side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.shapes import logprob_items
from gateway.dialects.openai_responses.custom_input import CustomInput
from gateway.dialects.openai_responses.items import item_id
from gateway.dialects.openai_responses.reasoning_text import sealed
from gateway.dialects.openai_responses.tools import ToolBinding

Event = dict[str, Any]


class OutputItem(Protocol):
    """One growing item. Above: `builder`, which alone calls it."""

    item: dict[str, Any]

    def open(self) -> list[Event]:
        """Return the events that begin it."""

    def close(self, status: str) -> list[Event]:
        """Return the events that end it, as "completed" or "incomplete"."""


def added(index: int, item: dict[str, Any]) -> Event:
    """Return the event that puts an item into the output."""
    return {"type": "response.output_item.added", "output_index": index, "item": dict(item)}


def done(index: int, item: dict[str, Any]) -> Event:
    """Return the event that ends an item."""
    return {"type": "response.output_item.done", "output_index": index, "item": dict(item)}


class MessageItem:
    """The assistant's text."""

    def __init__(self, index: int) -> None:
        self.item: dict[str, Any] = {
            "id": item_id("message"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._where = {"item_id": self.item["id"], "output_index": index, "content_index": 0}
        self._index = index
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def open(self) -> list[Event]:
        """Return the events that begin it: the item, then its one part."""
        return [
            added(self._index, self.item),
            {"type": "response.content_part.added", **self._where, "part": _text_part("", [])},
        ]

    def add(self, text: str, logprobs: Iterable[pb.TokenLogprob]) -> list[Event]:
        """Take text."""
        items = logprob_items(logprobs)
        self._text.append(text)
        self._logprobs.extend(items)
        return [{"type": "response.output_text.delta", **self._where, "delta": text, "logprobs": items}]

    def close(self, status: str) -> list[Event]:
        """Return the events that end it."""
        text = "".join(self._text)
        part = _text_part(text, self._logprobs)
        self.item["status"] = status
        self.item["content"] = [part]
        return [
            {"type": "response.output_text.done", **self._where, "text": text, "logprobs": self._logprobs},
            {"type": "response.content_part.done", **self._where, "part": part},
            done(self._index, self.item),
        ]


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class ReasoningItem:
    """The model's thinking: as content, or as a summary for clients that asked for one.

    Nobody here writes summaries, so the summary is the reasoning itself.
    """

    def __init__(self, index: int, *, as_summary: bool, with_seal: bool) -> None:
        self.item: dict[str, Any] = {"id": item_id("reasoning"), "type": "reasoning", "summary": []}
        if not as_summary:
            self.item["content"] = []
        self._as_summary = as_summary
        self._with_seal = with_seal
        self._index = index
        self._where = {"item_id": self.item["id"], "output_index": index}
        self._where |= {"summary_index" if as_summary else "content_index": 0}
        self._text: list[str] = []

    def open(self) -> list[Event]:
        """Return the events that begin it: the item, then its one part."""
        kind = "response.reasoning_summary_part.added" if self._as_summary else "response.content_part.added"
        return [added(self._index, self.item), {"type": kind, **self._where, "part": self._part("")}]

    def add(self, text: str) -> list[Event]:
        """Take text."""
        self._text.append(text)
        return [{"type": f"response.{self._stem}.delta", **self._where, "delta": text}]

    def close(self, status: str) -> list[Event]:
        """Return the events that end it."""
        text = "".join(self._text)
        part = self._part(text)
        self.item["summary" if self._as_summary else "content"] = [part]
        if self._with_seal:
            self.item["encrypted_content"] = sealed(text)
        self.item["status"] = status
        kind = "response.reasoning_summary_part.done" if self._as_summary else "response.content_part.done"
        return [
            {"type": f"response.{self._stem}.done", **self._where, "text": text},
            {"type": kind, **self._where, "part": part},
            done(self._index, self.item),
        ]

    @property
    def _stem(self) -> str:
        return "reasoning_summary_text" if self._as_summary else "reasoning_text"

    def _part(self, text: str) -> dict[str, str]:
        return {"type": "summary_text" if self._as_summary else "reasoning_text", "text": text}


class FunctionCallItem:
    """A call of a function."""

    def __init__(self, index: int, call_id: str, binding: ToolBinding) -> None:
        self.item: dict[str, Any] = {
            "id": item_id("function_call"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": binding.name,
            "arguments": "",
            **({"namespace": binding.namespace} if binding.namespace else {}),
        }
        self._index = index
        self._where = {"item_id": self.item["id"], "output_index": index}
        self._arguments: list[str] = []

    def open(self) -> list[Event]:
        """Return the event that begins it."""
        return [added(self._index, self.item)]

    def add(self, fragment: str) -> list[Event]:
        """Take a piece of its arguments."""
        self._arguments.append(fragment)
        return [{"type": "response.function_call_arguments.delta", **self._where, "delta": fragment}]

    def close(self, status: str) -> list[Event]:
        """Return the events that end it."""
        self.item["arguments"] = "".join(self._arguments)
        self.item["status"] = status
        ending = {"name": self.item["name"], "arguments": self.item["arguments"]}
        return [
            {"type": "response.function_call_arguments.done", **self._where, **ending},
            done(self._index, self.item),
        ]


class CustomCallItem:
    """A call of a custom tool, whose text the model wrote into JSON."""

    def __init__(self, index: int, call_id: str, binding: ToolBinding) -> None:
        self.item: dict[str, Any] = {
            "id": item_id("custom_tool_call"),
            "type": "custom_tool_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": binding.name,
            "input": "",
            **({"namespace": binding.namespace} if binding.namespace else {}),
        }
        self._index = index
        self._where = {"item_id": self.item["id"], "output_index": index}
        self._input = CustomInput()

    def open(self) -> list[Event]:
        """Return the event that begins it."""
        return [added(self._index, self.item)]

    def add(self, fragment: str) -> list[Event]:
        """Take a piece of its JSON."""
        return self._delta(self._input.feed(fragment))

    def close(self, status: str) -> list[Event]:
        """Return the events that end it."""
        whole, untold = self._input.finish()
        self.item["input"] = whole
        self.item["status"] = status
        return [
            *self._delta(untold),
            {"type": "response.custom_tool_call_input.done", **self._where, "input": whole},
            done(self._index, self.item),
        ]

    def _delta(self, text: str) -> list[Event]:
        return [{"type": "response.custom_tool_call_input.delta", **self._where, "delta": text}] if text else []

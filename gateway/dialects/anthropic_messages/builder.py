"""Worker events → a message: its events in order, and the whole. Above: `routes.messages`; below: `content`.

The order that clients rely on: message_start; for each block, one after the other, start, deltas, stop; message_delta
with the reason and the final usage; message_stop.
"""

from __future__ import annotations

import uuid
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.anthropic_messages.content import Block, CallBlock, Event, TextBlock, ThinkingBlock
from gateway.dialects.anthropic_messages.request import Thoughts


def new_message_id() -> str:
    """Return an id for a message."""
    return f"msg_{uuid.uuid4().hex[:24]}"


def usage_object(usage: pb.Usage) -> dict[str, Any]:
    """Return the token counts of one generation. Tokens found in the cache are not among `input_tokens`."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
    }


def stop_reason(finish: pb.Finish, max_tokens: int | None, *, called_tools: bool) -> str:
    """Return Anthropic's word for why a reply ended.

    Args:
        finish: the worker's last event.
        max_tokens: what the request allowed; a shorter reply that was cut reached the end of the context.
        called_tools: the reply holds calls.
    """
    if finish.stop:
        return "stop_sequence"
    if finish.reason == pb.FINISH_REASON_LENGTH:
        is_full = max_tokens is not None and finish.usage.num_completion_tokens < max_tokens
        return "model_context_window_exceeded" if is_full else "max_tokens"
    if finish.reason == pb.FINISH_REASON_CONTENT_FILTER:
        return "refusal"
    return "tool_use" if called_tools or finish.reason == pb.FINISH_REASON_TOOL_CALLS else "end_turn"


class MessageBuilder:
    """Builds one message.

    Args:
        message_id: `msg_…`.
        model: name that the reply carries.
        thoughts: what becomes of reasoning.
        max_tokens: what the request allowed.
    """

    def __init__(self, *, message_id: str, model: str, thoughts: Thoughts, max_tokens: int | None) -> None:
        self._message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._thoughts = thoughts
        self._max_tokens = max_tokens
        self._blocks: list[Block] = []
        self._calls: dict[int, CallBlock] = {}
        self._num_told = 0  # blocks whose stop has been told
        self.is_open = False

    def open(self, usage: pb.Usage) -> list[Event]:
        """Return the event that begins the message.

        Args:
            usage: the prompt's tokens, and how many of them were found in the cache.
        """
        self.is_open = True
        self._message["usage"] = {**usage_object(usage), "service_tier": "standard"}
        return [{"type": "message_start", "message": dict(self._message)}]

    def add(self, event: pb.GenerateResponse) -> list[Event]:
        """Take one event of the worker and return those of the message; `finish` gives the last ones, too."""
        kind = event.WhichOneof("event")
        if kind == "text":
            if event.text.text:
                self._growing(TextBlock).add(event.text.text)
        elif kind == "reasoning":
            if self._thoughts is not Thoughts.UNASKED and event.reasoning.text:
                self._growing(ThinkingBlock).add(event.reasoning.text)
        elif kind == "tool_call_start":
            self._start_call(event.tool_call_start)
        elif kind == "tool_call_arguments":
            if (call := self._calls.get(event.tool_call_arguments.index)) is not None:
                call.add(event.tool_call_arguments.json_fragment)
        elif kind == "tool_call_end":
            if (call := self._calls.pop(event.tool_call_end.index, None)) is not None:
                call.is_done = True
        elif kind == "finish":
            return self._finish(event.finish)
        return self._news()

    def message(self) -> dict[str, Any]:
        """Return the whole message; after `finish`."""
        return dict(self._message)

    def _growing(self, kind: type[TextBlock | ThinkingBlock]) -> TextBlock | ThinkingBlock:
        """Return the block that grows, if it is of a kind; else end it and begin one."""
        last = self._blocks[-1] if self._blocks else None
        if isinstance(last, kind) and not last.is_done:
            return last
        self._end_growing()
        block = TextBlock() if kind is TextBlock else ThinkingBlock(is_omitted=self._thoughts is Thoughts.OMITTED)
        self._blocks.append(block)
        return block

    def _end_growing(self) -> None:
        if self._blocks and not isinstance(self._blocks[-1], CallBlock):
            self._blocks[-1].is_done = True

    def _start_call(self, start: pb.ToolCallStart) -> None:
        self._end_growing()
        if (before := self._calls.pop(start.index, None)) is not None:
            before.is_done = True
        call = CallBlock(start.id or f"toolu_{uuid.uuid4().hex[:24]}", start.name)
        self._calls[start.index] = call
        self._blocks.append(call)

    def _news(self) -> list[Event]:
        """Return what has come of the block whose turn it is; a later one waits until those before it are complete."""
        events: list[Event] = []
        while self._num_told < len(self._blocks):
            block = self._blocks[self._num_told]
            events += block.news(self._num_told)
            if not block.is_done:
                break
            self._num_told += 1
        return events

    def _finish(self, finish: pb.Finish) -> list[Event]:
        for block in self._blocks:
            block.is_done = True
        events = self._news()
        called_tools = any(isinstance(block, CallBlock) for block in self._blocks)
        reason = {
            "stop_reason": stop_reason(finish, self._max_tokens, called_tools=called_tools),
            "stop_sequence": finish.stop or None,
        }
        usage = usage_object(finish.usage)
        content = [block.content() for block in self._blocks]
        self._message |= {"content": content, **reason, "usage": {**usage, "service_tier": "standard"}}
        return [*events, {"type": "message_delta", "delta": reason, "usage": usage}, {"type": "message_stop"}]

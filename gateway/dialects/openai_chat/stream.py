"""Worker events → `chat.completion.chunk` frames. Above: `routes.chat`; below: `shapes`, `sse`.

The rules of the wire: the first delta of a choice has the role; `finish_reason` comes once; a tool call's id, type and
name come on its first delta only; usage has a chunk of its own with no choices, and only when asked for.
"""

from __future__ import annotations

import uuid
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.shapes import SYSTEM_FINGERPRINT, finish_reason, logprob_items, usage_object
from gateway.sse import data_frame, one_line_json


class ChunkEncoder:
    """Encodes the events of one request, all choices; keeps what the wire's rules need remembered.

    Args:
        reply_id: `chatcmpl-…`, the same on every chunk.
        created_unix_s: the same on every chunk.
        model: name that the reply carries.
        include_usage: whether chunks carry `usage` (null) and `usage()` will be sent.
        wants_logprobs: whether text chunks carry logprobs.
    """

    def __init__(
        self,
        *,
        reply_id: str,
        created_unix_s: int,
        model: str,
        include_usage: bool = False,
        wants_logprobs: bool = False,
    ) -> None:
        self._head: dict[str, Any] = {
            "id": reply_id,
            "object": "chat.completion.chunk",
            "created": created_unix_s,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}
        self._wants_logprobs = wants_logprobs
        self._opened: set[int] = set()
        self._called_tools: set[int] = set()
        self._usages: list[pb.Usage] = []
        # The path of every token: only the text changes, so the rest is encoded once for each choice.
        self._text_frames: dict[int, tuple[bytes, bytes]] = {}

    def encode(self, index: int, event: pb.GenerateResponse) -> bytes:
        """Return the frames of one event of choice `index`, ready to send; empty when the client sees nothing of it."""
        kind = event.WhichOneof("event")
        if kind == "text":
            body = self._text(index, event.text)
        elif kind == "reasoning":
            body = self._chunk(index, {"reasoning_content": event.reasoning.text})
        elif kind == "tool_call_start":
            body = self._tool_call_start(index, event.tool_call_start)
        elif kind == "tool_call_arguments":
            arguments = event.tool_call_arguments
            call = {"index": arguments.index, "function": {"arguments": arguments.json_fragment}}
            body = self._chunk(index, {"tool_calls": [call]})
        elif kind == "finish":
            self._usages.append(event.finish.usage)
            reason = finish_reason(event.finish, called_tools=index in self._called_tools)
            body = self._chunk(index, {}, finish=reason)
        else:
            return b""
        return self._role(index) + body

    def usage(self) -> bytes:
        """Return the usage frame; after every choice has finished."""
        return data_frame({**self._head, "choices": [], "usage": usage_object(self._usages)})

    def _role(self, index: int) -> bytes:
        if index in self._opened:
            return b""
        self._opened.add(index)
        return self._chunk(index, {"role": "assistant", "content": ""})

    def _text(self, index: int, delta: pb.TextDelta) -> bytes:
        if self._wants_logprobs:
            logprobs = {"content": logprob_items(delta.logprobs), "refusal": None}
            return self._chunk(index, {"content": delta.text}, logprobs=logprobs)
        if not delta.text:
            return b""
        if index not in self._text_frames:
            before, _, after = self._chunk(index, {"content": "\x00"}).partition(b'"\\u0000"')
            self._text_frames[index] = (before, after)
        before, after = self._text_frames[index]
        return before + one_line_json(delta.text) + after

    def _tool_call_start(self, index: int, start: pb.ToolCallStart) -> bytes:
        self._called_tools.add(index)
        call = {
            "index": start.index,
            "id": start.id or f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": start.name, "arguments": ""},
        }
        return self._chunk(index, {"tool_calls": [call]})

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data_frame({**self._head, "choices": [choice], **self._tail})

"""Worker events → one `chat.completion` object. Above: `routes.chat`; below: `shapes`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

from gateway.dialects.openai_chat.shapes import SYSTEM_FINGERPRINT, finish_reason, logprob_items, usage_object


@dataclass(slots=True)
class _Call:
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, _Call] = field(default_factory=dict)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: pb.Finish | None = None


class ReplyBuilder:
    """Gathers the events of all choices of one request."""

    def __init__(
        self, *, reply_id: str, created_unix_s: int, model: str, n: int = 1, wants_logprobs: bool = False
    ) -> None:
        self._reply_id = reply_id
        self._created_unix_s = created_unix_s
        self._model = model
        self._wants_logprobs = wants_logprobs
        self._choices = [_Choice() for _ in range(n)]

    def add(self, index: int, event: pb.GenerateResponse) -> None:
        """Take one event of choice `index`."""
        choice = self._choices[index]
        kind = event.WhichOneof("event")
        if kind == "text":
            choice.text.append(event.text.text)
            if self._wants_logprobs:
                choice.logprobs.extend(logprob_items(event.text.logprobs))
        elif kind == "reasoning":
            choice.reasoning.append(event.reasoning.text)
        elif kind == "tool_call_start":
            start = event.tool_call_start
            choice.calls[start.index] = _Call(start.id or f"call_{uuid.uuid4().hex[:24]}", start.name)
        elif kind == "tool_call_arguments":
            part = event.tool_call_arguments
            if (call := choice.calls.get(part.index)) is not None:
                call.arguments.append(part.json_fragment)
        elif kind == "finish":
            choice.finish = event.finish

    def build(self) -> dict[str, Any]:
        """Return the reply; after every choice has finished."""
        usages = [choice.finish.usage for choice in self._choices if choice.finish is not None]
        return {
            "id": self._reply_id,
            "object": "chat.completion",
            "created": self._created_unix_s,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage_object(usages),
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.calls and not text else text,
            "refusal": None,
        }
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.arguments)},
                }
                for _, call in sorted(choice.calls.items())
            ]
        finish = choice.finish or pb.Finish()
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": finish_reason(finish, called_tools=bool(choice.calls)),
        }

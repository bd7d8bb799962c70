"""Content blocks of a reply, as they grow. Above: `builder`; below: the seal of reasoning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pydantic_core

from gateway.dialects.openai_responses.reasoning_text import sealed

Event = dict[str, Any]


class Block(ABC):
    """One block.

    Attributes:
        is_done: nothing will be added.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._pieces: list[str] = []
        self._num_told = 0
        self._is_started = False

    def add(self, piece: str) -> None:
        """Take what the model wrote next."""
        self._pieces.append(piece)

    def news(self, index: int) -> list[Event]:
        """Return the events since the last call: start, deltas, and stop once it is done."""
        events: list[Event] = []
        if not self._is_started:
            self._is_started = True
            events.append({"type": "content_block_start", "index": index, "content_block": self._empty()})
        deltas = self._deltas(self._pieces[self._num_told :])
        self._num_told = len(self._pieces)
        if self.is_done:
            deltas += self._last_deltas()
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        if self.is_done:
            events.append({"type": "content_block_stop", "index": index})
        return events

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """Return the whole block."""

    @abstractmethod
    def _empty(self) -> dict[str, Any]:
        """Return the block as it begins."""

    @abstractmethod
    def _deltas(self, pieces: list[str]) -> list[dict[str, Any]]:
        """Return what tells of new pieces."""

    def _last_deltas(self) -> list[dict[str, Any]]:
        return []


class TextBlock(Block):
    """What the model says."""

    def content(self) -> dict[str, Any]:
        """Return the whole block."""
        return {"type": "text", "text": "".join(self._pieces)}

    def _empty(self) -> dict[str, Any]:
        return {"type": "text", "text": ""}

    def _deltas(self, pieces: list[str]) -> list[dict[str, Any]]:
        return [{"type": "text_delta", "text": piece} for piece in pieces]


class ThinkingBlock(Block):
    """What the model thinks.

    Args:
        is_omitted: the client wants no text of it; the signature then carries it, and brings it back.
    """

    def __init__(self, *, is_omitted: bool) -> None:
        super().__init__()
        self._is_omitted = is_omitted

    def content(self) -> dict[str, Any]:
        """Return the whole block."""
        text = "" if self._is_omitted else "".join(self._pieces)
        return {"type": "thinking", "thinking": text, "signature": self._signature()}

    def _empty(self) -> dict[str, Any]:
        return {"type": "thinking", "thinking": "", "signature": ""}

    def _deltas(self, pieces: list[str]) -> list[dict[str, Any]]:
        return [] if self._is_omitted else [{"type": "thinking_delta", "thinking": piece} for piece in pieces]

    def _last_deltas(self) -> list[dict[str, Any]]:
        return [{"type": "signature_delta", "signature": self._signature()}]

    def _signature(self) -> str:
        # Where the text itself travels, the client hands that back.
        return sealed("".join(self._pieces) if self._is_omitted else "")


class CallBlock(Block):
    """A call of a tool."""

    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self._head = {"type": "tool_use", "id": call_id, "name": name}

    def content(self) -> dict[str, Any]:
        """Return the whole. Of arguments that were cut off, what was complete stays, as in clients of streams."""
        try:
            value = pydantic_core.from_json("".join(self._pieces) or "{}", allow_partial=True)
        except ValueError:
            value = {}
        return {**self._head, "input": value if isinstance(value, dict) else {}}

    def _empty(self) -> dict[str, Any]:
        return {**self._head, "input": {}}

    def _deltas(self, pieces: list[str]) -> list[dict[str, Any]]:
        return [{"type": "input_json_delta", "partial_json": piece} for piece in pieces if piece]

"""The harmony format of gpt-oss: messages in channels, where thoughts, calls and the answer are all messages.

Source of the format: OpenAI's harmony response format guide. A reply begins inside an assistant message:
`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`; a call has a recipient,
`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>`.
"""

from __future__ import annotations

import re

from workers.text.formats.pieces import (
    Arguments,
    CallEnd,
    CallStart,
    Content,
    Piece,
    Thought,
    Tools,
    first_marker,
    possible_start,
)

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *_ENDS)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_MAX_HEADER_CHARS = 1024


class HarmonyParser:
    """Parses one reply.

    Args:
        tools: what may be called; empty where nothing may.

    Attributes:
        thinking: whether the text fed last was in the analysis channel.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._buffer = ""
        self._header: str | None = ""
        self._kind = "content"
        self.thinking = False

    def push(self, text: str) -> list[Piece]:
        """Take new text; return what is certain now."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """The reply is over: return what was held back."""
        pieces: list[Piece] = []
        if self._header is None:
            self._say(pieces, self._buffer)
            self._end(pieces)
        elif (text := (self._header + self._buffer).strip()) and CHANNEL not in text and text != "assistant":
            pieces.append(Content(text))  # a message without header is still an answer
        self._buffer = ""
        return pieces

    def _advance(self, pieces: list[Piece]) -> bool:
        if self._header is not None:
            return self._read_header(pieces)
        hit = first_marker(self._buffer, (*_ENDS, START))
        if hit is None:
            keep = possible_start(self._buffer, (*_ENDS, START))
            self._say(pieces, self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        at, marker = hit
        self._say(pieces, self._buffer[:at])
        self._end(pieces)
        self._buffer = self._buffer[at + len(marker) :]
        self._header = ""
        return True

    def _read_header(self, pieces: list[Piece]) -> bool:
        at = self._buffer.find(MESSAGE)
        if at < 0:
            if len(self._buffer) > _MAX_HEADER_CHARS:
                self._open("final", None, pieces)
                return True
            return False
        header, self._buffer = self._buffer[:at], self._buffer[at + len(MESSAGE) :]
        channel = _CHANNEL.search(header)
        recipient = _RECIPIENT.search(header)
        self._open(channel[1] if channel else "final", recipient[1] if recipient else None, pieces)
        return True

    def _open(self, channel: str, recipient: str | None, pieces: list[Piece]) -> None:
        self._header = None
        self.thinking = False
        if recipient is not None and recipient in self._tools:
            self._kind = "call"
            pieces.append(CallStart(recipient))
        elif channel == "analysis":
            self._kind, self.thinking = "thought", True
        else:
            self._kind = "content"

    def _say(self, pieces: list[Piece], text: str) -> None:
        if not text:
            return
        if self._kind == "call":
            pieces.append(Arguments(text))
        elif self._kind == "thought":
            pieces.append(Thought(text))
        else:
            pieces.append(Content(text))

    def _end(self, pieces: list[Piece]) -> None:
        if self._kind == "call":
            pieces.append(CallEnd())
        self._kind, self.thinking = "content", False

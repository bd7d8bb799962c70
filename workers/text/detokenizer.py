"""Token ids to text, one at a time, never splitting a character.

Byte-level vocabularies cut characters into several tokens, and some tokenizers decode a token differently at
the start of a text (leading spaces). Decoding a short window before and after the new token and sending only
the difference, once it ends in a whole character, is right for both; the window keeps the cost constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes; a window that stays undecodable for longer holds bytes that are no UTF-8.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """Incremental decoder of one reply.

    Args:
        decode: ids to text, without special tokens.
    """

    __slots__ = ("_decode", "_ids", "_read", "_start")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain (perhaps empty)."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        pending = len(self._ids) - self._read
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and pending < _MAX_PENDING_TOKENS):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Return what is left when the reply ends; an unfinished character shows as U+FFFD."""
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return after[len(before) :]

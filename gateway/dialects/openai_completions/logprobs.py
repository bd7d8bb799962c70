"""The completions dialect's form of logprobs: four lists of equal length. Above: `reply`, `stream`. Pure.

`text_offset` says where in the choice's text a token begins, in characters. Tokens do not say whether they show: the
end of a reply and the beginning of a prompt do not, and some tokenizers drop a first space. So tokens are laid along
the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hostler.inference.v1 import inference_pb2 as pb

# OpenAI's own stand-in for "so unlikely that it has no number"; JSON has no infinity.
_FLOOR_LOGPROB = -9999.0


class TextOffsets:
    """Lays tokens along a text that may come in pieces, and later than the tokens."""

    def __init__(self) -> None:
        self._ahead = b""  # text that no token has covered
        self._owed = b""  # what tokens have covered of text that has not come
        self._num_chars = 0

    def extend(self, text: str) -> None:
        """Take the next piece of the text."""
        piece = text.encode("utf-8", errors="replace")
        if self._owed and piece.startswith(self._owed[: len(piece)]):
            covered = min(len(self._owed), len(piece))
            self._owed, piece = self._owed[covered:], piece[covered:]
        self._ahead += piece

    def place(self, token: bytes) -> int:
        """Return where the next token begins."""
        at = self._num_chars - bool(token and _continues(token[0]) and self._num_chars)
        known = self._ahead[: len(token)]
        if token.startswith(known):
            self._advance(token)
            self._owed += token[len(known) :]
        elif token[:1] == b" " and self._ahead.startswith(token[1:]):
            self._advance(token[1:])
        # Else the token does not show.
        return at

    def end(self) -> None:
        """The text is complete: whatever comes next begins behind it."""
        self._num_chars += sum(not _continues(byte) for byte in self._ahead)
        self._ahead = self._owed = b""

    def _advance(self, covered: bytes) -> None:
        self._ahead = self._ahead[len(covered) :]
        self._num_chars += sum(not _continues(byte) for byte in covered)


def _continues(byte: int) -> bool:
    """Whether a byte is inside a UTF-8 character."""
    return byte & 0xC0 == 0x80


def legacy_logprobs(items: Iterable[pb.TokenLogprob], offsets: TextOffsets) -> dict[str, list[Any]]:
    """Return the lists for some tokens; `offsets` must have the text that is known so far.

    The chosen token is always among `top_logprobs`, so there may be one more than were asked for. A first token, which
    has no logprob, has nulls.
    """
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for item in items:
        first = item.logprob != item.logprob
        top = None if first else {token_text(t.token): _logprob(t) for t in item.top}
        if top is not None:
            top.setdefault(token_text(item.token), _logprob(item))
        lists["tokens"].append(token_text(item.token))
        lists["token_logprobs"].append(None if first else _logprob(item))
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(offsets.place(item.token))
    return lists


def token_text(token: bytes) -> str:
    r"""Return a token as text; one that is not whole UTF-8 as OpenAI writes it: `bytes:\xe2\x80`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _logprob(item: pb.TokenLogprob) -> float:
    return max(item.logprob, _FLOOR_LOGPROB)

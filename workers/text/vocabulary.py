"""Token ids to the exact bytes they stand for, for logprobs: a token may hold a part of a character."""

from __future__ import annotations

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE (GPT-2) uses for bytes, inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    for offset, byte in enumerate(b for b in range(256) if b not in set(plain)):
        alphabet[chr(256 + offset)] = byte
    return alphabet


class TokenBytes:
    """Looks up the bytes of token ids.

    Args:
        tokenizer: transformers' fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        # What it would be pickled as is its part of tokenizer.json; all of that takes a tenth of a second to write.
        described = decoder.__getstate__() if decoder is not None else b""
        self._alphabet = _byte_alphabet() if b"ByteLevel" in described else None
        self._byte_characters = {ord(c): chr(byte) for c, byte in (self._alphabet or {}).items()}

    def __call__(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an id outside the vocabulary."""
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return b"" if piece is None else self._spelled(piece)

    def all(self, vocab_size: int) -> list[bytes]:
        """Return the bytes of every token below `vocab_size`; empty for ids that stand for nothing."""
        num_pieces = min(vocab_size, len(self._tokenizer))
        pieces = self._tokenizer.convert_ids_to_tokens(list(range(num_pieces)))
        found = [b"" if piece is None else self._spelled(piece) for piece in pieces]
        for token_id, content in self._added.items():
            if token_id < num_pieces:
                found[token_id] = str(content).encode()
        return found + [b""] * (vocab_size - num_pieces)

    def _spelled(self, piece: str) -> bytes:
        if self._alphabet is not None:
            try:
                return piece.translate(self._byte_characters).encode("latin-1")
            except UnicodeEncodeError:  # Characters that stand for no byte are none.
                return bytes(self._alphabet[c] for c in piece if c in self._alphabet)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

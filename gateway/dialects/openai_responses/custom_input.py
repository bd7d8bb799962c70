"""The text of a custom tool, out of the JSON in which a model writes it, piece by piece. Above: `output_items`.

That JSON is `{"input": "…"}`. Escapes may be cut anywhere, surrogate pairs too; whole characters only come out.
"""

from __future__ import annotations

import json
import re

import orjson

from gateway.dialects.openai_responses.tools import CUSTOM_INPUT

_OPENING = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
_MAX_ESCAPE_CHARS = 12  # \ud83d\ude00


class CustomInput:
    """Decodes one call's arguments as they come."""

    def __init__(self) -> None:
        self._raw = ""
        self._begin: int | None = None
        self._closed = False
        self._text: list[str] = []

    def feed(self, fragment: str) -> str:
        """Take a piece of JSON and return the text that it completes; perhaps empty."""
        if self._closed:
            self._raw += fragment
            return ""
        self._raw += fragment
        if self._begin is None:
            match = _OPENING.match(self._raw)
            if match is None:
                return ""
            self._begin = match.end()
        end = self._whole_until(self._begin)
        piece = self._raw[self._begin : end]
        self._begin = end
        text = _decoded(piece)
        self._text.append(text)
        return text

    def finish(self) -> tuple[str, str]:
        """Return the whole text, and what of it has not been returned yet.

        What is no object of that shape is taken for the text itself: nothing that a model wrote is lost.
        """
        told = "".join(self._text)
        if self._begin is not None:
            return told, ""
        try:
            value = orjson.loads(self._raw or "{}")
        except orjson.JSONDecodeError:
            return self._raw, self._raw
        if isinstance(value, dict):
            inner = value.get(CUSTOM_INPUT)
            if isinstance(inner, str):
                return inner, inner
            if not value:
                return "", ""
        return self._raw, self._raw

    def _whole_until(self, begin: int) -> int:
        """Return where the whole characters of the string end; notes whether its closing quote was seen."""
        raw, index = self._raw, begin
        while index < len(raw):
            if raw[index] == '"':
                self._closed = True
                return index
            if raw[index] != "\\":
                index += 1
                continue
            length = _escape_chars(raw, index)
            if index + length > len(raw):
                return index
            index += length
        return index


def _escape_chars(raw: str, index: int) -> int:
    """Return the length of the escape that begins here; of a high surrogate, together with its low one."""
    if raw[index + 1 : index + 2] != "u":
        return 2
    unit = raw[index + 2 : index + 6]
    if len(unit) == 4 and unit[:2].lower() in ("d8", "d9", "da", "db"):
        following = raw[index + 6 : index + 8]
        if following in ("", "\\", "\\u"):
            return _MAX_ESCAPE_CHARS
    return 6


def _decoded(piece: str) -> str:
    if "\\" not in piece:
        return piece
    try:
        text: str = json.loads(f'"{piece}"', strict=False)
    except ValueError:
        return piece
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

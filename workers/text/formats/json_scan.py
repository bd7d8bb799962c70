"""Reads one JSON value from text that arrives in pieces: strictly, so that what was sent on is a prefix of valid JSON.

Above: the parsers of calls. Below: nothing. One repair: raw control characters inside strings, which models write and
JSON forbids, are passed on escaped.
"""

from __future__ import annotations

import enum
import re

_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SPACE = frozenset(" \t\r\n")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_SCALAR_CHARS = 4096
_MAX_DEPTH = 256


class _Expect(enum.Enum):
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    KEY_OR_END = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    COMMA_OR_END = enum.auto()


class JsonScanner:
    """One value, fed in pieces.

    Attributes:
        done: the value is complete.
        broken: what came is no JSON.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._stack: list[str] = []
        self._expect = _Expect.VALUE
        self._in_string = False
        self._is_key = False
        self._escape = ""
        self._scalar = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Return (text that belongs to the value, rest). The rest is empty until `done` or `broken`."""
        out: list[str] = []
        for at, char in enumerate(text):
            if self._in_string:
                piece = self._string(char)
            elif self._scalar:
                if char in _SCALAR_CHARS and len(self._scalar) < _MAX_SCALAR_CHARS:
                    self._scalar += char
                    piece = char
                else:
                    self._end_scalar()
                    if self.done or self.broken:
                        return "".join(out), text[at:]
                    piece = self._structure(char)
            else:
                piece = self._structure(char)
            if self.broken:
                return "".join(out), text[at:]
            out.append(piece)
            if self.done:
                return "".join(out), text[at + 1 :]
        return "".join(out), ""

    def finish(self) -> None:
        """The text is over: a number at the top may be complete only now."""
        if self._scalar:
            self._end_scalar()
        self.broken = self.broken or not self.done

    def _string(self, char: str) -> str:
        if self._escape:
            self._escape += char
            if self._escape[1] == "u":
                if char not in _HEX and len(self._escape) > 2:
                    self.broken = True
                if len(self._escape) == 6:
                    self._escape = ""
            elif char in _ESCAPES:
                self._escape = ""
            else:
                self.broken = True
        elif char == "\\":
            self._escape = char
        elif char == '"':
            self._in_string = False
            if self._is_key:
                self._expect = _Expect.COLON
            else:
                self._end_value()
        elif char < " ":
            return f"\\u{ord(char):04x}" if char not in "\n\t\r" else {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[char]
        return char

    def _structure(self, char: str) -> str:
        expect = self._expect
        if char in _SPACE:
            return char
        if char == '"' and expect is not _Expect.COLON and expect is not _Expect.COMMA_OR_END:
            self._in_string = True
            self._is_key = expect in (_Expect.KEY, _Expect.KEY_OR_END)
        elif char == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif char == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
        elif (char == "}" and expect in (_Expect.KEY_OR_END, _Expect.COMMA_OR_END) and self._stack[-1] == "{") or (
            char == "]" and expect in (_Expect.VALUE_OR_END, _Expect.COMMA_OR_END) and self._stack[-1] == "["
        ):
            self._stack.pop()
            self._end_value()
        elif expect not in (_Expect.VALUE, _Expect.VALUE_OR_END):
            self.broken = True
        elif char in "{[" and len(self._stack) < _MAX_DEPTH:
            self._stack.append(char)
            self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END
        elif char in "-0123456789tfn":
            self._scalar = char
        else:
            self.broken = True
        return char

    def _end_scalar(self) -> None:
        if _SCALAR.fullmatch(self._scalar):
            self._end_value()
        else:
            self.broken = True
        self._scalar = ""

    def _end_value(self) -> None:
        self._expect = _Expect.COMMA_OR_END
        self.done = not self._stack

"""Calls written as Python: `[get_weather(city="Paris", days=3), now()]`, or one call a line inside a code block.

Families: Llama 4 and Llama 3.2 (bracketed list), Gemma 3 and SmolLM3's code mode (fenced or tagged block). Each
argument is converted and sent once it is complete.
"""

from __future__ import annotations

import json
import re

from workers.text.formats.body import MAX_HEADER_CHARS, Body
from workers.text.formats.pieces import Tools
from workers.text.formats.python_values import python_to_json

_CALL = re.compile(r"\s*(?:print\(\s*)?(?P<name>[A-Za-z_][\w.\-]*)\(")
_MAY_BE_CALL = re.compile(r"\s*(?:print\(?\s*)?[\w.\-]*")
_KEY = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*=(?!=)")
_MAY_BE_KEY = re.compile(r"\s*(?:[A-Za-z_]\w*)?\s*=?")


class PythonicCalls(Body):
    """Calls up to `end`: in brackets separated by commas, or by lines.

    Args:
        end: text that ends the list of calls: "]" or the block's closing marker.
    """

    def __init__(self, tools: Tools, opener: str, closers: tuple[str, ...] = (), *, end: str) -> None:
        super().__init__(tools, opener, closers)
        self._end_text = end
        self._name = ""
        self._num_calls = 0
        self._num_arguments = 0
        self._value = _ValueEnd()
        self._in_call = self._in_value = False
        self._read = 0

    def _step(self) -> bool:
        if self._in_value:
            return self._read_value()
        return self._read_key() if self._in_call else self._read_call()

    def _at_end(self) -> None:
        if self._num_calls and not self._in_call and not self._buffer.strip(" \t\n,)]"):
            self._buffer = ""
            self._over = True

    def _read_call(self) -> bool:
        lead = len(self._buffer) - len(self._buffer.lstrip(" \t\r\n" + (",;)" if self._num_calls else "")))
        rest = self._buffer[lead:]
        if self._num_calls and rest.startswith(self._end_text):
            self._take(lead + len(self._end_text))
            self._withheld = ""
            self._closing = list(self._closers)
            return True
        match = _CALL.match(rest)
        if match is not None and match["name"] == "print" and "print" not in self._tools:
            match = None  # the wrapper, whose inside has not arrived yet
        if match is None:
            waits = _MAY_BE_CALL.fullmatch(rest) or (self._num_calls and self._end_text.startswith(rest))
            if waits and len(rest) < MAX_HEADER_CHARS:
                return False
            self._fail()
            return True
        if match["name"] not in self._tools:
            self._fail()
            return True
        self._take(lead + match.end())
        self._name, self._in_call, self._num_arguments = match["name"], True, 0
        return True

    def _read_key(self) -> bool:
        stripped = self._buffer.lstrip(" \t\r\n,")
        lead = len(self._buffer) - len(stripped)
        if stripped.startswith(")"):
            self._take(lead + 1)
            if not self._started:
                self._start(self._name)
            self._arguments("}" if self._num_arguments else "{}")
            self._in_call = False
            self._num_calls += 1
            self._end(more=True)
            return True
        match = _KEY.match(stripped)
        if match is None or match.end() == len(stripped):
            if _MAY_BE_KEY.fullmatch(stripped) and len(stripped) < MAX_HEADER_CHARS:
                return False
            self._fail()
            return True
        self._take(lead + match.end())
        if not self._started:
            self._start(self._name)
        before = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        self._arguments(before + json.dumps(match["key"]) + ": ")
        self._value, self._read, self._in_value = _ValueEnd(), 0, True
        return True

    def _read_value(self) -> bool:
        end = self._value.find(self._buffer, self._read)
        if end is None:
            self._read = len(self._buffer)
            return False
        converted = python_to_json(self._buffer[:end].strip())
        if converted is None:
            self._fail()
            return True
        self._take(end)
        self._arguments(converted)
        self._in_value = False
        return True


class _ValueEnd:
    """Finds the comma or bracket that ends a literal, minding quotes and nesting."""

    def __init__(self) -> None:
        self._quote = ""
        self._escaped = False
        self._depth = 0

    def find(self, text: str, start: int) -> int | None:
        """Scan on from `start`; return the end's position in `text`, if it is there."""
        for at in range(start, len(text)):
            char = text[at]
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}" and self._depth:
                self._depth -= 1
            elif char in ",)" and not self._depth:
                return at
        return None

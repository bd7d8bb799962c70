"""Calls written as JSON: one object with a name and arguments, or an array of them; and JSON behind a header.

Families: Hermes and Qwen (`<tool_call>{…}</tool_call>`), Llama 3, older Mistral (`[TOOL_CALLS] [{…}]`); behind a header
newer Mistral (`[TOOL_CALLS]name[ARGS]{…}`), DeepSeek, Llama's `<function=name>{…}</function>`.
"""

from __future__ import annotations

import json
import re

from workers.text.formats.body import MAX_HEADER_CHARS, Body
from workers.text.formats.json_scan import JsonScanner
from workers.text.formats.pieces import Tools

_KEY = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*(?=\S)')
_NAMES = {"name", "tool_name"}
_ARGUMENTS = {"arguments", "parameters", "args", "input"}
_HARMLESS = {"type", "id", "description"}


class JsonCall(Body):
    """`{"name": …, "arguments": {…}}`, keys in any order, perhaps inside `"function"`, perhaps in an array."""

    def __init__(self, tools: Tools, opener: str, closers: tuple[str, ...] = ()) -> None:
        super().__init__(tools, opener, closers)
        self._in_array = False
        self._state = "open"
        self._key = ""
        self._reset()

    def _reset(self) -> None:
        self._name: str | None = None
        self._depth = 0
        self._early = ""
        self._sent_arguments = False
        self._scanner: JsonScanner | None = None
        self._value = ""

    def _step(self) -> bool:
        if self._state == "value":
            return self._read_value()
        if self._state in ("key", "key_or_end"):
            return self._read_key()
        self._take(len(self._buffer) - len(self._buffer.lstrip()))
        if not self._buffer:
            return False
        char = self._buffer[0]
        if self._state == "open" and char in "{[":
            self._take(1)
            if char == "[":
                self._in_array, self._state = True, "item"
            else:
                self._depth, self._state = 1, "key_or_end"
        elif self._state == "item" and char == "{":
            self._take(1)
            self._depth, self._state = 1, "key_or_end"
        elif self._state == "after_value" and char == ",":
            self._take(1)
            self._state = "key"
        elif self._state == "after_value" and char == "}":
            self._close_object()
        elif self._state == "after_item" and char in ",]":
            self._take(1)
            if char == "]":
                self._closing = list(self._closers)
            else:
                self._state = "item"
        else:
            self._fail()
        return True

    def _read_key(self) -> bool:
        stripped = self._buffer.lstrip()
        if self._state == "key_or_end" and stripped.startswith("}"):
            self._take(len(self._buffer) - len(stripped))
            self._close_object()
            return True
        match = _KEY.match(self._buffer)
        if match is None:
            if stripped and (not stripped.startswith('"') or len(stripped) > MAX_HEADER_CHARS or self._key_is_odd()):
                self._fail()
                return True
            return False
        self._take(match.end())
        self._key = match[1]
        if self._key == "function" and self._buffer.startswith("{"):
            self._take(1)
            self._depth += 1
            self._state = "key_or_end"
        elif self._key in _NAMES | _ARGUMENTS | _HARMLESS | {"function"}:
            self._scanner, self._value, self._state = JsonScanner(), "", "value"
        else:
            self._fail()
        return True

    def _key_is_odd(self) -> bool:
        """Whether a quoted key is complete and what follows is no colon."""
        rest = re.sub(r'^\s*"(?:[^"\\]|\\.)*"\s*', "", self._buffer)
        return rest != self._buffer and rest != "" and not rest.startswith(":")

    def _streams(self) -> bool:
        return self._started and self._key in _ARGUMENTS

    def _read_value(self) -> bool:
        assert self._scanner is not None
        if not self._value and self._key in _ARGUMENTS and self._buffer[:1] not in ("{", '"', "n", ""):
            self._fail()
            return True
        if not self._buffer:
            return False
        first = self._value[:1] or self._buffer[:1]
        value, rest = self._scanner.feed(self._buffer)
        self._take(len(self._buffer) - len(rest))
        self._value += value
        if self._streams() and first == "{":
            self._arguments(value)
            self._sent_arguments = True
        if self._scanner.broken:
            self._fail()
            return True
        if not self._scanner.done:
            return False
        self._state = "after_value"
        self._value_is_complete(first)
        return True

    def _value_is_complete(self, first: str) -> None:
        if self._key in _ARGUMENTS:
            if first != "{":
                inner = json.loads(self._value)
                self._value = inner if isinstance(inner, str) and _is_object(inner) else ""
                if inner not in (None, "") and not self._value:
                    self._fail()
                    return
            if not self._started:
                self._early = self._value
            elif not self._sent_arguments and self._value:
                self._arguments(self._value)
                self._sent_arguments = True
        elif self._key in _NAMES or self._key == "function":
            name = json.loads(self._value)
            if self._name is not None or not isinstance(name, str) or name not in self._tools:
                self._fail()
                return
            self._name = name
            early = self._early
            self._start(name)
            if early:
                self._arguments(early)
                self._sent_arguments = True

    def _close_object(self) -> None:
        self._take(1)
        self._depth -= 1
        self._state = "after_value"
        if self._depth:
            return
        if self._name is None or not self._started:
            self._fail()
            return
        if not self._sent_arguments:
            self._arguments("{}")
        self._end(more=self._in_array)
        self._reset()
        self._state = "after_item"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


class HeaderCall(Body):
    """A header that holds the name, then an object of arguments.

    Args:
        header: must match all text before the first brace; its group `name` is the tool.
    """

    def __init__(self, tools: Tools, opener: str, closers: tuple[str, ...] = (), *, header: re.Pattern[str]) -> None:
        super().__init__(tools, opener, closers)
        self._header = header
        self._scanner = JsonScanner()

    def _step(self) -> bool:
        if not self._started:
            brace = self._buffer.find("{")
            if brace < 0:
                if len(self._buffer) > MAX_HEADER_CHARS:
                    self._fail()
                    return True
                return False
            match = self._header.fullmatch(self._buffer[:brace])
            if match is None or match["name"] not in self._tools:
                self._fail()
                return True
            self._take(brace)
            self._start(match["name"])
        if not self._buffer:
            return False
        value, rest = self._scanner.feed(self._buffer)
        self._take(len(self._buffer) - len(rest))
        self._arguments(value)
        if self._scanner.broken:
            self._fail()
        elif self._scanner.done:
            self._end()
        else:
            return False
        return True

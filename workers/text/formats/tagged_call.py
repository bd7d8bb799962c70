"""Calls whose arguments are tagged one by one, converted to JSON as they arrive.

Families: Qwen3-Coder and Qwen3.5 (`<function=name><parameter=key>value</parameter></function>`), GLM 4
(`name<arg_key>key</arg_key><arg_value>value</arg_value>`). Values carry no type: the tool's schema says what is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.text.formats.body import MAX_HEADER_CHARS, Body
from workers.text.formats.pieces import Tools, possible_start
from workers.text.formats.python_values import python_to_json


@dataclass(frozen=True, slots=True)
class Tags:
    """How one family tags a call.

    Attributes:
        header_start: how a header begins, white space aside; empty where the name itself comes first.
        header: matches the header, white space included; group `name`. Must end in something that ends a name.
        parameter: matches the opening of an argument; group `key`.
        value_end: ends a value; one line break before it is not part of the value.
        end: ends the call; empty when only the closing marker does.
    """

    header_start: str
    header: re.Pattern[str]
    parameter: re.Pattern[str]
    value_end: str
    end: str


class TaggedCall(Body):
    """A header, tagged arguments, an end."""

    def __init__(self, tools: Tools, opener: str, closers: tuple[str, ...] = (), *, tags: Tags) -> None:
        super().__init__(tools, opener, closers)
        self._tags = tags
        self._name = ""
        self._key: str | None = None
        self._is_text = False
        self._value = ""
        self._num_arguments = 0

    def _step(self) -> bool:
        if not self._name:
            return self._read_header()
        return self._read_parameter() if self._key is None else self._read_value()

    def _at_end(self) -> None:
        if self._started and self._key is None and not self._tags.end and not self._buffer.strip():
            self._finish_call()

    def _read_header(self) -> bool:
        match = self._tags.header.match(self._buffer)
        if match is None:
            start, head = self._tags.header_start, self._buffer.lstrip()
            if len(self._buffer) > MAX_HEADER_CHARS or not (head.startswith(start) or start.startswith(head)):
                self._fail()
                return True
            return False
        if match["name"] not in self._tools:
            self._fail()
            return True
        self._name = match["name"]
        self._take(match.end())
        self._start(self._name)
        return True

    def _read_parameter(self) -> bool:
        stripped = self._buffer.lstrip()
        ends = (self._tags.end,) if self._tags.end else self._closers
        for end in ends:
            if stripped.startswith(end):
                self._take(len(self._buffer) - len(stripped) + (len(end) if self._tags.end else 0))
                self._finish_call()
                return True
        if match := self._tags.parameter.match(stripped):
            self._take(len(self._buffer) - len(stripped) + match.end())
            self._open_value(match["key"])
            return True
        if len(stripped) > MAX_HEADER_CHARS or (stripped and not stripped.startswith("<")):
            self._fail()
            return True
        return False

    def _open_value(self, key: str) -> None:
        self._key = key
        self._value = ""
        self._is_text = is_text(self._tools[self._name].property_schema(key))
        before = ", " if self._num_arguments else "{"
        self._num_arguments += 1
        self._arguments(before + json.dumps(key, ensure_ascii=False) + ": " + ('"' if self._is_text else ""))

    def _read_value(self) -> bool:
        end = self._tags.value_end
        at = self._buffer.find(end)
        if at >= 0:
            text = self._take(at + len(end))[: -len(end)].removesuffix("\n")
        else:
            text = self._take(len(self._buffer) - possible_start(self._buffer, (end, "\n" + end)))
        if self._is_text:
            self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text
        if at < 0:
            return False
        self._arguments('"' if self._is_text else typed(self._value))
        self._key = None
        return True

    def _finish_call(self) -> None:
        self._arguments("}" if self._num_arguments else "{}")
        self._end()


def is_text(schema: Mapping[str, Any]) -> bool:
    """Return whether a value under `schema` is surely a string, so that it can be sent on as it comes."""
    if schema.get("type") == "string":
        return True
    options = schema.get("enum")
    return isinstance(options, list) and bool(options) and all(isinstance(option, str) for option in options)


def typed(text: str) -> str:
    """Return a value of unknown type as JSON: JSON as it is, Python's literals converted, anything else a string."""
    stripped = text.strip()
    try:
        json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        converted = python_to_json(stripped)
        return json.dumps(text, ensure_ascii=False) if converted is None else converted
    return stripped


def _refuse(name: str) -> object:
    raise ValueError(name)

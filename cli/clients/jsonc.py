"""JSON as editors write it, with comments and trailing commas: read with places, changed without touching the rest.

Above: `merge`; below: nothing. No library for Python keeps comments. What `put` returns is read again by `merge` and
compared with what it should mean, so that a mistake here cannot reach anybody's file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_BLANK = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_SCALAR = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_MAX_DEPTH = 64


class NotJson(ValueError):
    """The text is not JSON, not even with comments."""


@dataclass(slots=True)
class Node:
    """A value and where it stands: text[start:end]."""

    start: int
    end: int = 0
    value: Any = None
    members: dict[str, Node] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)


def read(text: str) -> Node:
    """Return the one value of a text; an empty one counts as an empty object.

    Raises:
        NotJson: with the line of the fault.
    """
    begin = _skip(text, 0)
    if begin == len(text):
        return Node(begin, begin, {})
    node = _value(text, begin, 0)
    if _skip(text, node.end) != len(text):
        raise _fault(text, node.end)
    return node


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _fault(text: str, at: int) -> NotJson:
    return NotJson(f"line {text.count(chr(10), 0, at) + 1} is not JSON")


def _value(text: str, at: int, depth: int) -> Node:
    if depth > _MAX_DEPTH:
        raise _fault(text, at)
    node = Node(at)
    if text.startswith("{", at):
        _object(text, node, depth)
    elif text.startswith("[", at):
        _array(text, node, depth)
    elif match := (_STRING.match(text, at) or _SCALAR.match(text, at)):
        node.end, node.value = match.end(), json.loads(match[0])
    else:
        raise _fault(text, at)
    return node


def _object(text: str, node: Node, depth: int) -> None:
    at = _skip(text, node.start + 1)
    while not text.startswith("}", at):
        key = _STRING.match(text, at)
        if key is None:
            raise _fault(text, at)
        at = _skip(text, key.end())
        if not text.startswith(":", at):
            raise _fault(text, at)
        member = _value(text, _skip(text, at + 1), depth + 1)
        node.members[json.loads(key[0])] = member
        at = _next(text, member.end, "}")
    node.end = at + 1
    node.value = {key: member.value for key, member in node.members.items()}


def _array(text: str, node: Node, depth: int) -> None:
    at = _skip(text, node.start + 1)
    while not text.startswith("]", at):
        item = _value(text, at, depth + 1)
        node.items.append(item)
        at = _next(text, item.end, "]")
    node.end = at + 1
    node.value = [item.value for item in node.items]


def _next(text: str, at: int, closing: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if not text.startswith(closing, at):
        raise _fault(text, at)
    return at


def put(text: str, path: tuple[str, ...], value: Any) -> str:
    """Return the text with `value` at `path`, objects on the way made as needed; everything else stays as it is.

    Raises:
        NotJson: the text is none, or something on the way is not an object.
    """
    node = read(text)
    if node.start == node.end:
        return text + _dump(_nested(path, value), 0) + "\n"
    depth = 0
    while depth < len(path) and path[depth] in node.members:
        node = node.members[path[depth]]
        depth += 1
    if depth == len(path):
        return text[: node.start] + _dump(value, depth) + text[node.end :]
    if not isinstance(node.value, dict):
        raise NotJson(f"{'.'.join(path[:depth])} is not an object")
    return _insert(text, node, path[depth], _nested(path[depth + 1 :], value), depth + 1)


def _insert(text: str, node: Node, key: str, value: Any, depth: int) -> str:
    member = f"\n{'  ' * depth}{json.dumps(key, ensure_ascii=False)}: {_dump(value, depth)}"
    at = node.start + 1
    if node.members:
        return f"{text[:at]}{member},{text[at:]}"
    return f"{text[:at]}{member}\n{'  ' * (depth - 1)}{text[at:].lstrip(' ')}"


def _nested(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def _dump(value: Any, depth: int) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n" + "  " * depth)

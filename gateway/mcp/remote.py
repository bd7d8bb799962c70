"""What an MCP server offers and what can go wrong with it, in words of our own. Pure.

Above: everything of this room that deals with such tools. Below: nothing; the `mcp` package is not imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_TOOLS = 256
"""Of one server."""
MAX_NAME_CHARS = 128
MAX_DESCRIPTION_CHARS = 16 * 1024
MAX_SCHEMA_CHARS = 64 * 1024
_MAX_DEPTH = 32

Kind = Literal["protocol", "tool", "http"]


class McpFault(Exception):
    """A server, a tool or the way to it failed. Never carries keys or addresses other than the caller's own.

    Args:
        message: one sentence for whoever asked.
        kind: "tool": the tool ran and says that it failed; "http": the server's HTTP status; "protocol": all else.
        code: JSON-RPC's or HTTP's, where there is one.
    """

    def __init__(self, message: str, *, kind: Kind = "protocol", code: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.code = code


@dataclass(frozen=True, slots=True)
class RemoteTool:
    """One tool, as its server described it.

    Attributes:
        input_schema: JSON Schema of its arguments.
        annotations: the server's own hints, not verified by anybody.
    """

    name: str
    description: str
    input_schema: dict[str, Any]
    annotations: dict[str, Any] = field(default_factory=dict)

    @property
    def is_read_only(self) -> bool:
        """Whether the server says that it changes nothing."""
        return self.annotations.get("readOnlyHint") is True

    @property
    def digest(self) -> str:
        """What must not change once people have seen it: name, description and schema."""
        seen = json.dumps([self.name, self.description, self.input_schema], sort_keys=True)
        return hashlib.sha256(seen.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Listing:
    """What a server offers now.

    Attributes:
        notes: what was left out and why, in sentences.
    """

    tools: tuple[RemoteTool, ...] = ()
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> RemoteTool | None:
        """Return a tool by its name."""
        return next((tool for tool in self.tools if tool.name == name), None)

    def only(self, allowed: Callable[[RemoteTool], bool]) -> Listing:
        """Return the same without the tools that are not allowed."""
        return Listing(tuple(tool for tool in self.tools if allowed(tool)), self.notes)


def unfit(tool: RemoteTool) -> str:
    """Return why a tool cannot be shown to a model; empty if it can. Its words come from a stranger."""
    if not tool.name or len(tool.name) > MAX_NAME_CHARS or not tool.name.isprintable():
        return "its name is empty, too long or not printable"
    if len(tool.description) > MAX_DESCRIPTION_CHARS:
        return f"its description is longer than {MAX_DESCRIPTION_CHARS} characters"
    if _depth(tool.input_schema) > _MAX_DEPTH:
        return f"its schema is nested deeper than {_MAX_DEPTH} levels"
    try:
        if len(json.dumps(tool.input_schema)) > MAX_SCHEMA_CHARS:
            return f"its schema is longer than {MAX_SCHEMA_CHARS} characters"
    except (ValueError, TypeError, RecursionError):
        return "its schema is not JSON"
    if any(not reference.startswith("#") for reference in _references(tool.input_schema)):
        return "its schema refers to something outside itself"
    return ""


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        level = [inner for each in level for inner in _inner(each)]
    return depth


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _references(schema: object) -> Iterable[str]:
    pending = [schema]
    while pending:
        each = pending.pop()
        if isinstance(each, Mapping) and isinstance(reference := each.get("$ref"), str):
            yield reference
        pending.extend(_inner(each))


def pinned(pins: Mapping[str, str], tools: Iterable[RemoteTool]) -> tuple[Listing, dict[str, str]]:
    """Return what may be offered of what a server lists, and the pins from now on.

    Args:
        pins: tool → digest of what was first seen under its name.
        tools: as the server lists them.
    """
    known, good, notes = dict(pins), list[RemoteTool](), list[str]()
    for number, tool in enumerate(tools):
        if number >= MAX_TOOLS:
            notes.append(f"More than {MAX_TOOLS} tools: the rest was left out.")
            break
        if reason := unfit(tool):
            notes.append(f"The tool {tool.name[:MAX_NAME_CHARS]!r} was left out: {reason}.")
        elif known.setdefault(tool.name, tool.digest) != tool.digest:
            notes.append(changed(tool.name))
        elif all(tool.name != other.name for other in good):
            good.append(tool)
    return Listing(tuple(good), tuple(notes)), known


def changed(name: str) -> str:
    """Return the sentence for a tool that is not what it was."""
    return f"The tool {name!r} has changed since it was first listed, so it is off until hostler is restarted."


def cut(text: str, max_chars: int) -> str:
    """Return a text's beginning, and say so if that is not all."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[cut: the first {max_chars} of {len(text)} characters]"

"""What a parser finds in a reply, and what it must know of the tools. Above: parsers and `reply.py`; below: nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of an offered tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the call's arguments, as JSON text."""

    json: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete."""


Piece = Content | Thought | CallStart | Arguments | CallEnd


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called.

    Attributes:
        schema: JSON Schema of its arguments.
        strict: its calls must follow the schema.
    """

    name: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def property_schema(self, key: str) -> Mapping[str, Any]:
        """Return the schema of one argument; empty when the schema does not name it."""
        properties = self.schema.get("properties")
        value = properties.get(key) if isinstance(properties, Mapping) else None
        return value if isinstance(value, Mapping) else {}


Tools = Mapping[str, Tool]


def possible_start(window: str, markers: Sequence[str]) -> int:
    """Return the length of the longest tail of `window` that begins a marker without being whole."""
    longest = max((len(marker) for marker in markers), default=0)
    for length in range(min(longest - 1, len(window)), 0, -1):
        tail = window[len(window) - length :]
        if any(marker.startswith(tail) for marker in markers):
            return length
    return 0


def first_marker(window: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Return (position, marker) of the earliest marker in `window`, the longest of those that begin there."""
    found = ((at, -len(marker), marker) for marker in markers if (at := window.find(marker)) >= 0)
    best = min(found, default=None)
    return None if best is None else (best[0], best[2])

"""An event stream's text → its frames, as strict parsers read it. Above: the judges; below: nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Frame:
    """One event: its `event:` line ("" if it has none) and its data, parsed; None for [DONE]."""

    name: str
    data: Any


def frames_of(text: str) -> tuple[list[Frame], list[str]]:
    """Return the frames of a stream, and what is wrong with its form. Comments are skipped."""
    frames, problems = [], []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        name, data = "", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            if field == "event":
                name = value.strip()
            elif field == "data":
                data.append(value.removeprefix(" "))
            elif line and field:
                problems.append(f"a line is neither event, data nor comment: {line[:60]!r}")
        if not data:
            problems += [f"an event {name!r} has no data"] if name else []
            continue
        joined = "\n".join(data)
        try:
            frames.append(Frame(name, None if joined == "[DONE]" else json.loads(joined)))
        except ValueError:
            problems.append(f"data is not JSON: {joined[:60]!r}")
    return frames, problems

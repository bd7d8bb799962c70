"""Reading event streams; `frames_of` is for those whose events have their name in both of their lines."""

from __future__ import annotations

from typing import Any

import orjson


def frames_of(body: str) -> list[dict[str, Any]]:
    """Return the events of a stream. Comments are skipped."""
    events = []
    for frame in body.split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        assert len(lines) == 2
        assert lines[0].startswith("event: ")
        assert lines[1].startswith("data: ")
        event = orjson.loads(lines[1][6:])
        assert event["type"] == lines[0][7:]
        events.append(event)
    return events


def sse_data(body: str) -> list[str]:
    """Return the payloads of the data lines of an event stream."""
    return [line[6:] for line in body.splitlines() if line.startswith("data: ")]

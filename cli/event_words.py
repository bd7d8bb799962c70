"""What happened to models and devices, one line each, for people. Pure. Above: `cli.seeing`; below: an event's JSON."""

from __future__ import annotations

import time
from typing import Any

from hostler.words import size

STYLES = {
    "ready": "green",
    "evicted": "yellow",
    "asleep": "blue",
    "waiting": "yellow",
    "failed": "red",
    "lost": "red",
    "device_lost": "red",
    "foreign_memory": "yellow",
}


def when(unix_ms: int, now_unix_s: float) -> str:
    """Return the local time of day; the date before it unless it is today's."""
    at, now = time.localtime(unix_ms / 1000), time.localtime(now_unix_s)
    today = (at.tm_year, at.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", at)


def what(event: dict[str, Any]) -> str:
    """Return what happened: "evicted coder from cuda:0 (5.1 GiB)"."""
    kind, model, device = event["kind"], event["model"] or "a model", event["device"]
    on, off = (f" on {device}", f" from {device}") if device else ("", "")
    words = {
        "placed": f"placing {model}{on}",
        "ready": f"{model} is ready{on}",
        "evicted": f"evicted {model}{off}",
        "asleep": f"put {model} to sleep" + (f", off {device}" if device else ""),
        "unloaded": f"unloaded {model}{off}",
        "resized": f"resized the KV cache of {model}{on}",
        "pinned": f"pinned {model}",
        "unpinned": f"unpinned {model}",
        "waiting": f"{model} waits for memory{on}",
        "failed": f"{model} failed{on}",
        "lost": f"lost the worker of {model}{on}",
        "adopted": f"found {model}{on} again",
        "device_lost": f"lost device {device}",
        "device_found": f"found device {device}",
        "foreign_memory": f"other programs on {device}",
    }.get(kind, f"{kind}: {model}{on}")
    took = f"{event['duration_ms'] / 1000:.1f} s" if event["duration_ms"] else ""
    extras = [text for text in (size(event["num_bytes"]) if event["num_bytes"] else "", took) if text]
    return words + (f" ({', '.join(extras)})" if extras else "")


def line(event: dict[str, Any], now_unix_s: float) -> str:
    """Return the whole line."""
    return f"{when(event['unix_ms'], now_unix_s)} {what(event)}" + (f": {event['why']}" if event["why"] else "")

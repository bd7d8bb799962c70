"""Sizes, time spans and the stages of a load in words for people: every room says them the same way. Pure."""

from __future__ import annotations

STAGES = {
    "": "starting",
    "start": "starting",
    "queue": "waiting for memory",
    "evict": "making room",
    "download": "downloading",
    "convert": "converting",
    "verify": "verifying",
    "spawn": "starting a worker",
    "import": "importing libraries",
    "read": "reading weights",
    "warm-up": "warming up",
    "compile": "compiling kernels for this processor (once)",
    "wake": "waking up",
}
"""`EnsureProgress.stage` → what is going on."""


def stage(name: str) -> str:
    """Return what a stage of a load means; one that is not known is shown by its own name."""
    return STAGES.get(name, name)


def size(num_bytes: float | None) -> str:
    """Return bytes for people: 0, 512 B, 1.5 GiB, 24 GiB."""
    if not num_bytes:
        return "0"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1023.5:
            return (
                f"{num_bytes:.0f} {unit}" if unit in ("B", "KiB") or num_bytes >= 99.95 else f"{num_bytes:.1f} {unit}"
            )
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Return a time span for people: 0 s, 0.4 s, 12 s, 3 min, 2 h 5 min, 3 d."""
    if seconds < 0.05:
        return "0 s"
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{round(seconds / 86400)} d"

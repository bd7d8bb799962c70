"""Tells systemd how the server is: ready, alive, stopping (sd_notify's protocol). Above: `cli.startup`; below: nothing.

Nothing happens where NOTIFY_SOCKET is not set, or where nobody listens there.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress


def send(*lines: str) -> None:
    """Send one datagram of `KEY=value` lines."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        notifier.setblocking(False)
        target = "\0" + address[1:] if address[0] == "@" else address
        notifier.sendto("\n".join(lines).encode(), target)


def reloading() -> None:
    """Say that the configuration is being taken over anew; `reloaded` must follow."""
    send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=takes the configuration over")


def reloaded(is_applied: bool) -> None:
    """Say that this is over, and how it went."""
    how = "accepts requests" if is_applied else "accepts requests; the changed configuration was not taken over"
    send("READY=1", f"STATUS={how}")


def watchdog_period_s() -> float | None:
    """Return how often to say that we live (half of what systemd waits), in seconds; None if nobody wants it."""
    text = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not text.isdigit() or int(text) == 0 or meant != str(os.getpid()):
        return None
    return int(text) / 2e6


async def attend(answers: Callable[[], Awaitable[bool]]) -> None:
    """Say READY once the server answers, and from the start on that the supervisor's loop turns. Until cancelled."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    waiting = asyncio.create_task(_until_ready(answers))
    try:
        period_s = watchdog_period_s()
        while period_s is not None:
            send("WATCHDOG=1")
            await asyncio.sleep(period_s)
        await waiting
    finally:
        waiting.cancel()


async def _until_ready(answers: Callable[[], Awaitable[bool]]) -> None:
    while not await answers():  # which itself waits a while before it says no
        send("STATUS=waits for the gateway")
    send("READY=1", "STATUS=accepts requests")

"""Blocking work that must not hold up other workers' streams: a thread of its own, at lower priority.

Above: whoever loads. Below: the system's scheduler. Priorities belong to threads here, and one that was lowered cannot
be raised again without privileges; so the thread ends with its work. What it starts inherits its priority: pools of
threads that serve requests must be started elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOAD_NICENESS = 5
"""Somebody waits for a load: where cores are short it gets a quarter of one beside somebody's stream."""

IDLE_NICENESS = 15
"""Nobody waits for imports ahead of time."""


def load_niceness(num_devices: int) -> int:
    """Return how much lower a load's priority should be: a split model's load starts processes that will serve."""
    return LOAD_NICENESS if num_devices == 1 else 0


def lower_priority(niceness: int) -> None:
    """Lower the calling thread's priority, and that of the threads it will start."""
    with contextlib.suppress(OSError, AttributeError):  # Not everywhere; only politeness hangs on it.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


async def gently(work: Callable[[], T], niceness: int = LOAD_NICENESS) -> T:
    """Run blocking `work` in a low-priority thread; return or raise what it does. Cancelling does not stop it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(set_outcome: Callable[[], None]) -> None:
        if not outcome.done():
            set_outcome()

    def run() -> None:
        lower_priority(niceness)
        try:
            result = work()
        except BaseException as error:  # as `asyncio.to_thread` does
            failure = error
            told: Callable[[], None] = lambda: outcome.set_exception(failure)  # noqa: E731
        else:
            told = lambda: outcome.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(tell, told)

    threading.Thread(target=run, name="gentle", daemon=True).start()
    return await outcome

"""An asyncio event loop in virtual time: time moves only when it is told to, and then at once.

Above it: the world and the walk. Below it: asyncio's tasks and futures, which need little of a loop. No selector, no
threads, no signals: what a coroutine cannot do here, the scheduler must not do either.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MAX_CALLBACKS = 200_000
"""More than this without time passing: something runs in circles."""


class Livelock(Exception):
    """Callbacks beget callbacks, and time stands still."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs callbacks in the order in which they became ready; among timers of one moment, in the order they were set.

    Attributes:
        unhandled: what tasks raised, or futures held, that nobody looked at.
    """

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self.unhandled: list[dict[str, Any]] = []

    # ------------------------------------------------------------ what asyncio asks of a loop

    def time(self) -> float:
        return self._now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Any = None
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.unhandled.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    # ------------------------------------------------------------ moving it

    def settle(self) -> None:
        """Run everything that can run without time passing.

        Raises:
            Livelock: it does not end.
        """
        ready, num_run = self._ready, 0
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            while ready:
                handle = ready.popleft()
                if not handle._cancelled:  # type: ignore[attr-defined]
                    handle._run()
                num_run += 1
                if num_run > MAX_CALLBACKS:
                    raise Livelock(f"{num_run} callbacks without time passing; next: {handle!r}")
        finally:
            asyncio._set_running_loop(before)

    def advance(self, seconds: float) -> None:
        """Let time pass: every timer fires at its moment, and what follows from it is done before the next."""
        end_s = self._now_s + seconds
        self.settle()
        while self._timers and self._timers[0][0] <= end_s:
            when, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self._now_s = max(self._now_s, when)
                self._ready.append(handle)
                self.settle()
        self._now_s = end_s

    def jump(self, seconds: float) -> None:
        """Let time pass while nothing runs, as when the process was stopped. Timers are late afterwards."""
        self._now_s += seconds

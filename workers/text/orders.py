"""What the asyncio side wants done by the engine's thread, between two steps. Above: both sides of the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Orders:
    """A queue of calls into the engine's thread. Create it in the asyncio loop.

    Args:
        ring: wakes the engine's thread.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._waiting: deque[Callable[[], None]] = deque()

    async def between_steps(self, order: Callable[[], T]) -> T:
        """Have `order` called by the engine's thread; return or raise what it does."""
        done: asyncio.Future[T] = self._loop.create_future()

        def tell(set_outcome: Callable[[], None]) -> None:
            if not done.done():
                set_outcome()

        def obey() -> None:
            try:
                result = order()
            except Exception as error:
                self._loop.call_soon_threadsafe(tell, partial(done.set_exception, error))
            else:
                self._loop.call_soon_threadsafe(tell, partial(done.set_result, result))

        self._waiting.append(obey)
        self._ring()
        return await done

    def obey(self) -> None:
        """Do all that was ordered. For the engine's thread."""
        while self._waiting:
            self._waiting.popleft()()

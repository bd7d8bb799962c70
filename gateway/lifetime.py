"""How long a request may live: until its client leaves, its key ends, or a stopping server's patience does.

Above: routes, `sse`; below: `keys.caller`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hostler.errors import HostlerError, InvalidApiKey, Unavailable
from starlette.types import Receive

from gateway.errors import ClientGone
from gateway.keys.caller import current_caller

T = TypeVar("T")


class Lifetime:
    """The end that all running requests of this process share. For the event loop's thread only."""

    def __init__(self) -> None:
        # Another process accepts in this one's place, so that this one has as long as a reload grants.
        self.has_successor = False
        self._expired = False
        self._stopping = False
        self._running: set[asyncio.Task[Any]] = set()
        self._spectators: set[asyncio.Task[Any]] = set()
        self._of_key: dict[str, set[asyncio.Task[Any]]] = {}
        self._ended_keys: set[str] = set()

    @property
    def num_running(self) -> int:
        """Requests between their first and last byte, or waiting for it."""
        return len(self._running)

    def stop(self) -> None:
        """End those who only watch, and each later one at once: they must not hold up a server that wants to stop."""
        self._stopping = True
        for task in self._spectators:
            task.cancel()

    def expire(self) -> None:
        """End every running request, and each later one at once, with an error that says why."""
        self._expired = True
        for task in self._running:
            task.cancel()

    def end_key(self, key_id: str) -> None:
        """End every running request of a key, and each later one, with an error that says why."""
        self._ended_keys.add(key_id)
        for task in self._of_key.get(key_id, ()):
            task.cancel()

    def why_ended(self) -> HostlerError:
        """Return what the running task's caller is told when its request was cancelled from here."""
        caller = current_caller()
        if caller is not None and caller.key_id in self._ended_keys:
            return InvalidApiKey("The API key was revoked or has expired while the request ran.")
        return Unavailable("The server is stopping. Try again in a moment.")

    def _note_key(self, task: asyncio.Task[Any]) -> None:
        caller = current_caller()
        if caller is None or not caller.key_id:
            return
        key_id = caller.key_id
        tasks = self._of_key.setdefault(key_id, set())
        tasks.add(task)
        if key_id in self._ended_keys:
            task.cancel()

        def forget(task: asyncio.Task[Any]) -> None:
            tasks.discard(task)
            if not tasks and self._of_key.get(key_id) is tasks:
                del self._of_key[key_id]

        task.add_done_callback(forget)

    def own(self, task: asyncio.Task[Any]) -> None:
        """End a task that no client waits for, too, when the time is over."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        self._note_key(task)
        if self._expired:
            task.cancel()

    async def until_gone(self, receive: Receive, work: Coroutine[Any, Any, T], *, is_spectator: bool = False) -> T:
        """Run `work` to its end, or cancel it, and wait until it has cleaned up.

        Args:
            receive: the ASGI channel; the body must have been read.
            work: what the client waits for.
            is_spectator: it watches for as long as it may, so it ends at `stop` and not only at `expire`.

        Raises:
            ClientGone: the client left first.
            InvalidApiKey: the caller's key has ended.
            Unavailable: the server is stopping.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.create_task(_disconnected(receive))
        self._running.add(task)
        self._note_key(task)
        if is_spectator:
            self._spectators.add(task)
        if self._expired or (is_spectator and self._stopping):
            task.cancel()
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            left = not task.done()
        finally:
            self._running.discard(task)
            self._spectators.discard(task)
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        if left:
            if not task.cancelled():
                task.exception()  # nobody is left to hear of it
            raise ClientGone
        if task.cancelled():
            raise self.why_ended()
        return task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""One MCP server: started when it is needed, kept, started again when it has ended. Above: `servers`; below: `live`.

A failed start is not repeated at once: callers hear why, and when the next try is due. What a server first listed is
pinned, across its restarts, for the life of this process.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gateway.mcp.live import Limits, Live, Open
from gateway.mcp.remote import Listing, McpFault, RemoteTool, changed, pinned
from gateway.mcp.results import Result

log = logging.getLogger(__name__)

LIST_AGAIN_S = 60.0
"""How old a listing may be."""
_FIRST_BACK_OFF_S, _LAST_BACK_OFF_S = 1.0, 60.0
_NO_SUCH_TOOL = -32602


class Connection:
    """One server. For the event loop's thread only.

    Args:
        name: for logs and messages.
        transports: what to try, in this order.
        open_transport: opens one.
        allowed: whether a tool may be called at all.
        clock: tells seconds.
    """

    def __init__(
        self,
        name: str,
        transports: tuple[str, ...],
        open_transport: Open,
        limits: Limits,
        allowed: Callable[[str], bool] = lambda name: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._transports = transports
        self._open = open_transport
        self._limits = limits
        self._allowed = allowed
        self._clock = clock
        self._live: Live | None = None
        self._opening: Live | None = None
        self._listing = Listing()
        self._listed_at = 0.0
        self._starting = asyncio.Lock()
        self._pins: dict[str, str] = {}
        self._num_failures = 0
        self._not_before = 0.0
        self._last_fault: McpFault | None = None
        self.num_running = 0
        self.last_used = clock()

    @property
    def state(self) -> dict[str, Any]:
        """What who administers may see."""
        live = self._live
        return {
            "state": "connected" if live is not None else "failed" if self._last_fault is not None else "not started",
            "transport": live.transport if live is not None else None,
            "num_running": self.num_running,
            "error": None if live is not None or self._last_fault is None else self._last_fault.message,
        }

    async def list_tools(self) -> Listing:
        """Return what it offers, at most `LIST_AGAIN_S` old.

        Raises:
            McpFault: it cannot be started, or does not answer.
        """
        with self._used():
            live = await self._connected()
            if live.has_news or self._clock() - self._listed_at > LIST_AGAIN_S:
                self._take(await live.list_tools())
            return self._listing

    async def list_anew(self) -> Listing:
        """Return what it offers now, whatever is known, and though a start has just failed.

        Raises:
            McpFault: as `list_tools` says.
        """
        self._not_before = 0.0
        was_connected = self._live is not None
        live = await self._connected()
        live.has_news = live.has_news or was_connected
        return await self.list_tools()

    async def call(self, tool: RemoteTool, arguments: dict[str, Any]) -> Result:
        """Call a tool and return what it says.

        Args:
            tool: as whoever wants the call knows it: if it is another by now, it is not called.

        Raises:
            McpFault: it cannot be called, does not answer in time, or says too much.
        """
        with self._used():
            for is_last in (False, True):
                live = await self._connected()
                listing = await self.list_tools() if live.has_news else self._listing
                now = listing.find(tool.name)
                if now is None or now.digest != tool.digest:
                    is_gone = now is None and changed(tool.name) not in listing.notes
                    message = f"The MCP server has no tool {tool.name!r}." if is_gone else changed(tool.name)
                    raise McpFault(message, code=_NO_SUCH_TOOL)
                try:
                    return await live.call(tool.name, arguments)
                except McpFault as fault:
                    # The server has forgotten this session, so it has done nothing: greet it again.
                    if fault.code != 404 or is_last:
                        raise
                    await self._drop(live, fault)
        raise AssertionError("the last try returns or raises")

    async def close(self) -> None:
        """End the connection, and the server if it is a child of ours."""
        if (live := self._live or self._opening) is not None:
            await self._drop(live, McpFault("The server is stopping."))

    @contextmanager
    def _used(self) -> Iterator[None]:
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self.last_used = self._clock()

    async def _connected(self) -> Live:
        async with self._starting:
            if self._live is not None:
                return self._live
            if (left_s := self._not_before - self._clock()) > 0 and self._last_fault is not None:
                raise McpFault(f"{self._last_fault.message} The next try is due in {left_s:.0f} s.")
            began = self._clock()
            for transport in self._transports:
                live = self._opening = Live(transport, self._limits)
                try:
                    self._take(await live.open(self._open))
                except McpFault as fault:
                    self._last_fault = fault
                    if fault.code not in (404, 405):
                        break
                    continue
                self._opening = None
                self._live, self._last_fault, self._num_failures = live, None, 0
                live.ended.add_done_callback(functools.partial(self._forget, live))
                took_ms = round((self._clock() - began) * 1000)
                log.info("MCP server connected", extra={"server": self.name, "took_ms": took_ms})
                return live
            assert self._last_fault is not None
            self._back_off()
            raise self._last_fault

    def _back_off(self) -> None:
        back_off_s = min(_LAST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2**self._num_failures)
        self._num_failures = min(self._num_failures + 1, 10)
        self._not_before = self._clock() + back_off_s
        assert self._last_fault is not None
        log.warning("MCP server failed", extra={"server": self.name, "kind": self._last_fault.kind})

    def _forget(self, live: Live, ended: asyncio.Future[McpFault]) -> None:
        if self._live is live:
            self._live = None
            if not live.is_left:
                self._last_fault = ended.result()
                self._back_off()

    def _take(self, tools: Iterable[RemoteTool]) -> None:
        """Take what the server lists: of what it may be asked for, what is as it was first listed."""
        self._listing, self._pins = pinned(self._pins, (tool for tool in tools if self._allowed(tool.name)))
        self._listed_at = self._clock()

    async def _drop(self, live: Live, fault: McpFault) -> None:
        if self._live is live:
            self._live = None
        await live.leave(fault)

"""One MCP server: started when it is needed, kept, started again when it has ended. Above: `servers`; below: `mcp`.

A connection is entered and left by one task, its owner, because that is what the cancel scopes of the `mcp` package
demand; calls come from any task. A failed start is not repeated at once: callers hear why, and when the next try is
due. What a server first listed is pinned, across its restarts, for the life of this process.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mcp_types
from mcp import Client
from mcp.client._transport import TransportStreams
from mcp.shared.exceptions import MCPError
from mcp_types import Implementation

from gateway.mcp.remote import Listing, McpFault, RemoteTool, changed, pinned
from gateway.mcp.results import Result, read_result
from gateway.mcp.wire import ByteMeter

log = logging.getLogger(__name__)

LIST_AGAIN_S = 60.0
"""How old a listing may be."""
_FIRST_BACK_OFF_S, _LAST_BACK_OFF_S = 1.0, 60.0
_GIVE_UP_S = 1.0
_MAX_PAGES = 64

Status = Callable[[], int]
"""Tells the HTTP status with which the latest message was refused; 0: none was."""
Open = Callable[[ByteMeter, str], AbstractAsyncContextManager[tuple[TransportStreams, Status]]]
"""From a meter and a transport's name to its streams."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server may take.

    Attributes:
        start_s: for a start and its first listing.
        call_s: for one call.
        max_bytes: that it may send for one call.
    """

    start_s: float
    call_s: float
    max_bytes: int


@dataclass(slots=True, eq=False)
class _Live:
    """A connection that stands. `ended` is done when it no longer does, with the reason."""

    client: Client
    meter: ByteMeter
    status: Status
    ended: asyncio.Future[McpFault]
    transport: str
    is_left: bool = False
    listing: Listing | None = None
    listed_at: float = 0.0


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
        self._live: _Live | None = None
        self._owner: asyncio.Task[None] | None = None
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
            if live.listing is None or self._clock() - live.listed_at > LIST_AGAIN_S:
                await self._run(live, self._list(live), self._limits.start_s, "did not list its tools")
            assert live.listing is not None
            return live.listing

    async def list_anew(self) -> Listing:
        """Return what it offers now, whatever is known, and though a start has just failed.

        Raises:
            McpFault: as `list_tools` says.
        """
        self._not_before = 0.0
        was_connected = self._live is not None
        live = await self._connected()
        if was_connected:
            live.listing = None
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
                listing = live.listing
                if listing is None:
                    listing = await self.list_tools()
                now = listing.find(tool.name)
                if now is None or now.digest != tool.digest:
                    is_gone = now is None and changed(tool.name) not in listing.notes
                    message = f"The MCP server has no tool {tool.name!r}." if is_gone else changed(tool.name)
                    raise McpFault(message, code=mcp_types.INVALID_PARAMS)
                call = live.client.call_tool(tool.name, arguments, read_timeout_seconds=self._limits.call_s)
                try:
                    result = await self._run(live, call, self._limits.call_s, "did not answer the call")
                except McpFault as fault:
                    # The server has forgotten this session, so it has done nothing: greet it again.
                    if fault.code != 404 or is_last:
                        raise
                    await self._drop(live, fault)
                    continue
                return read_result(result)
        raise AssertionError("the last try returns or raises")

    async def close(self) -> None:
        """End the connection, and the server if it is a child of ours."""
        if self._live is not None:
            await self._drop(self._live, McpFault("The server is stopping."))
        elif self._owner is not None:
            self._owner.cancel()
            await asyncio.wait((self._owner,))

    @contextmanager
    def _used(self) -> Iterator[None]:
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self.last_used = self._clock()

    async def _connected(self) -> _Live:
        async with self._starting:
            if self._live is not None:
                return self._live
            if (left_s := self._not_before - self._clock()) > 0 and self._last_fault is not None:
                raise McpFault(f"{self._last_fault.message} The next try is due in {left_s:.0f} s.")
            began = self._clock()
            for transport in self._transports:
                try:
                    live = await self._start(transport)
                except McpFault as fault:
                    self._last_fault = fault
                    if fault.code not in (404, 405):
                        break
                    continue
                self._live, self._last_fault = live, None
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

    def _forget(self, live: _Live, ended: asyncio.Future[McpFault]) -> None:
        if self._live is live:
            self._live = None
            if not live.is_left:
                self._last_fault = ended.result()
                self._back_off()

    async def _start(self, transport: str) -> _Live:
        """Return a connection that stands and has listed its tools.

        Raises:
            McpFault: it does not come to that in time.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[McpFault] = loop.create_future()
        ready: asyncio.Future[_Live] = loop.create_future()

        def on_fault(fault: McpFault) -> None:
            if not ended.done():
                ended.set_result(fault)

        self._owner = owner = asyncio.create_task(self._own(transport, ready, ended, on_fault))
        try:
            await asyncio.wait((ready, ended, owner), timeout=self._limits.start_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            owner.cancel()
            raise
        if ready.done() and not ended.done():
            return ready.result()
        if not ended.done():
            ended.set_result(McpFault(f"The MCP server did not start within {self._limits.start_s:g} s."))
        owner.cancel()
        await asyncio.wait((owner,))
        raise ended.result()

    async def _own(
        self,
        transport: str,
        ready: asyncio.Future[_Live],
        ended: asyncio.Future[McpFault],
        on_fault: Callable[[McpFault], None],
    ) -> None:
        """Enter a connection, keep it until it ends or is to end, and leave it: all in this task."""
        status: Status = lambda: 0  # noqa: E731
        live: _Live | None = None

        async def heard(message: object) -> None:
            if live is not None and isinstance(message, mcp_types.ToolListChangedNotification):
                live.listing = None

        try:
            meter = ByteMeter(self._limits.max_bytes, on_fault)
            async with self._open(meter, transport) as (streams, status):
                client = Client(
                    _entered(streams),
                    mode="auto",
                    cache=None,
                    message_handler=heard,
                    client_info=Implementation(name="hostler", version="1"),
                    read_timeout_seconds=self._limits.start_s,
                )
                meter.begin()
                async with client:
                    live = _Live(client, meter, status, ended, transport)
                    await self._list(live)
                    meter.end()
                    ready.set_result(live)
                    self._num_failures = 0
                    await asyncio.wait((ended,))
        except McpFault as fault:
            on_fault(fault)
        except MCPError as error:
            on_fault(_fault_of(error, status()))
        except Exception as error:
            # The package wraps whatever its tasks raise in groups; the meter has heard the reason first.
            log.debug("MCP connection broke", exc_info=error, extra={"server": self.name})
            on_fault(_broken(status()))
        finally:
            on_fault(McpFault("The connection to the MCP server was closed."))

    async def _list(self, live: _Live) -> None:
        tools: list[RemoteTool] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await live.client.list_tools(cursor=cursor)
            tools.extend(_tool(each) for each in page.tools)
            cursor = page.next_cursor
            if not cursor:
                break
        listing, self._pins = pinned(self._pins, (tool for tool in tools if self._allowed(tool.name)))
        live.listing, live.listed_at = listing, self._clock()

    async def _run(self, live: _Live, work: Any, within_s: float, what: str) -> Any:
        """Run one exchange, bounded in time and bytes; its connection's end is its end.

        Raises:
            McpFault: it failed.
        """
        live.meter.begin()
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, live.ended), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                return task.result()
            if live.ended.done():
                raise live.ended.result()
            raise McpFault(f"The MCP server {what} within {within_s:g} s.")
        except MCPError as error:
            if live.ended.done():
                raise live.ended.result() from None
            if error.code == mcp_types.REQUEST_TIMEOUT:
                raise McpFault(f"The MCP server {what} within {within_s:g} s.") from None
            raise _fault_of(error, live.status()) from None
        except McpFault:
            raise
        except Exception as error:
            log.debug("MCP exchange broke", exc_info=error, extra={"server": self.name})
            raise McpFault("The MCP server's answer cannot be read.") from None
        finally:
            live.meter.end()
            if not task.done():
                # The package tells the server; one that reads nothing must not hold us up.
                task.cancel()
                await asyncio.wait((task,), timeout=_GIVE_UP_S)
                if not task.done():
                    live.meter.fail(McpFault("The MCP server reads nothing any more."))
            elif not task.cancelled():
                task.exception()

    async def _drop(self, live: _Live, fault: McpFault) -> None:
        live.is_left = True
        if not live.ended.done():
            live.ended.set_result(fault)
        if self._live is live:
            self._live = None
        if self._owner is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.wait((self._owner,))


@asynccontextmanager
async def _entered(streams: TransportStreams) -> AsyncIterator[TransportStreams]:
    yield streams


def _tool(tool: mcp_types.Tool) -> RemoteTool:
    annotations = tool.annotations.model_dump(by_alias=True, exclude_none=True) if tool.annotations else {}
    return RemoteTool(tool.name, tool.description or "", dict(tool.input_schema), annotations)


def _broken(status: int) -> McpFault:
    if status >= 400:
        return McpFault(f"The MCP server answers HTTP {status}.", kind="http", code=status)
    return McpFault("The connection to the MCP server broke.")


def _fault_of(error: MCPError, status: int) -> McpFault:
    if status >= 400:
        return _broken(status)
    return McpFault(f"The MCP server answers: {error.message[:1000]}", code=error.code)

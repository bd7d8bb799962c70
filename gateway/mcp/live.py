"""One connection to an MCP server, from its opening to its end. Above: `connection`; below: the `mcp` package.

It is entered and left by one task, its owner, because that is what the cancel scopes of the `mcp` package demand; calls
come from any task. Whatever ends it is told once, in `ended`, and ends every exchange that runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import hostler
import mcp_types
from mcp import Client
from mcp.client._transport import TransportStreams
from mcp.shared.exceptions import MCPError
from mcp_types import Implementation

from gateway.mcp.remote import McpFault, RemoteTool
from gateway.mcp.results import Result, read_result
from gateway.mcp.wire import ByteMeter

log = logging.getLogger(__name__)

_GIVE_UP_S = 5.0
"""How long telling a server of a cancelled call may take."""
_MAX_PAGES = 64

T = TypeVar("T")
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


class Live:
    """A connection. For the event loop's thread only.

    Attributes:
        transport: its name.
        ended: done when it no longer stands, with the reason.
        is_left: it was ended by us.
        has_news: the server says that its tools have changed.
    """

    def __init__(self, transport: str, limits: Limits) -> None:
        self.transport = transport
        self.ended: asyncio.Future[McpFault] = asyncio.get_running_loop().create_future()
        self.is_left = False
        self.has_news = False
        self._limits = limits
        self._meter = ByteMeter(limits.max_bytes, self._end)
        self._status: Status = lambda: 0
        self._client: Client | None = None
        self._owner: asyncio.Task[None] | None = None
        self._given_up: set[asyncio.Task[Any]] = set()

    async def open(self, open_transport: Open) -> list[RemoteTool]:
        """Connect, and return the tools that the server lists first. Cancelling it ends the connection.

        Raises:
            McpFault: it does not come to that in time.
        """
        ready: asyncio.Future[list[RemoteTool]] = asyncio.get_running_loop().create_future()
        self._owner = owner = asyncio.create_task(self._own(open_transport, ready))
        try:
            await asyncio.wait((ready, owner), timeout=self._limits.start_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            owner.cancel()
            raise
        if ready.done() and not self.ended.done():
            return ready.result()
        self._end(McpFault(f"The MCP server did not start within {self._limits.start_s:g} s."))
        owner.cancel()
        await asyncio.wait((owner,))
        raise self.ended.result()

    async def list_tools(self) -> list[RemoteTool]:
        """Return what the server lists now.

        Raises:
            McpFault: it does not answer.
        """
        self.has_news = False
        assert self._client is not None
        return await self._exchange(_listed(self._client), self._limits.start_s, "did not list its tools")

    async def call(self, name: str, arguments: dict[str, Any]) -> Result:
        """Call a tool.

        Raises:
            McpFault: it does not answer, or not in time, or says too much.
        """
        assert self._client is not None
        call = self._client.call_tool(name, arguments, read_timeout_seconds=self._limits.call_s)
        return read_result(await self._exchange(call, self._limits.call_s, "did not answer the call"))

    async def leave(self, fault: McpFault) -> None:
        """End the connection, and wait until all of it has gone."""
        self.is_left = True
        self._end(fault)
        if self._owner is not None:
            if self._client is None:
                self._owner.cancel()
            await asyncio.wait((self._owner,))

    def _end(self, fault: McpFault) -> None:
        if not self.ended.done():
            self.ended.set_result(fault)

    async def _own(self, open_transport: Open, ready: asyncio.Future[list[RemoteTool]]) -> None:
        """Enter the connection, keep it until it ends or is to end, and leave it: all in this task."""
        try:
            async with open_transport(self._meter, self.transport) as (streams, self._status):
                client = Client(
                    _entered(streams),
                    mode="auto",
                    cache=None,
                    message_handler=self._heard,
                    client_info=Implementation(name="hostler", version=hostler.__version__),
                    read_timeout_seconds=self._limits.start_s,
                )
                self._meter.begin()
                async with client:
                    tools = await _listed(client)
                    self._meter.end()
                    self._client = client
                    ready.set_result(tools)
                    await asyncio.wait((self.ended,))
        except McpFault as fault:
            self._end(fault)
        except MCPError as error:
            self._end(_fault_of(error, self._status()))
        except Exception as error:
            # The package wraps whatever its tasks raise in groups; the meter has heard the reason first.
            log.debug("MCP connection broke", extra={"error": type(error).__name__})
            self._end(_broken(self._status()))
        finally:
            self._end(McpFault("The connection to the MCP server was closed."))

    async def _heard(self, message: object) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            self.has_news = True

    async def _exchange(self, work: Coroutine[Any, Any, T], within_s: float, what: str) -> T:
        """Run one exchange, bounded in time and bytes; the connection's end is its end.

        Raises:
            McpFault: it failed.
        """
        self._meter.begin()
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self.ended), timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                return task.result()
            if self.ended.done():
                raise self.ended.result()
            raise McpFault(f"The MCP server {what} within {within_s:g} s.")
        except MCPError as error:
            if self.ended.done():
                raise self.ended.result() from None
            if error.code == mcp_types.REQUEST_TIMEOUT:
                raise McpFault(f"The MCP server {what} within {within_s:g} s.") from None
            raise _fault_of(error, self._status()) from None
        except McpFault:
            raise
        except Exception as error:
            log.debug("MCP exchange broke", extra={"error": type(error).__name__})
            raise McpFault("The MCP server's answer cannot be read.") from None
        finally:
            self._meter.end()
            self._give_up(task)

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        """Cancel an exchange that nobody waits for any more. The package tells the server, which may read nothing."""
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not task.done():
            task.cancel()
            self._given_up.add(task)
            task.add_done_callback(self._given_up.discard)
            asyncio.get_running_loop().call_later(_GIVE_UP_S, self._check_given_up, task)

    def _check_given_up(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._meter.fail(McpFault("The MCP server reads nothing any more."))


async def _listed(client: Client) -> list[RemoteTool]:
    tools: list[RemoteTool] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools.extend(_tool(each) for each in page.tools)
        cursor = page.next_cursor
        if not cursor:
            break
    return tools


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

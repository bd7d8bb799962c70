"""Calls that a model made of MCP servers' tools: carried out side by side, each to an outcome, never to an exception.

Above: `responses.remote_turns`, `routes.chat`; below: `connection`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.body import parse_json
from gateway.mcp.remote import Listing, McpFault, RemoteTool

if TYPE_CHECKING:
    from gateway.mcp.connection import Connection

log = logging.getLogger(__name__)

MAX_TURNS = 32
"""How often one request may go back to the model with results; in the last turn it has no such tools any more."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that is to be made.

    Attributes:
        arguments_json: as the model wrote them.
    """

    connection: Connection
    tool: RemoteTool
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended.

    Attributes:
        text: what the tool said; with a fault of kind "tool" its own words of failure.
        fault: None if it went well.
    """

    text: str = ""
    fault: McpFault | None = None

    @property
    def for_model(self) -> str:
        """What the model reads."""
        if self.fault is None:
            return self.text
        return f"Error: {self.text or self.fault.message}"


async def listed(connection: Connection) -> Listing:
    """Return what a server offers.

    Raises:
        McpFault: whatever went wrong.
    """
    try:
        return await connection.list_tools()
    except McpFault:
        raise
    except Exception as error:
        log.error("unexpected exception in an MCP listing", exc_info=error)
        raise McpFault("The listing failed for a reason of our own; the server's log has the details.") from None


async def make(call: Call) -> Outcome:
    """Make one call."""
    try:
        arguments = parse_json(call.arguments_json.encode() or b"{}")
    except Exception:
        arguments = None
    if not isinstance(arguments, dict):
        return Outcome(fault=McpFault("The model wrote arguments that are not a JSON object.", code=-32602))
    try:
        result = await call.connection.call(call.tool, arguments)
    except McpFault as fault:
        return Outcome(fault=fault)
    except Exception as error:
        log.error("unexpected exception in an MCP call", exc_info=error)
        return Outcome(fault=McpFault("The call failed for a reason of our own; the server's log has the details."))
    if result.is_error:
        return Outcome(result.text, McpFault("The tool failed.", kind="tool"))
    return Outcome(result.text)


async def make_all(calls: Sequence[Call], *, together: bool) -> AsyncGenerator[Outcome, None]:
    """Yield the outcomes in the calls' order. Closing the generator cancels what still runs.

    Args:
        together: side by side instead of one after the other.
    """
    if not together:
        for call in calls:
            yield await make(call)
        return
    tasks = [asyncio.create_task(make(call)) for call in calls]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

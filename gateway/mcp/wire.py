"""What holds on the wire to an MCP server, whatever the transport: how much it may send. Above: `stdio`, `http`."""

from __future__ import annotations

from collections.abc import Callable

from gateway.mcp.remote import McpFault

IDLE_BYTES = 1 << 20
"""What a server may send while nobody has asked it anything."""


class ByteMeter:
    """Counts a server's bytes. For the event loop's thread only.

    Args:
        max_bytes: for each call that runs; all that run share their sum.
        on_fault: told once, the moment the server has sent too much or the transport has failed for good.
    """

    def __init__(self, max_bytes: int, on_fault: Callable[[McpFault], None]) -> None:
        self.max_bytes = max_bytes
        self._on_fault = on_fault
        self._num_calls = 0
        self._num_bytes = 0
        self._fault: McpFault | None = None

    def begin(self) -> None:
        """A call begins."""
        if not self._num_calls:
            self._num_bytes = 0
        self._num_calls += 1

    def end(self) -> None:
        """A call has ended."""
        self._num_calls -= 1
        if not self._num_calls:
            self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Note down received bytes.

        Raises:
            McpFault: they are too many; this connection is over.
        """
        if self._fault is not None:
            raise self._fault
        self._num_bytes += num_bytes
        allowed = self.max_bytes * self._num_calls if self._num_calls else IDLE_BYTES
        if self._num_bytes > allowed:
            raise self.fail(McpFault(f"The MCP server sent more than {self.max_bytes} bytes for one call."))

    def fail(self, fault: McpFault) -> McpFault:
        """Say that the connection is over; the first reason stays."""
        if self._fault is None:
            self._fault = fault
            self._on_fault(fault)
        return self._fault

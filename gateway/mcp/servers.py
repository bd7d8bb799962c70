"""All MCP servers that this process may speak to: those of the configuration, and those that requests name by address.

Above: `services`, `responses`, `routes`; below: `connection`, and (loaded with the first server) `stdio` and `http`.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
import importlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hostler.config import HostlerConfig, McpServerConfig
from hostler.errors import InvalidRequest, Overloaded, PermissionDenied

from gateway.fields import show
from gateway.mcp.remote import McpFault

if TYPE_CHECKING:
    import httpcore2

    from gateway.fetch import Resolve
    from gateway.mcp.connection import Connection
    from gateway.mcp.live import Open
    from gateway.mcp.stdio import Tail

MAX_BY_ADDRESS = 64
"""Servers that requests named, at once."""
IDLE_S = 300.0
"""How long such a one is kept after its last use."""
_UNUSED: dict[str, Any] = {"state": "not started", "transport": None, "num_running": 0, "error": None}
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_USUAL = McpServerConfig(url="http://example.invalid/")


class McpServers:
    """One for each process; for the event loop's thread only.

    Args:
        config: names the servers, and says whether requests may name others.
        resolve: looks names up for the latter; None: the system's resolver.
        connect: opens connections for the latter, by address; None: TCP.
        clock: tells seconds.
    """

    def __init__(
        self,
        config: HostlerConfig,
        *,
        resolve: Resolve | None = None,
        connect: httpcore2.AsyncNetworkBackend | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._servers = config.mcp_servers
        self._takes_addresses = config.mcp_urls
        self.resolve = resolve
        self.connect = connect
        self._clock = clock
        self._configured: dict[str, Connection] = {}
        self._tails: dict[str, Tail] = {}
        self._by_address: dict[tuple[str, str, str], Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._is_loaded = False

    async def load(self) -> None:
        """Import what connections need, off the loop; before the first `configured` or `at_address`."""
        if self._is_loaded:
            return
        for name in ("mcp", "httpx2", "httpcore2"):
            # They log addresses, headers and what servers say. What matters is logged here.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # Were the cycle collector to run in that thread, it might finalize objects of gRPC there, which wait for
        # threads of gRPC's; one such wait seemed to last for ever, with the lock of all logging held.
        enabled = gc.isenabled()
        gc.disable()
        try:
            await asyncio.to_thread(_import)
        finally:
            if enabled:
                gc.enable()
        self._is_loaded = True

    def without_addresses(self) -> McpServers:
        """Return these servers for callers who may not name others by address; connections are shared."""
        view = copy.copy(self)
        view._takes_addresses = False
        return view

    @property
    def names(self) -> tuple[str, ...]:
        """The configured servers."""
        return tuple(self._servers)

    @property
    def for_chat(self) -> tuple[str, ...]:
        """Those whose tools every chat completion gets."""
        return tuple(name for name, server in self._servers.items() if server.chat)

    def configured(self, name: str, param: str) -> Connection:
        """Return a server of the configuration.

        Raises:
            InvalidRequest: there is none of that name; it names `param`.
        """
        config = self._servers.get(name)
        if config is None:
            known = ", ".join(f"'{each}'" for each in self._servers) or "none"
            raise InvalidRequest(f"No MCP server {show(name)} is configured here (known: {known}).", param=param)
        if name not in self._configured:
            self._configured[name] = self._connection(name, config, {}, is_trusted=True)
        return self._configured[name]

    def at_address(self, url: str, headers: Mapping[str, str], owner: str, param: str) -> Connection:
        """Return the server at an address that a request gave; each caller has a connection of its own.

        Args:
            headers: of the request, for that server.
            owner: whose request it is.

        Raises:
            PermissionDenied: requests may not name addresses here.
            InvalidRequest: it is no address that may be called.
            Overloaded: too many are in use.
        """
        known = next((name for name, server in self._servers.items() if server.url and server.url == url), None)
        if known is not None and not headers:
            return self.configured(known, param)
        if known is None:
            self._check_address(url, param)
        digest = hashlib.sha256(repr(sorted(headers.items())).encode()).hexdigest()
        key = (owner, url, digest)
        self._sweep()
        connection = self._by_address.pop(key, None)
        if connection is None:
            if len(self._by_address) >= MAX_BY_ADDRESS:
                idle = next((each for each, kept in self._by_address.items() if not kept.num_running), None)
                if idle is None:
                    raise Overloaded("Too many MCP servers are in use at once. Try again later.")
                self._close(self._by_address.pop(idle))
            config = self._servers[known] if known is not None else _USUAL.model_copy(update={"url": url})
            connection = self._connection(known or "(by address)", config, headers, is_trusted=known is not None)
        # The one that was used last stands last.
        self._by_address[key] = connection
        return connection

    def _check_address(self, url: str, param: str) -> None:
        if not self._takes_addresses:
            raise PermissionDenied(
                "This server calls only the MCP servers of its configuration. Give 'server_label' one of their names "
                "and leave 'server_url' out, or have 'mcp_urls' set.",
                param=param,
            )
        from gateway.fetch import checked_url
        from gateway.links import FetchRefused

        try:
            checked_url(url, None)
        except FetchRefused as refused:
            raise InvalidRequest(f"'{param}' is refused: {refused}.", param=param) from None

    def state(self) -> list[dict[str, Any]]:
        """Return the configured servers as who administers may see them: no headers, no environment."""
        return [
            {
                "name": name,
                "kind": "command" if config.command else "url",
                "target": " ".join(config.command) if config.command else config.url.partition("?")[0],
                "tools": None if config.tools is None else list(config.tools),
                "chat": config.chat,
                **(self._configured[name].state if name in self._configured else _UNUSED),
            }
            for name, config in self._servers.items()
        ]

    def last_words(self, name: str) -> str:
        """Return the last that a configured command wrote to its standard error."""
        return self._tails[name].text if name in self._tails else ""

    async def close(self) -> None:
        """End all connections."""
        for connection in (*self._configured.values(), *self._by_address.values()):
            self._close(connection)
        if self._closing:
            await asyncio.wait(self._closing)

    def _sweep(self) -> None:
        oldest = self._clock() - IDLE_S
        for key, connection in list(self._by_address.items()):
            if not connection.num_running and connection.last_used < oldest:
                self._close(self._by_address.pop(key))

    def _close(self, connection: Connection) -> None:
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _connection(
        self, name: str, config: McpServerConfig, headers: Mapping[str, str], *, is_trusted: bool
    ) -> Connection:
        from gateway.mcp.connection import Connection
        from gateway.mcp.live import Limits

        limits = Limits(config.start_timeout, config.timeout, config.max_result)
        allowed = config.tools
        return Connection(
            name,
            _transports(config),
            self._command(name, config) if config.command else self._address(config, headers, is_trusted=is_trusted),
            limits,
            allowed=lambda tool: allowed is None or tool in allowed,
            clock=self._clock,
        )

    def _command(self, name: str, config: McpServerConfig) -> Open:
        from gateway.mcp.stdio import Tail, clean_environment, open_stdio
        from gateway.mcp.wire import ByteMeter

        tail = self._tails[name] = Tail()

        @asynccontextmanager
        async def open_command(meter: ByteMeter, transport: str) -> AsyncIterator[Any]:
            tail.clear()
            environment = clean_environment(os.environ, config.pass_env, filled_in(config.env, os.environ))
            async with open_stdio(config.command, environment, config.cwd, meter, tail) as streams:
                yield streams, lambda: 0

        return open_command

    def _address(self, config: McpServerConfig, headers: Mapping[str, str], *, is_trusted: bool) -> Open:
        from gateway.fetch import PublicBackend, resolve
        from gateway.mcp.http import open_http
        from gateway.mcp.wire import ByteMeter

        @asynccontextmanager
        async def open_address(meter: ByteMeter, transport: str) -> AsyncIterator[Any]:
            backend = None if is_trusted else PublicBackend(self.resolve or resolve, self.connect)
            sent = {**filled_in(config.headers, os.environ), **headers}
            async with open_http(config.url, sent, transport, meter, backend) as (streams, way):
                yield streams, lambda: way.refusal

        return open_address


def _import() -> None:
    for module in ("gateway.mcp.connection", "gateway.mcp.stdio", "gateway.mcp.http"):
        importlib.import_module(module)


def _transports(config: McpServerConfig) -> tuple[str, ...]:
    if config.command:
        return ("stdio",)
    if config.transport != "auto":
        return (config.transport,)
    path = config.url.partition("?")[0].rstrip("/")
    return ("sse",) if path.endswith("/sse") else ("http", "sse")


def filled_in(values: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return values with `${NAME}` replaced by that variable.

    Raises:
        McpFault: there is no such variable.
    """

    def variable(found: re.Match[str]) -> str:
        if (value := environ.get(found[1])) is None:
            raise McpFault(f"The configuration refers to ${{{found[1]}}}, and there is no such environment variable.")
        return value

    return {key: _VARIABLE.sub(variable, value) for key, value in values.items()}

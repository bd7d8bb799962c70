"""What the routes share: the frozen configuration and the long-lived objects. Above: routes; below: the edges.

One per process, built by `app.create_app`, kept in `app.state.services`, opened and closed by its lifespan.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from fastapi import Request
from hostler.config import HostlerConfig

from gateway.channels import WorkerChannels
from gateway.dispatch import GONE_TIMEOUT_S, Dispatcher
from gateway.lifetime import Lifetime
from gateway.linked_images import LinkedImages
from gateway.links import Fetch
from gateway.placement import PlacementClient
from gateway.routing import RouteTable
from gateway.sse import FIRST_COMMENT_S, PING_S, STALLED_READER_S


@dataclass(frozen=True, slots=True)
class Patience:
    """Every wait's deadline, in seconds."""

    # Longest wait for a model to come up.
    ensure_s: float = 600.0
    # Longest wait, while the server starts, for the first route table.
    first_table_s: float = 10.0
    # Longest wait, before a retry, for a lost worker to leave the table.
    gone_s: float = GONE_TIMEOUT_S
    ping_s: float = PING_S
    first_comment_s: float = FIRST_COMMENT_S
    stalled_reader_s: float = STALLED_READER_S


@dataclass(slots=True)
class Services:
    """The gateway's parts. `open` must run before the first request. `token` is the run's, for workers on TCP."""

    config: HostlerConfig
    placement_target: str
    token: str = ""
    patience: Patience = field(default_factory=Patience)
    lifetime: Lifetime = field(default_factory=Lifetime)
    table: RouteTable = field(init=False)
    channels: WorkerChannels = field(init=False)
    placement: PlacementClient = field(init=False)
    dispatcher: Dispatcher = field(init=False)
    linked_images: LinkedImages = field(init=False)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect, watch the routes, and in the end close everything."""
        self.table = RouteTable()
        self.channels = WorkerChannels(self.token)
        self.table.on_change = self.channels.keep_only
        self.placement = PlacementClient(self.placement_target)
        self.dispatcher = Dispatcher(
            self.table,
            self.channels,
            self.placement,
            ensure_timeout_s=self.patience.ensure_s,
            gone_timeout_s=self.patience.gone_s,
        )
        self.linked_images = LinkedImages(_fetch() if self.config.fetch_urls else None)
        watching = asyncio.create_task(self.placement.watch(self.table))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await self.channels.close()
            await self.placement.close()


def _fetch() -> Fetch:
    from gateway.fetch import Fetcher  # 200 ms and 6 MB of HTTP client

    return Fetcher()


def services_of(request: Request) -> Services:
    """Return the services of the application that serves `request`."""
    services: Services = request.app.state.services
    return services

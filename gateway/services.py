"""What the routes share: the frozen configuration and the long-lived objects. Above: routes; below: the edges.

One per process, built by `app.create_app`, kept in `app.state.services`, opened and closed by its lifespan.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from hostler.config import HostlerConfig, ModelConfig
from hostler.errors import HostlerError

from gateway.channels import WorkerChannels
from gateway.dispatch import GONE_TIMEOUT_S, Dispatcher
from gateway.doors import request_id_of
from gateway.keys.limits import KeyLimits
from gateway.keys.ring import KeyRing
from gateway.lifetime import Lifetime
from gateway.linked_images import LinkedImages
from gateway.links import Fetch
from gateway.mcp.servers import McpServers
from gateway.metrics import Meter
from gateway.placement import PlacementClient
from gateway.responses.answer import Answering
from gateway.responses.background import BackgroundRuns
from gateway.responses.rows import Limits
from gateway.responses.store import LOOK_AGAIN_S, ResponseStore
from gateway.routing import RouteTable
from gateway.sse import COMMENT_GAP_S, FIRST_COMMENT_S, PING, PING_S, STALLED_READER_S, EventStream, error_frame


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
    # The same for the first sign of life.
    first_ping_s: float = PING_S
    first_comment_s: float = FIRST_COMMENT_S
    comment_gap_s: float = COMMENT_GAP_S
    stalled_reader_s: float = STALLED_READER_S
    # How often another process's work on a background response is looked at.
    look_again_s: float = LOOK_AGAIN_S


@dataclass(slots=True)
class Services:
    """The gateway's parts. `open` must run before the first request. `token` is the run's, for workers on TCP."""

    config: HostlerConfig
    placement_target: str
    ring: KeyRing
    limits: KeyLimits
    token: str = ""
    patience: Patience = field(default_factory=Patience)
    lifetime: Lifetime = field(default_factory=Lifetime)
    # Where responses are stored; None: for this process alone, and gone with it.
    state_dir: Path | None = None
    table: RouteTable = field(init=False)
    channels: WorkerChannels = field(init=False)
    placement: PlacementClient = field(init=False)
    dispatcher: Dispatcher = field(init=False)
    meter: Meter = field(default_factory=Meter)
    linked_images: LinkedImages = field(init=False)
    responses: ResponseStore = field(init=False)
    answering: Answering = field(init=False)
    background: BackgroundRuns = field(init=False)
    mcp: McpServers = field(init=False)
    # Whether `/ready` has said yes before.
    has_served: bool = False
    # Callers that follow events.
    num_followers: int = 0
    # Called when all parts are there.
    on_open: list[Callable[[], None]] = field(default_factory=list)

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
            self.meter,
            max_waiting=max_waiting_of(self.config),
            ensure_timeout_s=self.patience.ensure_s,
            gone_timeout_s=self.patience.gone_s,
            limits=self.limits,
        )
        self.linked_images = LinkedImages(fetcher() if self.config.fetch_urls else None)
        self.mcp = McpServers(self.config)
        # Ahead of the first request that needs it.
        loading_mcp = asyncio.create_task(self.mcp.load()) if self.config.mcp_servers else None
        self._open_responses()
        watching = asyncio.create_task(self.placement.watch(self.table))
        self.ring.on_end = self.lifetime.end_key
        watching_keys = asyncio.create_task(self.ring.watch())
        try:
            for tell in self.on_open:
                tell()
            yield
        finally:
            has_successor = self.lifetime.has_successor
            await self.background.close(self.config.reload_drain if has_successor else self.config.drain_s)
            await self.responses.close()
            await self.mcp.close()
            watching_keys.cancel()
            if loading_mcp is not None:
                await asyncio.wait((loading_mcp,))
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await self.channels.close()
            await self.placement.close()
            self.limits.close()

    def _open_responses(self) -> None:
        limits = Limits(self.config.responses_max_count, self.config.responses_max_bytes, self.config.responses_max_age)
        directory = self.config.responses_dir or self.state_dir
        self.responses = ResponseStore(directory, limits, look_again_s=self.patience.look_again_s)
        self.answering = Answering(
            self.table, self.dispatcher, self.linked_images, self.responses, self.mcp, self.patience.first_table_s
        )
        self.background = BackgroundRuns(self.responses, self.lifetime)


def max_waiting_of(config: HostlerConfig) -> Callable[[str], int]:
    """Return model → how many of its requests may be without a first token in this process: all that its workers take.

    With several gateways the workers' own bounds are the exact ones; this one holds while a model comes up.
    """
    usual = ModelConfig(name="any")
    models = {model.name: model for model in config.models}

    def max_waiting(name: str) -> int:
        model = models.get(name, usual)
        return (model.max_running + model.max_queued) * model.max_replicas

    return max_waiting


def fetcher() -> Fetch:
    """Return what fetches addresses."""
    from gateway.fetch import Fetcher  # 200 ms and 6 MB of HTTP client

    return Fetcher()


def services_of(request: Request) -> Services:
    """Return the services of the application that serves `request`."""
    services: Services = request.app.state.services
    return services


def event_stream(
    request: Request,
    frames: AsyncGenerator[bytes, None],
    *,
    is_spectator: bool = False,
    error_frames: Callable[[HostlerError], bytes] = error_frame,
    ping: Callable[[], bytes] = lambda: PING,
) -> EventStream:
    """Return the streamed reply to `request` under this application's deadlines; the rest as `EventStream` has it."""
    services = services_of(request)
    patience = services.patience
    return EventStream(
        frames,
        services.lifetime,
        request_id=request_id_of(request.scope),
        is_spectator=is_spectator,
        ping_s=patience.ping_s,
        first_ping_s=min(patience.first_ping_s, patience.ping_s),
        first_comment_s=patience.first_comment_s,
        comment_gap_s=patience.comment_gap_s,
        stalled_reader_s=patience.stalled_reader_s,
        error_frames=error_frames,
        ping=ping,
    )

"""The route table: which models there are, and which workers may receive requests. Above: `dispatch`.

`Routes` is one frozen table with its lookups; `RouteTable` holds the newest and lets tasks wait for change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from hostler.errors import InvalidRequest, ModelNotFound, OrchestratorAway
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2 as pb

ReplicaKey = tuple[str, int]
_CHAT_ENGINES = (
    lifecycle_pb2.ENGINE_KIND_UNSPECIFIED,
    lifecycle_pb2.ENGINE_KIND_TEXT,
    lifecycle_pb2.ENGINE_KIND_SCRIPTED,
)


def key_of(replica: pb.Replica) -> ReplicaKey:
    """Return what tells one life of a worker from every other: address and generation."""
    return replica.address, replica.generation


def ready_replicas(route: pb.ModelRoute) -> list[pb.Replica]:
    """Return the replicas that can answer now."""
    return [replica for replica in route.replicas if replica.state == pb.MODEL_STATE_READY]


class Routes:
    """One version of the table."""

    def __init__(self, models: Iterable[pb.ModelRoute]) -> None:
        self.models: tuple[pb.ModelRoute, ...] = tuple(models)
        self._by_name: dict[str, pb.ModelRoute] = {}
        self._by_folded: dict[str, pb.ModelRoute] = {}
        for route in self.models:
            self._by_name[route.name] = route
        for route in self.models:
            for name in (route.name, *route.aliases):
                self._by_name.setdefault(name, route)
                self._by_folded.setdefault(name.casefold(), route)

    def find(self, name: str) -> pb.ModelRoute | None:
        """Return the model of a name or alias; else the same without `@revision`; else whatever the letters' case."""
        bare = name.rpartition("@")[0]
        for candidate in (name, bare):
            if candidate and (route := self._by_name.get(candidate)) is not None:
                return route
        for candidate in (name, bare):
            if candidate and (route := self._by_folded.get(candidate.casefold())) is not None:
                return route
        return None

    def replicas(self) -> set[ReplicaKey]:
        """Return every replica that is listed, of any model."""
        return {key_of(replica) for route in self.models for replica in route.replicas}


class RouteTable:
    """The newest table. Written by the watching task alone, read by every request; one event loop."""

    def __init__(self) -> None:
        self._routes: Routes | None = None
        self._changed = asyncio.Event()
        self.on_change: Callable[[Routes], None] = lambda routes: None

    @property
    def routes(self) -> Routes | None:
        """The newest table, or None before the first."""
        return self._routes

    def replace(self, routes: Routes) -> None:
        """Take a new table and wake everyone who waits for one."""
        self._routes = routes
        self.on_change(routes)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def first(self, timeout_s: float) -> Routes:
        """Return the newest table, waiting for the first one while the server starts.

        Raises:
            OrchestratorAway: none came in time.
        """
        if self._routes is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        if self._routes is None:
            raise OrchestratorAway("The server is starting, or its orchestrator is away. Try again in a moment.")
        return self._routes

    async def gone(self, key: ReplicaKey, timeout_s: float) -> bool:
        """Wait until a replica is no longer listed; False when it still is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._routes is not None and key in self._routes.replicas():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


def find_model(routes: Routes, name: str) -> pb.ModelRoute:
    """Return the route of a model that a client asked for.

    Raises:
        ModelNotFound: no such name.
    """
    route = routes.find(name)
    if route is None:
        raise ModelNotFound(
            f"The model {_shown(name)} does not exist or is not served here. GET /v1/models lists those that are.",
            param="model",
        )
    return route


def find_chat_model(routes: Routes, name: str) -> pb.ModelRoute:
    """Return the route of a model that can chat.

    Raises:
        ModelNotFound: no such name.
        InvalidRequest: a model of another kind.
    """
    route = find_model(routes, name)
    if route.engine not in _CHAT_ENGINES:
        raise InvalidRequest(f"The model {_shown(name)} is not a chat model.", param="model")
    return route


def _shown(name: str) -> str:
    return f"'{name if len(name) <= 100 else name[:97] + '...'}'"

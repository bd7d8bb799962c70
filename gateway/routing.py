"""The route table: which models there are, and which workers may receive requests. Above: `dispatch`.

`Routes` is one frozen table with its lookups; `RouteTable` holds the newest and lets tasks wait for change. What a name
means is a `Target`: a model, or one of its adapters, which is served by the same workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hostler.errors import InvalidRequest, ModelNotFound, OrchestratorAway
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2 as pb

from gateway.keys.caller import current_caller

ReplicaKey = tuple[str, int]
# What is unspecified is known once it is loaded; until then its worker refuses what it cannot do.
_UNKNOWN = lifecycle_pb2.ENGINE_KIND_UNSPECIFIED
_CHAT_ENGINES = (_UNKNOWN, lifecycle_pb2.ENGINE_KIND_TEXT, lifecycle_pb2.ENGINE_KIND_SCRIPTED)
_EMBEDDING_ENGINES = (_UNKNOWN, lifecycle_pb2.ENGINE_KIND_EMBEDDING)
_HEARING_ENGINES = (_UNKNOWN, lifecycle_pb2.ENGINE_KIND_TRANSCRIPTION)
_SPEAKING_ENGINES = (_UNKNOWN, lifecycle_pb2.ENGINE_KIND_SPEECH)
_RANKING_ENGINES = (*_EMBEDDING_ENGINES, lifecycle_pb2.ENGINE_KIND_RERANK)


def key_of(replica: pb.Replica) -> ReplicaKey:
    """Return what tells one life of a worker from every other: address and generation."""
    return replica.address, replica.generation


def ready_replicas(route: pb.ModelRoute) -> list[pb.Replica]:
    """Return the replicas that can answer now."""
    return [replica for replica in route.replicas if replica.state == pb.MODEL_STATE_READY]


@dataclass(frozen=True, slots=True)
class Target:
    """What a client's `model` means.

    Attributes:
        route: the model that answers.
        adapter: the adapter that it answers with; empty for the model itself.
    """

    route: pb.ModelRoute
    adapter: str = ""

    @property
    def name(self) -> str:
        """The public name, as `/v1/models` lists it and replies tell it."""
        return self.adapter or self.route.name

    @property
    def is_allowed(self) -> bool:
        """Whether the caller whose request the running task serves may use it."""
        caller = current_caller()
        if caller is None or caller.models is None:
            return True
        return caller.may_use((self.adapter,) if self.adapter else (self.route.name, *self.route.aliases))


def targets_of(route: pb.ModelRoute) -> list[Target]:
    """Return everything that a model's workers serve: itself, then its adapters."""
    return [Target(route), *(Target(route, adapter) for adapter in route.adapters)]


class Routes:
    """One version of the table."""

    def __init__(self, models: Iterable[pb.ModelRoute]) -> None:
        self.models: tuple[pb.ModelRoute, ...] = tuple(models)
        self._by_name: dict[str, Target] = {route.name: Target(route) for route in self.models}
        self._by_folded: dict[str, Target] = {}
        for route in self.models:
            own, *adapted = targets_of(route)
            names = [(name, own) for name in (route.name, *route.aliases)]
            for name, target in (*names, *((target.name, target) for target in adapted)):
                self._by_name.setdefault(name, target)
                self._by_folded.setdefault(name.casefold(), target)

    def find(self, name: str) -> Target | None:
        """Return what a name or alias means; else the same without `@revision`; else whatever the letters' case."""
        bare = name.rpartition("@")[0]
        for candidate in (name, bare):
            if candidate and (target := self._by_name.get(candidate)) is not None:
                return target
        for candidate in (name, bare):
            if candidate and (target := self._by_folded.get(candidate.casefold())) is not None:
                return target
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


def find_model(routes: Routes, name: str) -> Target:
    """Return the model, or the adapter of one, that a client asked for.

    Raises:
        ModelNotFound: no such name, or none that the caller's key may use, which look the same.
    """
    target = routes.find(name)
    if target is None or not target.is_allowed:
        raise ModelNotFound(
            f"The model {_shown(name)} does not exist or is not served here. GET /v1/models lists those that are.",
            param="model",
        )
    return target


def find_chat_model(routes: Routes, name: str) -> Target:
    """Return a model, or the adapter of one, that can chat.

    Raises:
        ModelNotFound: no such name.
        InvalidRequest: a model of another kind.
    """
    return _find(routes, name, _CHAT_ENGINES, "is not a chat model")


def find_writing_model(routes: Routes, name: str) -> Target:
    """Return a model, or the adapter of one, that continues a text; raises as `find_chat_model`."""
    return _find(routes, name, _CHAT_ENGINES, "writes no text")


def find_embedding_model(routes: Routes, name: str) -> Target:
    """Return a model that makes embeddings; raises as `find_chat_model`."""
    return _find(routes, name, _EMBEDDING_ENGINES, "makes no embeddings")


def find_ranking_model(routes: Routes, name: str) -> Target:
    """Return a model that ranks documents; raises as `find_chat_model`."""
    return _find(routes, name, _RANKING_ENGINES, "ranks no documents")


def find_hearing_model(routes: Routes, name: str) -> Target:
    """Return a model that writes down speech; raises as `find_chat_model`."""
    return _find(routes, name, _HEARING_ENGINES, "does not write down speech")


def find_speaking_model(routes: Routes, name: str) -> Target:
    """Return a model that speaks; raises as `find_chat_model`."""
    return _find(routes, name, _SPEAKING_ENGINES, "does not speak")


def _find(routes: Routes, name: str, engines: Sequence[int], otherwise: str) -> Target:
    target = find_model(routes, name)
    if target.route.engine not in engines:
        raise InvalidRequest(f"The model {_shown(name)} {otherwise}.", param="model")
    return target


def _shown(name: str) -> str:
    return f"'{name if len(name) <= 100 else name[:97] + '...'}'"

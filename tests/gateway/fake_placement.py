"""An orchestrator whose table and whose way to bring models up are the test's. Above: `fakes`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from hostler.channel import new_server
from hostler.errors import HostlerError, ModelNotFound, abort
from hostler.placement.v1 import placement_pb2
from hostler.placement.v1.placement_pb2_grpc import PlacementServiceServicer, add_PlacementServiceServicer_to_server

EnsureScript = Callable[[str], AsyncIterator[placement_pb2.EnsureProgress | placement_pb2.Replica]]


async def never_heard_of_it(model: str) -> AsyncIterator[placement_pb2.Replica]:
    raise ModelNotFound(f"no {model}")
    yield


class FakePlacement(PlacementServiceServicer):
    """An orchestrator whose table and whose way to bring models up are the test's."""

    def __init__(self, directory: Path) -> None:
        self.target = f"unix:{directory}/orchestrator.sock"
        self.ensure: EnsureScript = never_heard_of_it
        self.ensured: list[tuple[str, bool]] = []
        self.priorities: list[int] = []
        self.asked: list[tuple[str, str]] = []
        self.failure: HostlerError | None = None
        self.plan = placement_pb2.PlanModelResponse(feasible=True)
        self.status = placement_pb2.GetStatusResponse(version="1")
        self.pinned: dict[str, bool] = {}
        self.past: list[placement_pb2.WatchEventsResponse] = []
        self.news: asyncio.Queue[placement_pb2.WatchEventsResponse] = asyncio.Queue()
        self.num_followers = 0
        self.num_waiting = 0
        self.changed = asyncio.Condition()
        self._models: list[placement_pb2.ModelRoute] = []
        self._version = 0
        self._server = new_server()

    async def start(self) -> None:
        add_PlacementServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def publish(self, *models: placement_pb2.ModelRoute) -> None:
        async with self.changed:
            self._models = list(models)
            self._version += 1
            self.changed.notify_all()

    async def until_waiting(self, number: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.num_waiting == number)

    async def WatchRoutes(self, request: Any, context: Any) -> AsyncIterator[placement_pb2.WatchRoutesResponse]:  # noqa: N802
        seen = -1
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self._version != seen)  # noqa: B023
                seen = self._version
                table = placement_pb2.WatchRoutesResponse(version=seen, models=self._models)
            yield table

    async def _count(self, step: int) -> None:
        async with self.changed:
            self.num_waiting += step
            self.changed.notify_all()

    async def EnsureModel(self, request: Any, context: Any) -> AsyncIterator[placement_pb2.EnsureModelResponse]:  # noqa: N802
        self.ensured.append((request.model, request.explicit))
        self.priorities.append(request.priority)
        await self._count(1)
        try:
            async for step in self.ensure(request.model):
                if isinstance(step, placement_pb2.Replica):
                    yield placement_pb2.EnsureModelResponse(ready=step)
                else:
                    yield placement_pb2.EnsureModelResponse(progress=step)
        except HostlerError as error:
            await abort(context, error)
        finally:
            await asyncio.shield(self._count(-1))

    async def until_followed(self, number: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.num_followers == number)

    async def _asked(self, method: str, model: str, context: Any) -> None:
        self.asked.append((method, model))
        if self.failure is not None:
            await abort(context, self.failure)

    async def PlanModel(self, request: Any, context: Any) -> placement_pb2.PlanModelResponse:  # noqa: N802
        await self._asked("plan", request.model, context)
        return self.plan

    async def UnloadModel(self, request: Any, context: Any) -> placement_pb2.UnloadModelResponse:  # noqa: N802
        await self._asked("unload", request.model, context)
        return placement_pb2.UnloadModelResponse(num_unloaded=2)

    async def SleepModel(self, request: Any, context: Any) -> placement_pb2.SleepModelResponse:  # noqa: N802
        await self._asked("sleep", request.model, context)
        return placement_pb2.SleepModelResponse(num_asleep=1)

    async def PinModel(self, request: Any, context: Any) -> placement_pb2.PinModelResponse:  # noqa: N802
        await self._asked("pin", request.model, context)
        self.pinned[request.model] = request.pinned
        return placement_pb2.PinModelResponse()

    async def GetStatus(self, request: Any, context: Any) -> placement_pb2.GetStatusResponse:  # noqa: N802
        await self._asked("status", "", context)
        return self.status

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[placement_pb2.WatchEventsResponse]:  # noqa: N802
        await self._asked("events", "", context)
        for event in self.past[-request.max_past :]:
            yield event
        if request.past_only:
            return
        await self._follow(1)
        try:
            while True:
                yield await self.news.get()
        finally:
            await asyncio.shield(self._follow(-1))

    async def _follow(self, step: int) -> None:
        async with self.changed:
            self.num_followers += step
            self.changed.notify_all()

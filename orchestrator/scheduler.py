"""The scheduler: one task that owns all state and handles one event at a time. No locks anywhere.

Above it: `service.py` (the placement contract). Below it: `loading.py`, `watching.py`, `retiring.py`, which it
calls with `requests.py`, and the effects, whose outcomes come back as events. A read that must agree with a
later change goes through the queue, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from hostler.config import HostlerConfig
from hostler.placement.v1 import placement_pb2

from orchestrator import events, models, wire
from orchestrator.devices import Device
from orchestrator.effects import Effects
from orchestrator.loading import Loading
from orchestrator.requests import Requests, answer
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Cluster, Waiter
from orchestrator.watching import Watching

log = logging.getLogger(__name__)

T = TypeVar("T")

FOREIGN_INTERVAL_S = 5.0
RESCAN_INTERVAL_S = 30.0
"""How soon a model that was pulled or removed by hand shows in the routes."""


class Scheduler:
    """Owns the cluster state. `run` is its task; every other public method may be called from the same loop."""

    def __init__(self, config: HostlerConfig, devices: Sequence[Device], effects: Effects) -> None:
        self._cluster = Cluster({d.id: d for d in devices})
        self._runtime = Runtime(config, self._cluster, effects)
        self._retiring = Retiring(self._runtime)
        self._loading = Loading(self._runtime, self._retiring)
        self._watching = Watching(self._runtime, self._loading, self._retiring)
        self._effects = effects
        self._requests = Requests(self._runtime, self._loading, self._retiring)
        self._foreign_at_s = float("-inf")
        self._scanned_at_s = effects.now_s()
        for configured in config.models:
            self._requests.add(models.from_config(configured))
        self._handlers: dict[type[Any], Callable[[Any], object]] = {
            events.Ensure: self._requests.on_ensure,
            events.Leave: self._requests.on_leave,
            events.Unload: self._requests.on_unload,
            events.Pin: self._requests.on_pin,
            events.AskPlan: self._requests.on_ask_plan,
            events.Planned: self._requests.on_planned,
            events.AskStatus: lambda e: answer(e.reply, wire.status(self._cluster, self._runtime.started_unix_ms)),
            events.Stop: self._on_stop,
            events.Tick: self._on_tick,
            events.StoreListed: self._requests.on_store_listed,
            events.WorkersFound: self._on_workers_found,
            events.ForeignMeasured: self._on_foreign,
            events.LocateDone: self._loading.on_locate_done,
            events.Progressed: self._loading.on_progressed,
            events.FetchDone: self._loading.on_fetch_done,
            events.SpawnDone: self._on_spawn_done,
            events.LoadDone: self._loading.on_load_done,
            events.Reported: self._watching.on_reported,
            events.WatchEnded: self._watching.on_watch_ended,
            events.Retired: self._on_retired,
        }

    # ------------------------------------------------------------ for the service

    async def ensure(self, model: str, *, explicit: bool = False) -> AsyncIterator[placement_pb2.EnsureModelResponse]:
        """Yield progress, then `ready`. Closing the iterator gives the wait up.

        Raises:
            HostlerError: the model cannot be brought up; the error says why.
        """
        waiter = Waiter()
        self.post(events.Ensure(model, waiter, explicit))
        try:
            while True:
                await waiter.changed.wait()
                waiter.changed.clear()
                if waiter.error is not None:
                    raise waiter.error
                if waiter.worker is not None:
                    yield placement_pb2.EnsureModelResponse(ready=wire.replica(waiter.worker))
                    return
                if waiter.progress is not None:
                    yield wire.progress(waiter.progress)
        finally:
            self.post(events.Leave(waiter))

    def watch_routes(self) -> AsyncIterator[placement_pb2.WatchRoutesResponse]:
        """Yield the route table now and after every change."""
        return self._runtime.routes.watch()

    async def unload(self, model: str) -> int:
        """Drain and end every replica of a model; return how many there were."""
        return await self._ask(lambda reply: events.Unload(model, reply))

    async def pin(self, model: str, *, pinned: bool) -> None:
        """Keep a model from being evicted, or let it go again."""
        await self._ask(lambda reply: events.Pin(model, pinned, reply))

    async def plan(self, model: str) -> placement_pb2.PlanModelResponse:
        """Return what `ensure` would do now, and why."""
        return await self._ask(lambda reply: events.AskPlan(model, reply))

    async def status(self) -> placement_pb2.GetStatusResponse:
        """Return devices, models and replicas as they are now."""
        return await self._ask(events.AskStatus)

    def post(self, event: events.Event) -> None:
        """Queue an event."""
        self._runtime.post(event)

    async def _ask(self, make: Callable[[asyncio.Future[T]], events.Event]) -> T:
        reply: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.post(make(reply))
        return await reply

    # ------------------------------------------------------------ the task

    async def run(self) -> None:
        """Handle events until a `Stop` has been carried out. Cancelling leaves the workers alive."""
        memory = self._effects.recall()
        self._cluster.generation = max([memory.generation, *(p.generation for p in memory.placements)])
        if not memory.placements:  # Nobody can have outlived an earlier orchestrator: no need to wait for Ray.
            self._runtime.may_publish = True
            self._preload()
            self._runtime.publish()
        self._runtime.run(self._take_stock())
        try:
            while not (self._runtime.stopping and not self._cluster.workers):
                event = await self._runtime.queue.get()
                try:
                    self._handlers[type(event)](event)
                except Exception:  # One faulty event must not take placement down for everybody.
                    log.exception("an event could not be handled", extra={"event": type(event).__name__})
        finally:
            await self._runtime.cancel_all()

    async def _take_stock(self) -> None:
        stored, workers = await asyncio.gather(
            self._effects.list_stored(), self._effects.find_workers(), return_exceptions=True
        )
        if isinstance(stored, BaseException):
            log.error("the model store could not be read", exc_info=stored)
        else:
            self.post(events.StoreListed(stored))
        if isinstance(workers, BaseException):
            log.error("living workers could not be listed", exc_info=workers)
            workers = ()
        self.post(events.WorkersFound(workers))

    def _preload(self) -> None:
        for model in self._cluster.models.values():
            if (model.spec.preload or model.waiters) and self._cluster.ready(model.spec.name) is None:
                self._loading.start(model)

    def _on_workers_found(self, event: events.WorkersFound) -> None:
        self._watching.adopt(event.workers)
        self._runtime.may_publish = True
        self._preload()
        self._runtime.remember()
        self._runtime.publish()

    def _on_spawn_done(self, event: events.SpawnDone) -> None:
        if (worker := self._loading.on_spawn_done(event)) is not None:
            self._watching.start(worker)

    def _on_retired(self, event: events.Retired) -> None:
        if self._retiring.gone(event.generation) is not None:
            self._loading.place_waiting()
            self._requests.answer_unloads()

    # ------------------------------------------------------------ time and the end

    def _on_tick(self, event: events.Tick) -> None:
        now_s = self._effects.now_s()
        self._watching.tick(now_s)
        self._loading.tick(now_s)
        self._loading.place_waiting()  # A moment's hold on a fresh replica may have run out.
        if now_s - self._foreign_at_s >= FOREIGN_INTERVAL_S:
            self._foreign_at_s = now_s
            if any(device.total_bytes for device in self._cluster.devices.values()):
                self._runtime.run(self._measure_foreign())
        if now_s - self._scanned_at_s >= RESCAN_INTERVAL_S:
            self._scanned_at_s = now_s
            self._requests.rescan()

    async def _measure_foreign(self) -> None:
        pids = {worker.pid for worker in self._cluster.workers.values()}
        reserved = {device: self._cluster.occupied_bytes(device) for device in self._cluster.devices}
        self.post(events.ForeignMeasured(await self._effects.measure_foreign(pids, reserved)))

    def _on_foreign(self, event: events.ForeignMeasured) -> None:
        self._cluster.foreign_bytes = event.foreign_bytes
        self._loading.place_waiting()

    def _on_stop(self, event: events.Stop) -> None:
        self._requests.stop()
        self._runtime.stopping = True

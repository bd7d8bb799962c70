"""The scheduler: one task that owns all state and handles one event at a time. No locks anywhere.

Above it: `service.py` (the placement contract). Below it: its parts, which it hands the events to, and the effects,
whose outcomes come back as events. A read that must agree with a later change goes through the queue, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from hostler.config import HostlerConfig
from hostler.placement.v1 import placement_pb2

from orchestrator import events, models, wire
from orchestrator.accounting import Accounting
from orchestrator.adopting import Adopting
from orchestrator.cluster import Cluster
from orchestrator.devices import Device
from orchestrator.effects import Effects
from orchestrator.inventory import Inventory
from orchestrator.loading import Loading
from orchestrator.placing import Placing
from orchestrator.pool import Pool
from orchestrator.reconfiguring import Reconfiguring
from orchestrator.replicas import Replicas
from orchestrator.requests import Requests, answer
from orchestrator.resting import Resting
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.starting import Starting
from orchestrator.state import Waiter
from orchestrator.watching import Watching

log = logging.getLogger(__name__)

T = TypeVar("T")

RESCAN_INTERVAL_S = 30.0
"""How soon a model that was pulled or removed by hand shows in the routes."""


class Scheduler:
    """Owns the cluster state. `run` is its task; every other public method may be called from the same loop."""

    def __init__(
        self,
        config: HostlerConfig,
        devices: Sequence[Device],
        effects: Effects,
        sleep_budget_bytes: Mapping[str, int] | None = None,
    ) -> None:
        self._cluster = Cluster(
            {d.id: d for d in devices},
            sleep_budget_bytes=dict(sleep_budget_bytes or {}),
            experience=effects.recall_experience(),
            apart=frozenset(config.apart),
        )
        self._runtime = runtime = Runtime(config, self._cluster, effects)
        self._effects = effects
        self._retiring = Retiring(runtime)
        self._resting = Resting(runtime, self._retiring)
        self._pool = Pool(runtime)
        placing = Placing(runtime, self._retiring, self._resting)
        starting = Starting(runtime, placing, self._pool)
        self._loading = Loading(runtime, self._retiring, placing, starting)
        self._accounting = Accounting(runtime, self._resting, self._retiring)
        self._watching = Watching(runtime, self._loading, self._retiring, self._accounting)
        starting.on_worker = self._watching.start
        self._adopting = Adopting(runtime, self._watching, starting, self._pool)
        self._replicas = Replicas(runtime, self._loading, self._retiring)
        self._inventory = Inventory(runtime, self._watching)
        self._requests = Requests(runtime, self._loading, placing, self._resting, self._retiring)
        self._reconfiguring = Reconfiguring(runtime, self._requests, self._loading, self._retiring)
        self._scanned_at_s = effects.now_s()
        for configured in config.models:
            self._requests.add(models.from_config(configured))
        self._handlers: dict[type[Any], Callable[[Any], object]] = {
            events.Ensure: self._requests.on_ensure,
            events.Leave: self._requests.on_leave,
            events.Unload: self._requests.on_unload,
            events.Sleep: self._requests.on_sleep,
            events.Pin: self._requests.on_pin,
            events.AskPlan: self._requests.on_ask_plan,
            events.Planned: self._requests.on_planned,
            events.AskStatus: self._on_ask_status,
            events.Stop: self._on_stop,
            events.Tick: self._on_tick,
            events.StoreListed: self._requests.on_store_listed,
            events.Reconfigured: self._reconfiguring.on_reconfigured,
            events.WorkersFound: self._on_workers_found,
            events.WorkersSeen: self._adopting.on_seen,
            events.ForeignMeasured: self._then_place(self._inventory.on_foreign),
            events.HostsMeasured: self._inventory.on_hosts,
            events.DevicesChanged: self._on_devices_changed,
            events.BlankReady: self._pool.on_ready,
            events.BlankLost: self._pool.on_lost,
            events.LocateDone: self._loading.on_locate_done,
            events.Progressed: self._loading.on_progressed,
            events.FetchDone: self._loading.on_fetch_done,
            events.LoadDone: starting.on_load_done,
            events.WakeDone: starting.on_wake_done,
            events.SleepDone: self._then_place(self._resting.on_sleep_done),
            events.ResizeDone: self._then_place(self._resting.on_resize_done),
            events.Reported: self._watching.on_reported,
            events.WatchEnded: self._watching.on_watch_ended,
            events.Retired: self._on_retired,
            events.Ended: self._then_place(self._adopting.on_ended),
        }

    def _then_place(self, handle: Callable[[Any], bool]) -> Callable[[Any], None]:
        """Wrap a handler that returns whether room may have come free."""

        def handler(event: Any) -> None:
            if handle(event):
                self._loading.place_waiting()

        return handler

    # ------------------------------------------------------------ for the service

    async def ensure(
        self, model: str, *, explicit: bool = False, batch: bool = False
    ) -> AsyncIterator[placement_pb2.EnsureModelResponse]:
        """Yield progress, then `ready`. Closing the iterator gives the wait up.

        Raises:
            HostlerError: the model cannot be brought up; the error says why.
        """
        waiter = Waiter(batch=batch, since_s=self._effects.now_s())
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

    async def sleep(self, model: str) -> int:
        """Put every replica of a model to sleep; return how many went."""
        return await self._ask(lambda reply: events.Sleep(model, reply))

    def watch_events(self, max_past: int, *, past_only: bool) -> AsyncIterator[placement_pb2.WatchEventsResponse]:
        """Yield what happened, oldest first, then what happens."""
        return self._runtime.journal.watch(max_past, past_only=past_only)

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
        # Nobody can have outlived an earlier orchestrator, and there are no other machines: no need to wait for Ray.
        if not memory.placements and not self._runtime.config.ray_address:
            self._runtime.may_publish = True
            self._preload()
            self._runtime.publish()
        self._runtime.run(self._inventory.follow_nodes())
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
        self.post(events.WorkersFound(workers, not isinstance(stored, BaseException)))

    def _preload(self) -> None:
        for model in self._cluster.models.values():
            if (model.spec.preload or model.waiters) and not self._cluster.ready(model.spec.name):
                self._loading.start(model)

    def _on_workers_found(self, event: events.WorkersFound) -> None:
        self._adopting.adopt(event.workers, stored=event.stored)
        self._runtime.may_publish = True
        self._reconfiguring.retire_outdated()
        self._preload()
        self._runtime.remember()
        self._runtime.publish()

    def _on_devices_changed(self, event: events.DevicesChanged) -> None:
        self._inventory.on_devices_changed(event)
        self._loading.place_waiting()
        for model in self._cluster.models.values():  # One that lost its only place may have it back.
            if model.wanted and model.failure and not self._cluster.ready(model.spec.name):
                self._loading.start(model)

    def _on_retired(self, event: events.Retired) -> None:
        if self._retiring.gone(event.generation) is not None:
            self._reconfiguring.forget()
            self._loading.place_waiting()
            self._requests.answer_unloads()

    # ------------------------------------------------------------ time and the end

    def _on_tick(self, event: events.Tick) -> None:
        now_s = self._effects.now_s()
        self._watching.tick(now_s)
        self._loading.tick(now_s)
        self._resting.tick(now_s)
        self._replicas.tick(now_s)
        self._accounting.tick(now_s)
        self._loading.place_waiting()  # A moment's hold, a residency or somebody's patience may have run out.
        self._pool.tick(now_s)
        self._adopting.tick(now_s)
        self._inventory.tick(now_s)
        if now_s - self._scanned_at_s >= RESCAN_INTERVAL_S:
            self._scanned_at_s = now_s
            self._requests.rescan()

    def _on_ask_status(self, event: events.AskStatus) -> None:
        num_blank = {node: self._pool.num_ready(node) for node in {d.node for d in self._cluster.devices.values()}}
        counts = self._runtime.journal.counts
        answer(event.reply, wire.status(self._cluster, self._runtime.started_unix_ms, num_blank, counts))

    def _on_stop(self, event: events.Stop) -> None:
        self._requests.stop()
        self._pool.close()
        self._runtime.stopping = True

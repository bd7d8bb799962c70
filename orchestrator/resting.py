"""Sleep, wake and the size of KV caches: what a worker does on its device without leaving its process.

Above it: `placing.py` (room for others), `loading.py` (wakes), `accounting.py` (budgets), the scheduler (operators,
keep-alive). Below it: the effects, `retiring.py` for those who cannot sleep.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from hostler.errors import HostlerError, InvalidRequest, Unavailable
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.cluster import Cluster
from orchestrator.retiring import EVICTION_DRAIN_S, Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Worker, WorkerState
from orchestrator.views import in_words

log = logging.getLogger(__name__)

GOES_AFTER = 10.0
"""A model with a keep-alive goes for good once it has been idle for so many times that long."""


class Resting:
    """Every method is called by the scheduler's task and returns at once; outcomes come back as events."""

    def __init__(self, runtime: Runtime, retiring: Retiring) -> None:
        self._runtime = runtime
        self._cluster: Cluster = runtime.cluster
        self._retiring = retiring

    # ------------------------------------------------------------ sleep

    def can_sleep(self, worker: Worker) -> bool:
        """Return whether the worker's host memory has room for it, asleep."""
        room = self._cluster.sleep_room_bytes(worker.node)
        return room > 0 and self._cluster.sleep_used_bytes(worker.node) + worker.sleep_bytes <= room

    def why_not(self, worker: Worker) -> str:
        """Say why a worker cannot sleep."""
        budget = self._cluster.sleep_budget_bytes.get(worker.node, 0)
        if not budget:
            return "No host memory is set aside for sleeping models; see sleep_memory in the configuration."
        used, room = self._cluster.sleep_used_bytes(worker.node), self._cluster.sleep_room_bytes(worker.node)
        return (
            f"{worker.model} would hold {in_words(worker.sleep_bytes)} of host memory asleep; "
            f"{in_words(max(0, room - used))} of {in_words(budget)} are left. Unload it instead."
        )

    def put_to_sleep(self, worker: Worker, why: str) -> None:
        """Take a ready worker off the routes and to sleep once its requests have ended."""
        if worker.state is not WorkerState.READY:
            return
        worker.state, worker.reason = WorkerState.RESTING, f"asleep: {why}"
        log.info("putting a worker to sleep", extra={"worker": worker.id, "model": worker.model, "why": why})
        self._runtime.run(self._sleep(worker), worker.generation)
        self._runtime.publish()

    async def _sleep(self, worker: Worker) -> None:
        try:
            reply = await self._runtime.effects.sleep(worker.id, worker.generation, EVICTION_DRAIN_S)
            self._runtime.post(events.SleepDone(worker.generation, reply.freed_bytes, reply.host_bytes))
        except HostlerError as error:
            self._runtime.post(events.SleepDone(worker.generation, error=error))
        except Exception as error:
            log.exception("putting a worker to sleep failed", extra={"worker": worker.id})
            self._runtime.post(events.SleepDone(worker.generation, error=Unavailable(type(error).__name__)))

    def on_sleep_done(self, event: events.SleepDone) -> bool:
        """Free the device; one that could not sleep is sent away instead. Return whether room may have come free."""
        worker = self._cluster.workers.get(event.generation)
        if worker is None or worker.state is not WorkerState.RESTING:
            return False
        if event.error is not None:
            log.warning("a worker could not sleep", extra={"worker": worker.id, "error": event.error.message})
            self._retiring.gently(worker, EVICTION_DRAIN_S, f"could not sleep: {event.error.message}")
            return False
        model, freed_bytes, devices = self._cluster.models[worker.model], worker.reserved_bytes, worker.devices
        worker.state, worker.parts, worker.sleep_bytes = WorkerState.ASLEEP, (), event.host_bytes
        if worker.located is not None and event.host_bytes:
            self._runtime.learn(model.spec, worker, sleep_bytes=event.host_bytes)
        self._runtime.journal.note(
            pb.EVENT_KIND_ASLEEP,
            worker.reason.removeprefix("asleep: "),
            model=worker.model,
            device=devices,
            replica=worker.id,
            num_bytes=freed_bytes,
        )
        self._runtime.remember()
        self._runtime.publish()
        return True

    # ------------------------------------------------------------ resize

    def resize(self, worker: Worker, kv_cache_bytes: int, why: str) -> None:
        """Tell a ready worker of one device how far its KV cache may grow now."""
        if worker.resizing_to is not None or len(worker.parts) != 1 or worker.state is not WorkerState.READY:
            return
        worker.resizing_to = kv_cache_bytes
        if kv_cache_bytes > worker.kv_cache_bytes:  # Growth counts as taken before it happens.
            self._set_kv_cache(worker, kv_cache_bytes)
        log.info("resizing", extra={"worker": worker.id, "kv_cache_bytes": kv_cache_bytes, "why": why})
        self._runtime.run(self._resize(worker, kv_cache_bytes, why), worker.generation)

    async def _resize(self, worker: Worker, kv_cache_bytes: int, why: str) -> None:
        try:
            became = await self._runtime.effects.resize(worker.id, worker.generation, kv_cache_bytes)
            self._runtime.post(events.ResizeDone(worker.generation, became, why))
        except HostlerError as error:
            log.warning("a resize failed", extra={"worker": worker.id, "error": error.message})
            fixed = isinstance(error, InvalidRequest)
            remains = worker.kv_cache_bytes if fixed else None
            self._runtime.post(events.ResizeDone(worker.generation, remains, why, fixed))
        except Exception:
            log.exception("a resize failed", extra={"worker": worker.id})
            self._runtime.post(events.ResizeDone(worker.generation, None, why))

    def give_from_kv_cache(self, worker: Worker, num_bytes: int) -> None:
        """Have a worker pay with its KV cache for what it holds beyond its reservation, as far as it can.

        The part's size stays, more of it counts as the worker's own; what the KV cache cannot pay is added to it.
        """
        if worker.resizing_to is not None or worker.state is not WorkerState.READY or len(worker.parts) != 1:
            return
        paid = max(0, min(num_bytes, worker.kv_cache_bytes - worker.kv_keep_bytes))
        if num_bytes > paid:
            part = worker.parts[0]
            worker.parts = (replace(part, num_bytes=part.num_bytes + num_bytes - paid),)
        if not paid:
            self._runtime.remember()
            return
        worker.kv_cache_bytes -= paid
        worker.resizing_to, worker.owed_bytes = worker.kv_cache_bytes, paid
        why = "it holds more beside it than was expected"
        self._runtime.run(self._resize(worker, worker.kv_cache_bytes, why), worker.generation)

    def on_resize_done(self, event: events.ResizeDone) -> bool:
        """Take the worker's word for how large its KV cache may be now. Return whether room may have come free."""
        worker = self._cluster.workers.get(event.generation)
        if worker is None or worker.resizing_to is None or worker.state is WorkerState.LOST:
            return False
        worker.resizing_to = None
        owed, worker.owed_bytes = worker.owed_bytes, 0
        if not worker.parts:
            return False
        if event.kv_cache_bytes is None:
            if owed:  # It may hold all of it still; the next heartbeat asks it again.
                worker.kv_cache_bytes, worker.own_bytes = worker.kv_cache_bytes + owed, 0
            return True
        before = worker.kv_cache_bytes
        self._set_kv_cache(worker, event.kv_cache_bytes)
        if worker.kv_cache_bytes != before:
            self._runtime.journal.note(
                pb.EVENT_KIND_RESIZED,
                event.why,
                model=worker.model,
                device=worker.devices,
                replica=worker.id,
                num_bytes=worker.kv_cache_bytes,
            )
        if event.fixed:  # Nobody need plan on what it cannot give.
            worker.kv_keep_bytes = worker.kv_cache_bytes
        self._runtime.remember()
        return worker.kv_cache_bytes != before or event.fixed

    @staticmethod
    def _set_kv_cache(worker: Worker, kv_cache_bytes: int) -> None:
        part = worker.parts[0]
        num_bytes = part.num_bytes + kv_cache_bytes - worker.kv_cache_bytes
        worker.parts, worker.kv_cache_bytes = (replace(part, num_bytes=num_bytes),), kv_cache_bytes

    # ------------------------------------------------------------ keep-alive

    def tick(self, now_s: float) -> None:
        """Put to sleep, or send away, models that have been idle for as long as they may."""
        for worker in list(self._cluster.workers.values()):
            model = self._cluster.models[worker.model]
            keep_s = model.keep_alive_s if model.keep_alive_s is not None else model.spec.keep_alive_s
            if keep_s is None or keep_s < 0 or model.pinned or model.job is not None:
                continue
            idle_s = now_s - worker.used_at_s
            why = f"idle for {idle_s:.0f} s, to be kept {keep_s:g} s"
            if worker.state is WorkerState.READY and idle_s >= keep_s:
                if worker.num_requests or now_s < worker.busy_until_s:
                    continue
                model.wanted = False
                if self.can_sleep(worker):
                    self.put_to_sleep(worker, why)
                else:
                    self._retiring.gently(worker, EVICTION_DRAIN_S, why)
            elif worker.state is WorkerState.ASLEEP and idle_s >= GOES_AFTER * keep_s:
                self._retiring.gently(worker, EVICTION_DRAIN_S, why)

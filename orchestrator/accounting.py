"""What workers really hold, against what was reserved for them; room that came free, given back to KV caches; and room
that other programs took, paid for by those who can spare it.

Above it: `watching.py` (heartbeats) and the scheduler's tick. Below it: `resting.py` for resizes and sleep,
`retiring.py`.

A worker that holds more beside its KV cache than it was given pays with its KV cache, down to one full context, so that
a device's budget holds; what is left of the difference is added to what it was given. What was measured stands for the
next load.
"""

from __future__ import annotations

import logging

from orchestrator import models
from orchestrator.cluster import spare_bytes
from orchestrator.devices import Device
from orchestrator.policy.hosts import Hosts
from orchestrator.resting import Resting
from orchestrator.retiring import EVICTION_DRAIN_S, Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Model, Stage, Worker, WorkerState
from orchestrator.views import in_words

log = logging.getLogger(__name__)

NOTICED = 0.02
"""Share of a worker's reservation below which a difference is left alone."""
GROW_INTERVAL_S = 5.0
GROWN_WHEN_FULL = 0.8
"""A KV cache grows back once it has filled so much of its budget."""
LEAST_GROWTH_BYTES = 16 * 2**20


class Accounting:
    """Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, resting: Resting, retiring: Retiring) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._resting = resting
        self._retiring = retiring
        self._grown_at_s = runtime.effects.now_s()

    def on_heartbeat(self, worker: Worker) -> None:
        """Compare what a ready worker holds with what it was given."""
        report = worker.report
        if report is None or worker.state is not WorkerState.READY or not report.device_bytes:
            return
        # Of one moment: the peak may have had more of the KV cache in it than is allocated now.
        held = report.device_bytes - report.kv_allocated_bytes
        if held <= worker.own_bytes:
            return
        worker.own_bytes = held
        model = self._cluster.models[worker.model]
        self._runtime.learn(model.spec, worker, own_bytes=held)
        self._correct(worker)

    def _correct(self, worker: Worker) -> None:
        if len(worker.parts) != 1 or worker.resizing_to is not None:
            return
        excess = worker.own_bytes - (worker.reserved_bytes - worker.kv_cache_bytes)
        if excess <= NOTICED * worker.reserved_bytes:
            return
        log.warning(
            "a worker holds more than it was given",
            extra={"worker": worker.id, "model": worker.model, "excess_bytes": excess},
        )
        self._resting.give_from_kv_cache(worker, excess)

    def tick(self, now_s: float) -> None:
        """Give up what other programs took; let a KV cache that is full grow into room that nobody wants."""
        for device in self._cluster.devices.values():
            excess = self._cluster.committed_bytes(device.id) - self._cluster.usable_bytes(device)
            if excess > NOTICED * device.budget_bytes and not self._cluster.is_giving_way(device.id):
                self._relieve(device, excess, now_s)
        for node, spare in list(self._cluster.host_spare_bytes.items()):
            if spare < 0:
                self._relieve_host(node, -spare)
                self._cluster.host_spare_bytes[node] = 0  # until it is measured what that has freed
        if now_s - self._grown_at_s < GROW_INTERVAL_S:
            return
        self._grown_at_s = now_s
        if any(m.job is not None and m.job.stage is Stage.PLACE for m in self._cluster.models.values()):
            return
        for worker in self._cluster.workers.values():
            report, model = worker.report, self._cluster.models[worker.model]
            if worker.state is not WorkerState.READY or report is None or len(worker.parts) != 1:
                continue
            if report.kv_allocated_bytes >= GROWN_WHEN_FULL * worker.kv_cache_bytes > 0:
                self._grow(worker, model)

    def _relieve(self, device: Device, excess: int, now_s: float) -> None:
        """Shrink KV caches, then send idle models away, until what is held fits what other programs left us."""
        why = f"other programs hold {in_words(self._cluster.foreign_bytes.get(device.id, 0))} of {device.id}"
        here = [w for w in self._cluster.workers.values() if w.bytes_on(device.id)]
        for worker in sorted(here, key=spare_bytes, reverse=True):
            if excess > 0 and (spare := min(excess, spare_bytes(worker))) > 0:
                self._resting.resize(worker, worker.kv_cache_bytes - spare, why)
                excess -= spare
        for worker in sorted(here, key=lambda w: w.used_at_s):
            idle = worker.state is WorkerState.READY and not worker.num_requests and now_s >= worker.busy_until_s
            if excess <= 0 or not idle or self._cluster.models[worker.model].pinned:
                continue
            excess -= worker.bytes_on(device.id)
            if self._resting.can_sleep(worker):
                self._resting.put_to_sleep(worker, why)
            else:
                self._retiring.gently(worker, EVICTION_DRAIN_S, why)

    def _relieve_host(self, node: str, excess: int) -> None:
        """Send sleepers away, those first whose bytes save the least waiting."""
        here = [w for w in self._cluster.workers.values() if w.node == node]
        if any(w.state is WorkerState.DRAINING and not w.parts for w in here):
            return  # What they held comes free in a moment, and is measured then.
        view = self._cluster.view(self._runtime.effects.now_s())
        hosts = Hosts(view, model="")
        worth = {holder.id: hosts.worth_of(holder) for holder in view.holders}
        asleep = [w for w in here if w.state is WorkerState.ASLEEP and not self._cluster.models[w.model].pinned]
        for worker in sorted(asleep, key=lambda worker: worth[worker.id]):
            if excess <= 0:
                break
            excess -= worker.sleep_bytes
            self._retiring.gently(worker, EVICTION_DRAIN_S, "other programs need the host memory that it slept in")

    def _grow(self, worker: Worker, model: Model) -> None:
        device = self._cluster.devices.get(worker.parts[0].device)
        if device is None or worker.located is None:
            return
        taken = max(self._cluster.committed_bytes(device.id), self._cluster.occupied_bytes(device.id))
        free = self._cluster.usable_bytes(device) - taken
        want = models.demand(model.spec, worker.located).kv_want_bytes - worker.kv_cache_bytes
        growth = min(want, free // (1 + self._cluster.num_others(model.spec.name)))
        if growth >= LEAST_GROWTH_BYTES:
            self._resting.resize(worker, worker.kv_cache_bytes + growth, "its KV cache was full, and there is room")

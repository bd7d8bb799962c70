"""Taking over the workers of an earlier orchestrator: ready and sleeping ones, and blanks; the others are ended.

Above it: `scheduler.py`. Below it: `watching.py`, `starting.py`, `pool.py`, the effects.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.effects import FoundWorker, Placement
from orchestrator.models import ModelSpec
from orchestrator.pool import Pool
from orchestrator.retiring import EVICTION_DRAIN_S
from orchestrator.runtime import Runtime
from orchestrator.starting import Starting
from orchestrator.state import Model, Worker, WorkerState
from orchestrator.views import Part
from orchestrator.watching import Watching

log = logging.getLogger(__name__)

LOOKS_AGAIN_S = (5.0, 20.0, 70.0)
"""After the first look. What an earlier orchestrator was just starting shows late, and is blank."""

_SOUND = (life.WORKER_STATE_READY, life.WORKER_STATE_DRAINING)
_ADOPTED = (life.WORKER_STATE_READY, life.WORKER_STATE_ASLEEP)


class Adopting:
    """Called by the scheduler's task once it is known who lives."""

    def __init__(self, runtime: Runtime, watching: Watching, starting: Starting, pool: Pool) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._watching = watching
        self._starting = starting
        self._pool = pool
        self._looks_at_s: list[float] = []

    def adopt(self, found: tuple[FoundWorker, ...], *, stored: bool = True) -> None:
        """Take over whom we can place, the newest of each model first; end the others.

        Without knowing what is `stored`, a worker of a model that nobody knows is taken at its word: to end a model
        that serves would be worse.
        """
        now_s = self._runtime.effects.now_s()
        self._looks_at_s = [now_s + later_s for later_s in LOOKS_AGAIN_S]
        for one in sorted(self._strangers(found), key=_generation, reverse=True):  # Newest first.
            self._cluster.generation = max(self._cluster.generation, _generation(one))
            report = one.report
            if not stored and report is not None and report.info.model not in self._cluster.models:
                self._make_known(report.info.model)
            if report is not None and report.state == life.WORKER_STATE_BLANK and not report.generation:
                self._pool.adopt(one.worker_id, one.node, report.pid)
            elif report is not None and (model := self._adoptable(one, report)) is not None:
                self._adopt(model, one, report)
            elif report is not None or one.started:
                self._end(one, report)

    def _strangers(self, found: Sequence[FoundWorker]) -> list[FoundWorker]:
        known = {worker.id for worker in self._cluster.workers.values()} | self._cluster.ending.keys()
        return [one for one in found if one.worker_id not in known and not self._pool.knows(one.worker_id)]

    def tick(self, now_s: float) -> None:
        """Look around once more when it is time."""
        if self._looks_at_s and now_s >= self._looks_at_s[0] and not self._runtime.stopping:
            self._looks_at_s.pop(0)
            self._runtime.run(self._look(last=not self._looks_at_s))

    async def _look(self, *, last: bool) -> None:
        try:
            found = await self._runtime.effects.find_workers()
        except Exception as error:
            log.warning("living workers could not be listed", extra={"error": type(error).__name__})
        else:
            self._runtime.post(events.WorkersSeen(found, last))

    def on_seen(self, event: events.WorkersSeen) -> None:
        """Keep the blanks that have come up meanwhile; in the end, end what still does not answer.

        Others are no business of a later look: they are ours, and may have gone since it was taken.
        """
        for one in self._strangers(event.workers):
            if one.report is None:
                if event.last:
                    self._end(one, None)
            elif one.report.state == life.WORKER_STATE_BLANK and not one.report.generation:
                self._pool.adopt(one.worker_id, one.node, one.report.pid)

    def _make_known(self, name: str) -> None:
        if name:
            self._cluster.models[name] = Model(ModelSpec(name, name, configured=False))

    def _adoptable(self, one: FoundWorker, report: life.WatchResponse) -> Model | None:
        model = self._cluster.models.get(report.info.model)
        if model is None or report.state not in _ADOPTED or (one.placement is not None and one.placement.fenced):
            return None
        if one.node and one.placement is None:
            return None  # On another machine, and nobody knows on which of its devices.
        parts = one.placement.parts if one.placement else ()
        if any(device not in self._cluster.devices for device, _ in parts):
            return None
        started = model.job is not None and model.job.stage.started
        num_adopted = sum(1 for worker in self._cluster.workers.values() if worker.model == model.spec.name)
        return None if started or num_adopted >= model.spec.max_replicas else model

    def _end(self, one: FoundWorker, report: life.WatchResponse | None) -> None:
        """End a process; one that is sound may finish what runs in it."""
        log.warning("ending a worker that cannot be adopted", extra={"worker": one.worker_id})
        placement = one.placement or (self._guess(one, report) if report is not None else None)
        if placement is not None:
            self._cluster.ending[one.worker_id] = placement
        sound = report is not None and report.state in _SOUND and not (placement is not None and placement.fenced)
        self._runtime.run(self._end_effect(one.worker_id, report.generation if report and sound else 0))

    async def _end_effect(self, worker_id: str, generation: int) -> None:
        if generation:
            try:
                await self._runtime.effects.drain(worker_id, generation, EVICTION_DRAIN_S)
            except HostlerError as error:
                log.info("a worker did not drain", extra={"worker": worker_id, "error": error.message})
            except Exception:
                log.exception("draining a worker failed", extra={"worker": worker_id})
        await self._runtime.kill(worker_id)
        self._runtime.post(events.Ended(worker_id))

    def on_ended(self, event: events.Ended) -> bool:
        """Free what a process held that is gone now. Return whether it held anything."""
        ended = self._cluster.ending.pop(event.worker_id, None)
        if ended is not None:
            self._runtime.remember()
        return ended is not None

    def _adopt(self, model: Model, one: FoundWorker, report: life.WatchResponse) -> None:
        asleep = report.state == life.WORKER_STATE_ASLEEP
        placement = one.placement or self._guess(one, report)
        parts = () if asleep else tuple(Part(device, num_bytes) for device, num_bytes in placement.parts)
        # It may have been told to grow, and the last orchestrator did not live to remember it.
        grown_bytes = 0 if asleep else max(0, report.kv_reserved_bytes - placement.kv_cache_bytes)
        if len(parts) == 1:
            parts = (Part(parts[0].device, parts[0].num_bytes + grown_bytes),)
        device = self._cluster.devices.get(parts[0].device) if parts else None
        worker = Worker(
            id=one.worker_id,
            model=model.spec.name,
            generation=report.generation,
            parts=parts,
            kv_cache_bytes=0 if asleep else placement.kv_cache_bytes + grown_bytes,
            reason=placement.reason,
            kv_keep_bytes=placement.kv_keep_bytes,
            kind=device.kind if device else self._cluster.kind_for(model.spec),
            node=placement.node,
            address=self._runtime.effects.address(one.worker_id),
            pid=report.pid,
            loaded_unix_ms=placement.loaded_unix_ms,
            max_running=report.max_running or model.spec.max_running,
            sleep_bytes=report.host_bytes if asleep else 0,
            recipe=placement.recipe,
            report=report,
        )
        self._cluster.workers[worker.generation] = worker
        if device is not None:
            self._cluster.grow_budget(device.id, report.resident_bytes)
        if report.info.ByteSize():
            model.info = report.info
        if model.job is not None:
            self._runtime.cancel(model.job.generation)
            model.job = None
        log.info("adopted a worker", extra={"worker": worker.id, "model": model.spec.name})
        self._runtime.journal.note(
            pb.EVENT_KIND_ADOPTED,
            placement.reason,
            model=worker.model,
            device=worker.devices,
            replica=worker.id,
            num_bytes=worker.reserved_bytes,
        )
        self._watching.start(worker)
        if asleep:
            worker.state = WorkerState.ASLEEP
            worker.used_at_s = self._runtime.effects.now_s()
            self._runtime.publish()
        else:
            self._starting.ready(model, worker)

    def _guess(self, one: FoundWorker, report: life.WatchResponse) -> Placement:
        device = next(iter(self._cluster.devices), "")
        num_bytes = report.info.weight_bytes + report.kv_reserved_bytes
        reason = "adopted from an earlier orchestrator"
        return Placement(
            one.worker_id,
            report.generation,
            report.info.model,
            ((device, num_bytes),),
            report.kv_reserved_bytes,
            reason,
            loaded_unix_ms=0,
        )


def _generation(one: FoundWorker) -> int:
    reported = one.report.generation if one.report else 0
    return max(reported, one.placement.generation if one.placement else 0)

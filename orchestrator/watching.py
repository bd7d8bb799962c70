"""Keeping an eye on workers: heartbeats, frozen and hung ones, deaths, and adoption after a restart.

Above it: `scheduler.py`. Below it: `loading.py` for replacements, `retiring.py` for fencing, the effects.

A silent worker is frozen; a busy one whose step counter stands still is hung; a broken stream is a death.
All three end alike: off the routes first, then killed, then replaced under a new generation.
"""

from __future__ import annotations

import logging

from hostler.errors import HostlerError, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from orchestrator import events
from orchestrator.effects import FoundWorker
from orchestrator.loading import Loading
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Model, Worker, WorkerState

log = logging.getLogger(__name__)

SILENCE_S = 2.0
LOADING_SILENCE_S = 20.0
"""While it imports and loads, a worker may hold the interpreter lock for seconds."""
DEATHS_WINDOW_S = 60.0
MAX_DEATHS = 3
OWN_STALL_S = 1.0
"""A tick that comes later than this after the last one tells of our own stall, not of the workers' silence."""
STALL_COUNTS_S = 0.5
"""How much of such a stall counts all the same. Were it nothing, an orchestrator that is starved for long (every tick
late) would never notice a frozen worker; so it takes a few late ticks in a row with nothing heard between them."""


class Watching:
    """Judges workers by what they say and by what they do not say."""

    def __init__(self, runtime: Runtime, loading: Loading, retiring: Retiring) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._loading = loading
        self._retiring = retiring
        self._ticked_at_s = runtime.effects.now_s()

    def start(self, worker: Worker) -> None:
        """Begin to listen to a worker."""
        worker.heard_at_s = self._effects.now_s()
        self._runtime.run(self._listen(worker), worker.generation)

    async def _listen(self, worker: Worker) -> None:
        try:
            async for report in self._effects.watch(worker.id, worker.generation):
                self._runtime.post(events.Reported(worker.generation, report))
            why = "its heartbeat stream was closed"
        except HostlerError as error:
            why = f"its heartbeat stream broke: {error.message}"
        except Exception as error:
            log.exception("listening to a worker failed", extra={"worker": worker.id})
            why = f"its heartbeat stream broke ({type(error).__name__})"
        self._runtime.post(events.WatchEnded(worker.generation, why))

    # ------------------------------------------------------------ what workers say

    def on_reported(self, event: events.Reported) -> None:
        """Take a heartbeat in; a fenced worker's, or one of another generation, changes nothing."""
        worker, report = self._cluster.workers.get(event.generation), event.report
        if worker is None or worker.state is WorkerState.LOST or report.generation != worker.generation:
            return
        now_s = self._effects.now_s()
        before, was_busy = worker.report, worker.num_requests > 0
        worker.report, worker.pid, worker.heard_at_s = report, report.pid or worker.pid, now_s
        busy = worker.num_requests > 0
        stepped = before is None or before.num_steps != report.num_steps
        if stepped or not busy or not was_busy:
            worker.advanced_at_s = now_s
        if busy or (before is not None and stepped):
            worker.used_at_s, worker.used_unix_ms, worker.hold_until_s = now_s, self._effects.unix_ms(), 0.0
        if report.max_running and report.max_running != worker.max_running:
            worker.max_running = report.max_running
            self._runtime.publish()
        if report.state == life.WORKER_STATE_FAILED and worker.state is not WorkerState.LOADING:
            self.lost(worker, f"it failed: {report.failure}")
        elif was_busy and not busy:
            self._loading.place_waiting()

    def on_watch_ended(self, event: events.WatchEnded) -> None:
        """Replace a worker whose stream broke. A draining one was asked to end; its drain also kills it."""
        worker = self._cluster.workers.get(event.generation)
        if worker is not None and worker.state is not WorkerState.DRAINING:
            self.lost(worker, event.why)

    def tick(self, now_s: float) -> None:
        """Judge silence and standstill."""
        stalled_s = now_s - self._ticked_at_s
        self._ticked_at_s = now_s
        if stalled_s > OWN_STALL_S:
            # We were frozen ourselves, or starved; the silence is ours, not the workers'.
            for worker in self._cluster.workers.values():
                if worker.heard_at_s:
                    worker.heard_at_s = min(now_s, worker.heard_at_s + stalled_s - STALL_COUNTS_S)
                worker.advanced_at_s = min(now_s, worker.advanced_at_s + stalled_s - STALL_COUNTS_S)
        for worker in list(self._cluster.workers.values()):
            if worker.state is WorkerState.LOST or not worker.heard_at_s:
                continue
            limit_s = LOADING_SILENCE_S if worker.state is WorkerState.LOADING else SILENCE_S
            if now_s - worker.heard_at_s > limit_s:
                self.lost(worker, f"it said nothing for {limit_s:g} s")
            elif worker.num_requests and now_s - worker.advanced_at_s > self._runtime.config.step_budget_s:
                self.lost(worker, f"it hung: busy without a step for {self._runtime.config.step_budget_s:g} s")

    def lost(self, worker: Worker, why: str) -> None:
        """Fence and kill a worker, then bring up what it was there for."""
        before = worker.state
        if before is WorkerState.LOST:
            return
        self._retiring.at_once(worker, why)
        model = self._cluster.models[worker.model]
        if before is WorkerState.LOADING and model.job is not None and model.job.generation == worker.generation:
            self._loading.attempt_failed(model, model.job, WorkerLost(f"its worker was lost while loading ({why})"))
        elif before is WorkerState.READY:
            self._replace(model, why)

    def _replace(self, model: Model, why: str) -> None:
        now_s = self._effects.now_s()
        model.deaths_s.append(now_s)
        num_deaths = sum(1 for death_s in model.deaths_s if now_s - death_s <= DEATHS_WINDOW_S)
        if num_deaths >= MAX_DEATHS:
            model.wanted = False
            model.failure = f"{model.spec.name} died {num_deaths} times within {DEATHS_WINDOW_S:g} s; last: {why}"
            log.error("a model dies again and again", extra={"model": model.spec.name, "num_deaths": num_deaths})
            self._runtime.publish()
            return
        model.wanted = True
        self._loading.start(model, delay_s=float(num_deaths - 1))

    # ------------------------------------------------------------ adoption

    def adopt(self, found: tuple[FoundWorker, ...]) -> None:
        """Take over the workers of the last orchestrator that are ready; end the others."""
        ours = {worker.id for worker in self._cluster.workers.values()}
        found = tuple(one for one in found if one.worker_id not in ours)
        best: dict[str, FoundWorker] = {}
        for one in found:
            model = self._adoptable(one)
            rival = best.get(model) if model else None
            if model and (rival is None or _generation(rival) < _generation(one)):
                best[model] = one
        chosen = {one.worker_id for one in best.values()}
        for one in found:
            self._cluster.generation = max(self._cluster.generation, _generation(one))
            if one.worker_id not in chosen:
                log.warning("ending a worker that cannot be adopted", extra={"worker": one.worker_id})
                self._runtime.run(self._effects.kill(one.worker_id))
        for name, one in best.items():
            self._adopt(self._cluster.models[name], one)

    def _adoptable(self, one: FoundWorker) -> str | None:
        if one.report is None or one.report.state != life.WORKER_STATE_READY:
            return None
        model = self._cluster.models.get(one.report.info.model)
        placed = one.placement.device if one.placement else next(iter(self._cluster.devices), "")
        if model is None or placed not in self._cluster.devices:
            return None
        started = model.job is not None and model.job.stage.started
        return None if started else model.spec.name

    def _adopt(self, model: Model, one: FoundWorker) -> None:
        report, placement = one.report, one.placement
        if report is None:
            return
        estimated_bytes = report.info.weight_bytes + report.kv_reserved_bytes
        worker = Worker(
            id=one.worker_id,
            model=model.spec.name,
            generation=report.generation,
            device=placement.device if placement else next(iter(self._cluster.devices)),
            reserved_bytes=placement.reserved_bytes if placement else estimated_bytes,
            reason=placement.reason if placement else "adopted from an earlier orchestrator",
            address=self._effects.address(one.worker_id),
            pid=report.pid,
            loaded_unix_ms=placement.loaded_unix_ms if placement else 0,
            max_running=report.max_running or model.spec.max_running,
            report=report,
        )
        self._cluster.workers[worker.generation] = worker
        self._cluster.grow_budget(worker.device, report.resident_bytes)
        if report.info.ByteSize():
            model.info = report.info
        if model.job is not None:
            self._runtime.cancel(model.job.generation)
            model.job = None
        log.info("adopted a worker", extra={"worker": worker.id, "model": model.spec.name})
        self.start(worker)
        self._loading.ready(model, worker)


def _generation(one: FoundWorker) -> int:
    reported = one.report.generation if one.report else 0
    return max(reported, one.placement.generation if one.placement else 0)

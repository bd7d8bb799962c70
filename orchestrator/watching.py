"""Keeping an eye on workers: heartbeats, frozen and hung ones, deaths.

Above it: `scheduler.py`, `adopting.py`. Below it: `loading.py` for replacements, `retiring.py` for fencing,
`accounting.py` for what they hold, the effects.

A broken stream is a death, or a process that was stopped: its connection's keepalive fails within 2.5 s. A silent one
whose connection still answers has something that holds the interpreter lock (building a grammar's tokenizer takes
seconds), and gets time; a busy one whose step counter stands still is hung. All end alike: off the routes first, then
killed, then replaced under a new generation.
"""

from __future__ import annotations

import logging

from hostler.errors import HostlerError, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.accounting import Accounting
from orchestrator.loading import Loading
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Model, Stage, Worker, WorkerState

log = logging.getLogger(__name__)

SILENCE_S = 20.0
"""gRPC's own threads answer keepalives while Python code cannot run, so silence alone proves nothing for a while."""
RATE_OVER_S = 3.0
"""Tokens a second are told as a mean over about so long."""
DEATHS_WINDOW_S = 60.0
MAX_DEATHS = 3
OWN_STALL_S = 1.0
"""A tick that comes later than this after the last one tells of our own stall, not of the workers' silence."""
STALL_COUNTS_S = 0.5
"""How much of such a stall counts all the same. Were it nothing, an orchestrator that is starved for long (every tick
late) would never notice a frozen worker; so it takes a few late ticks in a row with nothing heard between them."""


class Watching:
    """Judges workers by what they say and by what they do not say."""

    def __init__(self, runtime: Runtime, loading: Loading, retiring: Retiring, accounting: Accounting) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._loading = loading
        self._retiring = retiring
        self._accounting = accounting
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
        before, was_busy, heard_at_s = worker.report, worker.num_requests > 0, worker.heard_at_s
        worker.report, worker.pid, worker.heard_at_s = report, report.pid or worker.pid, now_s
        busy = worker.num_requests > 0
        stepped = before is None or before.num_steps != report.num_steps
        if stepped or not busy or not was_busy:
            worker.advanced_at_s = now_s
        if busy or (before is not None and stepped):
            worker.used_at_s, worker.used_unix_ms, worker.busy_until_s = now_s, self._effects.unix_ms(), 0.0
        if before is not None:
            self._count(worker, before, report, now_s - heard_at_s)
        self._accounting.on_heartbeat(worker)
        if report.max_running and report.max_running != worker.max_running:
            worker.max_running = report.max_running
            self._runtime.publish()
        if report.state == life.WORKER_STATE_FAILED and worker.state is not WorkerState.LOADING:
            self.lost(worker, f"it failed: {report.failure}")
        elif was_busy and not busy:
            self._loading.place_waiting()

    def _count(self, worker: Worker, before: life.WatchResponse, report: life.WatchResponse, passed_s: float) -> None:
        """Count uses and tokens since the last heartbeat."""
        model = self._cluster.models[worker.model]
        if report.num_prompt_tokens_total > before.num_prompt_tokens_total:
            model.reuse.seen(self._effects.now_s())
        if report.HasField("keep_alive_ms"):
            model.keep_alive_s = report.keep_alive_ms / 1000
        if passed_s > 0:
            num_tokens = max(0, report.num_completion_tokens_total - before.num_completion_tokens_total)
            share = min(1.0, passed_s / RATE_OVER_S)
            worker.tokens_per_s += share * (num_tokens / passed_s - worker.tokens_per_s)

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
            if now_s - worker.heard_at_s > SILENCE_S:
                self.lost(worker, f"it said nothing for {SILENCE_S:g} s")
            elif worker.num_requests and now_s - worker.advanced_at_s > self._runtime.config.step_budget_s:
                self.lost(worker, f"it hung: busy without a step for {self._runtime.config.step_budget_s:g} s")

    def lost(self, worker: Worker, why: str) -> None:
        """Fence and kill a worker, then bring up what it was there for."""
        before = worker.state
        if before is WorkerState.LOST:
            return
        found = self._cluster.job_of_worker(worker)
        self._runtime.journal.note(
            pb.EVENT_KIND_LOST,
            why,
            model=worker.model,
            device=worker.devices,
            replica=worker.id,
            num_bytes=worker.reserved_bytes,
        )
        if found is None or found[1].stage is not Stage.SPAWN:  # Else it has no process yet: the pool's serves others.
            self._retiring.at_once(worker, why)
        if found is not None:
            what = "waking" if before is WorkerState.WAKING else "loading"
            self._loading.attempt_failed(*found, WorkerLost(f"its worker was lost while {what} ({why})"))
        elif before is WorkerState.READY:
            self._replace(self._cluster.models[worker.model], why)

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
        further = bool(self._cluster.ready(model.spec.name))
        model.wanted = model.wanted or not further
        self._loading.start(model, delay_s=float(num_deaths - 1), replica=further)

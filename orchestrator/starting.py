"""The part of a load that has a worker: spawn or claim, load, wake, until it is ready.

Above it: `loading.py`, which decides when, and what a failure means. Below it: `pool.py` for blank workers, effects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hostler.errors import HostlerError, Internal, Unavailable
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import devices, events, models
from orchestrator.placing import Placing
from orchestrator.pool import Pool
from orchestrator.runtime import Runtime
from orchestrator.state import Job, Model, Progress, Stage, Worker, WorkerState
from orchestrator.views import Plan

log = logging.getLogger(__name__)

HOLD_AFTER_READY_S = 2.0
"""A replica counts as busy for so long after callers were given it: they are on their way."""


class Starting:
    """Every method is called by the scheduler's task and returns at once.

    Attributes:
        on_failed: what to do when an attempt fails; set by `loading.py`.
        on_ready: what to do when a worker has come up; set by `loading.py`.
        on_worker: called with each worker that begins to load; set by the scheduler, which has it watched.
    """

    def __init__(self, runtime: Runtime, placing: Placing, pool: Pool) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._placing = placing
        self._pool = pool
        pool.on_ordered = self._on_ordered
        self.on_failed: Callable[[Model, Job, HostlerError], None] = lambda model, job, error: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_worker: Callable[[Worker], None] = lambda worker: None

    def begin(self, model: Model, job: Job, plan: Plan) -> None:
        """Start a worker for the job, or wake the one that the plan names. The room is there."""
        if plan.wake:
            self._wake(model, job, plan)
        else:
            self._spawn(model, job, plan)

    # ------------------------------------------------------------ spawn and load

    def _spawn(self, model: Model, job: Job, plan: Plan) -> None:
        device = self._cluster.devices[plan.parts[0].device]
        blank = self._pool.take(device.node) or self._pool.order(device.node, job.generation)
        context_bytes = models.context_bytes(model.spec, (job.located or models.NOWHERE).footprint)
        worker = Worker(
            id=blank.id,
            model=model.spec.name,
            generation=job.generation,
            parts=plan.parts,
            kv_cache_bytes=plan.kv_cache_bytes,
            kv_keep_bytes=min(plan.kv_cache_bytes, context_bytes),
            kind=device.kind,
            reason=plan.reason,
            node=device.node,
            home=frozenset(part.device for part in plan.parts),
            located=job.located,
            recipe=models.recipe(model.spec),
            address=self._effects.address(blank.id),
            max_running=model.spec.max_running,
            sleep_bytes=self._placing.demand(model, job.located or models.NOWHERE).sleep_bytes or 0,
        )
        job.worker = worker.generation
        job.began_at_s = self._effects.now_s()
        self._cluster.workers[worker.generation] = worker
        self._placing.note_placed(model, worker, plan)
        if blank.pid:
            self._load(model, job, worker, blank.pid)
            return
        job.stage = Stage.SPAWN
        self._runtime.remember()
        model.tell(Progress("spawn", plan.reason, eta_s=plan.expected_s))
        self._runtime.publish()

    def give_back(self, worker: Worker) -> None:
        """Leave the process that a load has waited for to the next one. It holds nothing yet."""
        self._pool.release(worker.generation)
        self._cluster.workers.pop(worker.generation, None)
        self._runtime.remember()

    def _on_ordered(self, generation: int, pid: int, error: HostlerError | None) -> None:
        """Have the blank worker that was waited for load its model."""
        found, worker = self._cluster.job(generation), self._cluster.workers.get(generation)
        if found is None or worker is None or found[1].stage is not Stage.SPAWN:
            raise Internal("A blank worker was started for a load that is over.")
        if error is not None:
            self.on_failed(*found, error)
        else:
            self._load(*found, worker, pid)

    def _load(self, model: Model, job: Job, worker: Worker, pid: int) -> None:
        job.stage = Stage.LOAD
        worker.pid, worker.address = pid, self._effects.address(worker.id)
        self._runtime.remember()
        job.advanced_at_s = worker.heard_at_s = self._effects.now_s()
        eta_s = self._cluster.experience.expect(model.spec, worker.located, worker.kind).load_s
        model.tell(Progress("spawn", worker.reason, eta_s=eta_s))
        self._runtime.publish()
        self._runtime.run_stage(
            job, self._load_effect(model, job, worker), lambda e: events.LoadDone(job.generation, error=e)
        )
        self.on_worker(worker)

    async def _load_effect(self, model: Model, job: Job, worker: Worker) -> None:
        if job.located is None or job.plan is None:
            raise Internal("A load was started without a plan.")
        placed = [self._cluster.devices[part.device] for part in worker.parts]

        def report(progress: Progress) -> None:
            self._runtime.post(events.Progressed(job.generation, progress))

        located = job.located
        if model.spec.has_files and located.node != worker.node:
            located = await self._effects.bring(model.spec, worker.node, report)
        request = models.load_request(
            model.spec,
            located,
            devices=devices.worker_devices(placed),
            environment=devices.worker_env(placed, placed[0].num_cores or devices.num_physical_cores()),
            kv_cache_bytes=job.plan.kv_cache_bytes,
            shelf=self._placing.shelf(job.plan),
        )
        info = await self._effects.load(worker.id, worker.generation, request, report)
        self._runtime.post(events.LoadDone(worker.generation, info))

    def on_load_done(self, event: events.LoadDone) -> None:
        """Put the worker on the routes and let everybody go to it."""
        found, worker = self._cluster.job(event.generation), self._cluster.workers.get(event.generation)
        if found is None or worker is None or found[1].stage is not Stage.LOAD:
            return
        model, job = found
        if event.error is not None:
            self.on_failed(model, job, event.error)
            return
        took_s, plan = self._effects.now_s() - job.began_at_s, job.plan
        taken = plan is not None and bool(plan.take_over)
        self._runtime.learn(model.spec, worker, **{"hand_over_s" if taken else "load_s": took_s})
        model.job, model.info = None, event.info
        if plan is not None:
            self._placing.dismiss(plan, f"{worker.devices} has taken over what it held")
        self.ready(model, worker, took_s)

    # ------------------------------------------------------------ wake

    def _wake(self, model: Model, job: Job, plan: Plan) -> None:
        worker = next((w for w in self._cluster.workers.values() if w.id == plan.wake), None)
        if worker is None or worker.state is not WorkerState.ASLEEP:
            job.plan = None  # It died, or was sent away, meanwhile.
            return
        worker.state, worker.parts, worker.kv_cache_bytes = WorkerState.WAKING, plan.parts, plan.kv_cache_bytes
        worker.kv_keep_bytes = min(plan.kv_cache_bytes, worker.kv_keep_bytes or plan.kv_cache_bytes)
        worker.reason = plan.reason
        job.stage, job.worker = Stage.WAKE, worker.generation
        job.began_at_s = job.advanced_at_s = worker.advanced_at_s = self._effects.now_s()
        self._placing.note_placed(model, worker, plan)
        self._runtime.remember()
        eta_s = self._cluster.experience.expect(model.spec, worker.located, worker.kind).wake_s
        model.tell(Progress("wake", plan.reason, eta_s=eta_s))
        self._runtime.publish()
        self._runtime.run_stage(job, self._wake_effect(job, worker), lambda e: events.WakeDone(job.generation, e))

    async def _wake_effect(self, job: Job, worker: Worker) -> None:
        placed = [self._cluster.devices[part.device] for part in worker.parts]
        await self._effects.wake(worker.id, worker.generation, devices.worker_devices(placed), worker.kv_cache_bytes)
        self._runtime.post(events.WakeDone(job.generation))

    def on_wake_done(self, event: events.WakeDone) -> None:
        """Put the worker on the routes again; one that cannot wake is replaced by a load."""
        found = self._cluster.job(event.generation)
        if found is None or found[1].stage is not Stage.WAKE:
            return
        model, job = found
        worker = self._cluster.workers[job.worker]
        if event.error is not None:
            self.on_failed(model, job, Unavailable(f"it could not be woken: {event.error.message}"))
            return
        took_s = self._effects.now_s() - job.began_at_s
        self._runtime.learn(model.spec, worker, wake_s=took_s)
        model.job = None
        self.ready(model, worker, took_s)

    def ready(self, model: Model, worker: Worker, took_s: float = 0.0) -> None:
        """Make a worker the model's replica."""
        now_s = self._effects.now_s()
        worker.state = WorkerState.READY
        worker.loaded_unix_ms = worker.loaded_unix_ms or self._effects.unix_ms()
        worker.used_at_s, worker.used_unix_ms = now_s, self._effects.unix_ms()
        worker.advanced_at_s = worker.ready_at_s = now_s
        if model.waiters:
            worker.busy_until_s = now_s + HOLD_AFTER_READY_S
        model.failure, model.num_failures, model.retry_at_s = "", 0, 0.0
        log.info("a model is ready", extra={"model": model.spec.name, "worker": worker.id, "device": worker.devices})
        self._runtime.journal.note(
            pb.EVENT_KIND_READY,
            worker.reason,
            model=worker.model,
            device=worker.devices,
            replica=worker.id,
            num_bytes=worker.reserved_bytes,
            duration_s=took_s,
        )
        waiters, model.waiters = model.waiters, []
        self._runtime.remember()
        self._runtime.publish()
        for waiter in waiters:
            waiter.succeed(worker)
        self.on_ready()

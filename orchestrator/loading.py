"""Bringing a model up: locate → fetch → place → spawn → load, one attempt at a time, shared by all who wait.

Above it: `scheduler.py` (requests) and `watching.py` (replacements). Below it: the policy, the effects,
`retiring.py` for whoever must make room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from hostler.errors import (
    HostlerError,
    Internal,
    InvalidRequest,
    ModelLoadFailed,
    ModelNeverFits,
    ModelNotFound,
    Unavailable,
)

from orchestrator import devices, events, models, policy
from orchestrator.retiring import EVICTION_DRAIN_S, Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Job, Model, Progress, Stage, Worker, WorkerState

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
ATTEMPT_DELAYS_S = (0.0, 0.5, 2.0)
FAILURE_MEMORY_S = 5.0
FAILURE_MEMORY_MAX_S = 60.0
HOLD_AFTER_READY_S = 2.0
LOAD_STALL_S = 300.0
"""A load that shows no progress for this long is given up; a healthy one reports every file or shard."""


class Loading:
    """Carries jobs through their stages. Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, retiring: Retiring) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._retiring = retiring

    # ------------------------------------------------------------ start and end

    def start(self, model: Model, *, attempt: int = 1, delay_s: float = 0.0) -> None:
        """Begin an attempt unless one is under way. A new attempt has a new generation."""
        if model.job is not None or self._runtime.stopping:
            return
        now_s = self._effects.now_s()
        job = Job(self._runtime.next_generation(), model.spec.name, attempt, advanced_at_s=now_s)
        model.job = job
        if delay_s > 0:
            job.stage, job.not_before_s = Stage.BACKOFF, now_s + delay_s
            model.tell(Progress("queue", f"attempt {attempt} of {MAX_ATTEMPTS} in {delay_s:g} s"))
        else:
            self._locate(model, job)
        self._runtime.publish()

    def drop(self, model: Model) -> None:
        """Give up the job of a model, whatever its stage; a worker that belongs to it is killed."""
        job, model.job = model.job, None
        if job is None:
            return
        self._runtime.cancel(job.generation)
        if (worker := self._cluster.workers.get(job.generation)) is not None:
            self._retiring.at_once(worker, "its load was given up")
        self._runtime.publish()
        self.place_waiting()

    def fail(self, model: Model, error: HostlerError) -> None:
        """End every wait for a model with `error`, and remember it for a while."""
        self.drop(model)
        model.num_failures += 1
        memory_s = min(FAILURE_MEMORY_MAX_S, FAILURE_MEMORY_S * 2 ** (model.num_failures - 1))
        model.retry_at_s = self._effects.now_s() + memory_s
        model.failure = error.message
        log.error("a model could not be brought up", extra={"model": model.spec.name, "error": error.message})
        waiters, model.waiters = model.waiters, []
        for waiter in waiters:
            waiter.fail(error)
        self._runtime.publish()

    def tick(self, now_s: float) -> None:
        """Start attempts whose delay is over; give up loads that stand still."""
        for model in self._cluster.models.values():
            job = model.job
            if job is None:
                continue
            if job.stage is Stage.BACKOFF and now_s >= job.not_before_s:
                self._locate(model, job)
            elif job.stage is Stage.LOAD and now_s - job.advanced_at_s > LOAD_STALL_S:
                self.attempt_failed(model, job, Unavailable(f"loading made no progress for {LOAD_STALL_S:g} s"))

    def attempt_failed(self, model: Model, job: Job, error: HostlerError) -> None:
        """End one attempt; try again, or fail the model when it was the last or can never succeed."""
        hopeless = isinstance(error, InvalidRequest | ModelNotFound | ModelLoadFailed)
        if hopeless or job.attempt >= MAX_ATTEMPTS or not (model.waiters or model.wanted):
            if not isinstance(error, InvalidRequest | ModelNotFound):
                tries = "" if job.attempt == 1 else f" after {job.attempt} attempts"
                error = ModelLoadFailed(f"{model.spec.name} could not be loaded{tries}: {error.message}")
            self.fail(model, error)
            return
        log.warning(
            "an attempt to load failed",
            extra={"model": model.spec.name, "attempt": job.attempt, "error": error.message},
        )
        self.drop(model)
        self.start(model, attempt=job.attempt + 1, delay_s=ATTEMPT_DELAYS_S[job.attempt])

    # ------------------------------------------------------------ locate and fetch

    def _locate(self, model: Model, job: Job) -> None:
        job.stage = Stage.LOCATE
        if not model.spec.has_files:
            self._place(model, job, models.Located("", models.Footprint()))
            return
        self._run(job, self._locate_effect(model, job), lambda e: events.LocateDone(job.generation, None, e))

    async def _locate_effect(self, model: Model, job: Job) -> None:
        located = await self._effects.locate(model.spec)
        self._runtime.post(events.LocateDone(job.generation, located))

    def on_locate_done(self, event: events.LocateDone) -> None:
        """Place a model whose files are here; fetch a configured one whose files are not."""
        if (found := self._cluster.job(event.generation)) is None or found[1].stage is not Stage.LOCATE:
            return
        model, job = found
        if event.error is not None:
            self.attempt_failed(model, job, event.error)
        elif event.located is not None:
            self._place(model, job, event.located)
        elif job.fetched or not model.spec.configured:
            self.fail(model, ModelLoadFailed(f"The files of {model.spec.name} are not in the store."))
        else:
            job.stage = Stage.FETCH
            model.tell(Progress("download", f"fetching {model.spec.source}"))
            self._runtime.publish()
            self._run(job, self._fetch_effect(model, job), lambda e: events.FetchDone(job.generation, e))

    async def _fetch_effect(self, model: Model, job: Job) -> None:
        await self._effects.fetch(model.spec, lambda p: self._runtime.post(events.Progressed(job.generation, p)))
        self._runtime.post(events.FetchDone(job.generation))

    def on_fetch_done(self, event: events.FetchDone) -> None:
        """Look again; a failed fetch ends the wait at once: the store has already retried what can be."""
        if (found := self._cluster.job(event.generation)) is None or found[1].stage is not Stage.FETCH:
            return
        model, job = found
        if event.error is not None:
            known = isinstance(event.error, InvalidRequest | ModelNotFound)
            message = f"{model.spec.name} could not be fetched: {event.error.message}"
            self.fail(model, event.error if known else ModelLoadFailed(message))
            return
        job.fetched = True
        self._locate(model, job)
        self._runtime.publish()

    def on_progressed(self, event: events.Progressed) -> None:
        """Relay progress to everybody who waits."""
        if (found := self._cluster.job(event.generation)) is not None:
            found[1].advanced_at_s = self._effects.now_s()
            found[0].tell(event.progress)

    # ------------------------------------------------------------ place

    def _place(self, model: Model, job: Job, located: models.Located) -> None:
        job.located, job.stage = located, Stage.PLACE
        self.place_waiting()

    def demand(self, model: Model, footprint: models.Footprint) -> policy.Demand:
        """Return what a model asks of the policy now."""
        return models.demand(model.spec, footprint, num_others=self._cluster.num_others(model.spec.name))

    def place_waiting(self) -> None:
        """Plan and start, oldest first, every load that the memory allows now."""
        waiting = [m for m in self._cluster.models.values() if m.job is not None and m.job.stage is Stage.PLACE]
        for model in sorted(waiting, key=lambda m: m.job.generation if m.job else 0):
            job = model.job
            if job is None or job.stage is not Stage.PLACE:
                continue  # An earlier one's failure may have dropped it.
            if job.plan is None:
                self._decide(model, job)
            if job.plan is not None and model.job is job:
                self._spawn_if_there_is_room(model, job, job.plan)

    def _decide(self, model: Model, job: Job) -> None:
        if job.located is None:
            return
        demand = self.demand(model, job.located.footprint)
        answer = policy.plan(self._cluster.view(self._effects.now_s()), demand)
        if isinstance(answer, policy.Plan):
            # From here on the ledger counts the promise, so no other load can take the room.
            job.plan = answer
            by_id = {worker.id: worker for worker in self._cluster.workers.values()}
            for worker_id in answer.evict:
                model.tell(Progress("evict", answer.reason))
                self._retiring.gently(by_id[worker_id], EVICTION_DRAIN_S)
        elif answer.obstacle is policy.Obstacle.NEVER:
            self.fail(model, ModelNeverFits(f"{answer.reason}.", param="model"))
        elif answer.obstacle is policy.Obstacle.PINNED:
            self.fail(model, ModelLoadFailed(f"{answer.reason}."))
        else:
            model.tell(Progress("queue", answer.reason))

    def _spawn_if_there_is_room(self, model: Model, job: Job, plan: policy.Plan) -> None:
        device = self._cluster.devices[plan.device]
        room_bytes = self._cluster.usable_bytes(device) - self._cluster.occupied_bytes(device.id)
        if plan.needed_bytes > room_bytes:
            return  # Those who were told to go have not gone yet.
        job.stage = Stage.SPAWN
        worker_id = self._effects.new_worker_id()
        worker = Worker(
            id=worker_id,
            model=model.spec.name,
            generation=job.generation,
            device=device.id,
            reserved_bytes=plan.needed_bytes,
            reason=plan.reason,
            address=self._effects.address(worker_id),
            max_running=model.spec.max_running,
        )
        self._cluster.workers[worker.generation] = worker
        self._runtime.remember()
        model.tell(Progress("spawn", plan.reason))
        self._runtime.publish()
        self._run(job, self._spawn_effect(worker, device), lambda e: events.SpawnDone(job.generation, error=e))

    # ------------------------------------------------------------ spawn and load

    async def _spawn_effect(self, worker: Worker, device: devices.Device) -> None:
        pid = await self._effects.spawn(worker.id, worker.generation, device)
        self._runtime.post(events.SpawnDone(worker.generation, pid))

    def on_spawn_done(self, event: events.SpawnDone) -> Worker | None:
        """Have the blank worker load its model; return it, to be watched from now on."""
        found, worker = self._cluster.job(event.generation), self._cluster.workers.get(event.generation)
        if found is None or worker is None or found[1].stage is not Stage.SPAWN:
            return None
        model, job = found
        if event.error is not None:
            self.attempt_failed(model, job, event.error)
            return None
        job.stage = Stage.LOAD
        worker.pid = event.pid
        self._runtime.remember()
        job.advanced_at_s = worker.heard_at_s = self._effects.now_s()
        self._run(job, self._load_effect(model, job, worker), lambda e: events.LoadDone(job.generation, error=e))
        return worker

    async def _load_effect(self, model: Model, job: Job, worker: Worker) -> None:
        if job.located is None or job.plan is None:
            raise Internal("A load was started without a plan.")
        device = self._cluster.devices[worker.device]
        request = models.load_request(
            model.spec,
            job.located,
            device=devices.worker_device(device),
            kv_cache_bytes=job.plan.kv_cache_bytes,
        )
        info = await self._effects.load(
            worker.id,
            worker.generation,
            request,
            lambda p: self._runtime.post(events.Progressed(job.generation, p)),
        )
        self._runtime.post(events.LoadDone(worker.generation, info))

    def on_load_done(self, event: events.LoadDone) -> None:
        """Put the worker on the routes and let everybody go to it."""
        found, worker = self._cluster.job(event.generation), self._cluster.workers.get(event.generation)
        if found is None or worker is None or found[1].stage is not Stage.LOAD:
            return
        model, job = found
        if event.error is not None:
            self.attempt_failed(model, job, event.error)
            return
        model.job, model.info = None, event.info
        self.ready(model, worker)

    def ready(self, model: Model, worker: Worker) -> None:
        """Make a worker the model's replica."""
        now_s = self._effects.now_s()
        worker.state = WorkerState.READY
        worker.loaded_unix_ms = worker.loaded_unix_ms or self._effects.unix_ms()
        worker.used_at_s, worker.used_unix_ms = now_s, self._effects.unix_ms()
        worker.advanced_at_s = now_s
        if model.waiters:
            worker.hold_until_s = now_s + HOLD_AFTER_READY_S
        model.failure, model.num_failures, model.retry_at_s = "", 0, 0.0
        log.info("a model is ready", extra={"model": model.spec.name, "worker": worker.id, "device": worker.device})
        waiters, model.waiters = model.waiters, []
        self._runtime.remember()
        self._runtime.publish()
        for waiter in waiters:
            waiter.succeed(worker)
        self.place_waiting()

    def _run(self, job: Job, work: Coroutine[Any, Any, None], on_error: Callable[[HostlerError], events.Event]) -> None:
        """Run one stage's effect; whatever goes wrong in it becomes the stage's own failure event."""

        async def guarded() -> None:
            try:
                await work
            except HostlerError as error:
                self._runtime.post(on_error(error))
            except Exception as error:
                log.exception("an effect failed", extra={"model": job.model, "generation": job.generation})
                self._runtime.post(on_error(Internal(f"an internal error ({type(error).__name__}); see the log")))

        self._runtime.run(guarded(), job.generation)

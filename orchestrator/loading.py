"""Bringing a model up: locate → fetch → place → spawn → load, or place → wake; one attempt at a time, shared by all
who wait.

Above it: `requests.py`, `watching.py` (replacements), `replicas.py`. Below it: `placing.py` for room, `starting.py`
for the part with a worker, the effects.
"""

from __future__ import annotations

import logging

from hostler.errors import (
    HostlerError,
    InvalidRequest,
    ModelLoadFailed,
    ModelNeverFits,
    ModelNotFound,
    Unavailable,
)
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events, models
from orchestrator.placing import Placing
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.starting import Starting
from orchestrator.state import Job, Model, Progress, Stage, WorkerState
from orchestrator.views import Obstacle, Refusal

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
ATTEMPT_DELAYS_S = (0.0, 0.5, 2.0)
FAILURE_MEMORY_S = 5.0
FAILURE_MEMORY_MAX_S = 60.0
REPLICA_RETRY_S = 30.0
LOAD_STALL_S = 300.0
"""A load that shows no progress for this long is given up; a healthy one reports every file or shard."""


class Loading:
    """Carries jobs through their stages. Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, retiring: Retiring, placing: Placing, starting: Starting) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._retiring = retiring
        self._placing = placing
        self._starting = starting
        starting.on_failed, starting.on_ready = self.attempt_failed, self.place_waiting

    # ------------------------------------------------------------ start and end

    def start(self, model: Model, *, attempt: int = 1, delay_s: float = 0.0, replica: bool = False) -> None:
        """Begin an attempt unless one is under way. A new attempt has a new generation."""
        if model.job is not None or self._runtime.stopping:
            return
        now_s = self._effects.now_s()
        job = Job(self._runtime.next_generation(), model.spec.name, attempt, replica, advanced_at_s=now_s)
        model.job = job
        if delay_s > 0:
            job.stage, job.not_before_s = Stage.BACKOFF, now_s + delay_s
            model.tell(Progress("queue", f"attempt {attempt} of {MAX_ATTEMPTS} in {delay_s:g} s"))
        else:
            self._begin(model, job)
        self._runtime.publish()

    def drop(self, model: Model) -> None:
        """Give up the job of a model, whatever its stage; a worker that belongs to it is killed."""
        job, model.job = model.job, None
        if job is None:
            return
        self._runtime.cancel(job.generation)
        worker = self._cluster.workers.get(job.worker)
        if worker is not None and job.stage is Stage.SPAWN:
            self._starting.give_back(worker)
        elif worker is not None:
            self._retiring.at_once(worker, "its load was given up")
        self._runtime.publish()
        self.place_waiting()

    def fail(self, model: Model, error: HostlerError) -> None:
        """End every wait for a model with `error`, and remember it a while; a further replica just does not come."""
        further = model.job is not None and model.job.replica
        self.drop(model)
        if further and self._cluster.ready(model.spec.name):
            model.replica_retry_at_s = self._effects.now_s() + REPLICA_RETRY_S
            return
        model.num_failures += 1
        memory_s = min(FAILURE_MEMORY_MAX_S, FAILURE_MEMORY_S * 2 ** (model.num_failures - 1))
        model.retry_at_s = self._effects.now_s() + memory_s
        model.failure = error.message
        log.error("a model could not be brought up", extra={"model": model.spec.name, "error": error.message})
        self._runtime.journal.note(pb.EVENT_KIND_FAILED, error.message, model=model.spec.name)
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
                self._begin(model, job)
            elif job.stage in (Stage.LOAD, Stage.WAKE) and now_s - job.advanced_at_s > LOAD_STALL_S:
                self.attempt_failed(model, job, Unavailable(f"loading made no progress for {LOAD_STALL_S:g} s"))

    def attempt_failed(self, model: Model, job: Job, error: HostlerError) -> None:
        """End one attempt; try again, or fail the model when it was the last or can never succeed."""
        hopeless = isinstance(error, InvalidRequest | ModelNotFound | ModelLoadFailed)
        if hopeless or job.attempt >= MAX_ATTEMPTS or not (model.waiters or model.wanted) or job.replica:
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
        if job.plan is not None:  # The next attempt reads the files.
            self._placing.dismiss(job.plan, "what it held could not be taken over")
        self.start(model, attempt=job.attempt + 1, delay_s=ATTEMPT_DELAYS_S[job.attempt])

    # ------------------------------------------------------------ locate and fetch

    def _begin(self, model: Model, job: Job) -> None:
        """Place a model that sleeps, whose files are known; look for the files of any other."""
        asleep = self._cluster.of(model.spec.name, WorkerState.ASLEEP, WorkerState.RESTING)
        located = next((w.located for w in asleep if w.located is not None), None)
        if located is not None and not job.replica:
            self._place(model, job, located)
        else:
            self._locate(model, job)

    def _locate(self, model: Model, job: Job) -> None:
        job.stage = Stage.LOCATE
        if not model.spec.has_files:
            self._place(model, job, models.NOWHERE)
            return
        self._runtime.run_stage(
            job, self._locate_effect(model, job), lambda e: events.LocateDone(job.generation, None, e)
        )

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
            self._runtime.run_stage(job, self._fetch_effect(model, job), lambda e: events.FetchDone(job.generation, e))

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

    def place_waiting(self) -> None:
        """Plan and begin every load that the memory allows: what people wait for first, oldest first."""
        waiting = [m for m in self._cluster.models.values() if m.job is not None and m.job.stage is Stage.PLACE]
        waiting.sort(key=lambda m: (m.batch, m.job.replica if m.job else False, m.job.generation if m.job else 0))
        num_ahead = 0
        for model in waiting:
            job = model.job
            if job is None or job.stage is not Stage.PLACE:
                continue  # An earlier one's failure may have dropped it.
            if self._cluster.of(model.spec.name, WorkerState.RESTING) and not job.replica:
                model.tell(Progress("queue", "it is falling asleep, and is woken right after", num_ahead=num_ahead))
                continue
            if self._placing.is_stale(job):
                job.plan = None
            if job.plan is None and (refusal := self._placing.decide(model, job)) is not None:
                self._wait(model, job, refusal, num_ahead)
            # Those who were told to give way may not have done so yet.
            if job.plan is not None and model.job is job and self._cluster.has_room(job.plan.parts):
                self._starting.begin(model, job, job.plan)
            num_ahead += model.job is job and not job.stage.started

    def _wait(self, model: Model, job: Job, refusal: Refusal, num_ahead: int) -> None:
        if job.replica:
            self.fail(model, ModelLoadFailed(refusal.reason))
        elif refusal.obstacle in (Obstacle.NEVER, Obstacle.PINNED):
            advice = f" {' '.join(refusal.advice)}" if refusal.advice else ""
            kind = ModelNeverFits if refusal.obstacle is Obstacle.NEVER else ModelLoadFailed
            self.fail(model, kind(f"{refusal.reason}.{advice}", param="model"))
        else:
            if job.progress.detail != refusal.reason:
                self._runtime.journal.note(pb.EVENT_KIND_WAITING, refusal.reason, model=model.spec.name)
            model.tell(Progress("queue", refusal.reason, num_ahead=num_ahead))

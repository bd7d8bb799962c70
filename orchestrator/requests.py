"""What callers ask for: a model up, a model gone, a pin, a plan; and which models exist at all.

Above it: `scheduler.py`, which hands each event to one method here. Below it: `loading.py`, `placing.py` (dry runs),
`resting.py`, `retiring.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TypeVar

from hostler.errors import HostlerError, Internal, InvalidRequest, ModelLoadFailed, Unavailable
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events, models, wire
from orchestrator.loading import Loading
from orchestrator.placing import Placing
from orchestrator.resting import Resting
from orchestrator.retiring import Retiring
from orchestrator.runtime import Runtime
from orchestrator.starting import HOLD_AFTER_READY_S
from orchestrator.state import Job, Model, Progress, Stage, Waiter, WorkerState
from orchestrator.views import Obstacle, Plan, Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")


def answer(reply: asyncio.Future[T], value: T) -> None:
    """Answer a caller who may have left."""
    if not reply.done():
        reply.set_result(value)


def refuse(reply: asyncio.Future[T], error: HostlerError) -> None:
    """Refuse a caller who may have left."""
    if not reply.done():
        reply.set_exception(error)


class Requests:
    """Answers callers. Every method is called by the scheduler's task and returns at once."""

    def __init__(
        self, runtime: Runtime, loading: Loading, placing: Placing, resting: Resting, retiring: Retiring
    ) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._effects = runtime.effects
        self._loading = loading
        self._placing = placing
        self._resting = resting
        self._retiring = retiring
        self._unknown: list[events.Ensure] = []
        self._unloads: list[tuple[asyncio.Future[int], frozenset[int]]] = []

    # ------------------------------------------------------------ which models exist

    def add(self, spec: models.ModelSpec) -> None:
        """Make a model known."""
        if not spec.created_unix_s:
            spec = dataclasses.replace(spec, created_unix_s=self._runtime.started_unix_ms // 1000)
        self._cluster.models[spec.name] = Model(spec, pinned=spec.pinned, wanted=spec.preload)

    def rescan(self) -> None:
        """Read the store again; `StoreListed` follows."""
        self._runtime.run(self._rescan())

    async def _rescan(self) -> None:
        try:
            self._runtime.post(events.StoreListed(await self._effects.list_stored()))
        except HostlerError as error:
            log.error("the model store could not be read", extra={"error": error.message})
            self._runtime.post(events.StoreListed(None))

    def on_store_listed(self, event: events.StoreListed) -> None:
        """Add what is new in the store, forget what has left it, and answer those who asked for unknown names."""
        if event.specs is not None:
            self._merge({spec.name: spec for spec in event.specs})
            self._runtime.publish()
        unknown, self._unknown = self._unknown, []
        for ensure in unknown:
            if self._cluster.resolve(ensure.model) is None:
                ensure.waiter.fail(self._cluster.not_found(ensure.model))
            else:
                self.on_ensure(ensure)

    def _merge(self, listed: dict[str, models.ModelSpec]) -> None:
        configured = [m.spec for m in self._cluster.models.values() if m.spec.configured]
        # A configured model is often stored under its source's name: that is the same model, not another.
        taken = {name for spec in configured for name in (spec.source, *spec.names)}
        for name, spec in listed.items():
            if name not in taken and spec.source not in taken and name not in self._cluster.models:
                self.add(spec)
        in_use = {worker.model for worker in self._cluster.workers.values()}
        for model in list(self._cluster.models.values()):
            name = model.spec.name
            is_needed = name in in_use or model.job or model.waiters  # whose load will say that it is gone
            if not model.spec.configured and name not in listed and not is_needed:
                del self._cluster.models[name]

    # ------------------------------------------------------------ waiting for a model

    def on_ensure(self, event: events.Ensure) -> None:
        """Answer at once from a ready worker or a fresh failure; else join or start the one load."""
        waiter = event.waiter
        if waiter.left:
            return
        if self._runtime.stopping:
            waiter.fail(Unavailable("The server is stopping."))
            return
        model = self._cluster.resolve(event.model)
        if model is None:
            self._unknown.append(event)
            if len(self._unknown) == 1:
                self.rescan()
            return
        now_s = self._effects.now_s()
        model.reuse.seen(now_s)
        if (worker := self._cluster.least_loaded(model.spec.name)) is not None:
            worker.busy_until_s = max(worker.busy_until_s, now_s + HOLD_AFTER_READY_S)
            waiter.succeed(worker)
        elif model.job is None and now_s < model.retry_at_s and not event.explicit:
            waiter.fail(ModelLoadFailed(model.failure, retry_after_s=round(model.retry_at_s - now_s, 1)))
        else:
            self._join(model, waiter)

    def _join(self, model: Model, waiter: Waiter) -> None:
        model.waiters.append(waiter)
        if model.job is not None:
            model.job.replica = False  # The others have gone meanwhile: it is the first one now, and may make room.
            waiter.tell(model.job.progress)
        elif self._runtime.may_publish:
            waiter.tell(Progress("queue"))
            self._loading.start(model)
        else:
            # It may be up already, in a worker of the last orchestrator; `WorkersFound` will tell.
            waiter.tell(Progress("queue", "looking for living workers"))

    def on_leave(self, event: events.Leave) -> None:
        """Forget a waiter; with the last one goes a load that nothing else wants, unless it is more than half done."""
        event.waiter.left = True
        for model in self._cluster.models.values():
            if event.waiter not in model.waiters:
                continue
            model.waiters.remove(event.waiter)
            job = model.job
            if job is not None and not model.waiters and not model.wanted and not self._is_half_done(model, job):
                log.info("a load lost its last waiter", extra={"model": model.spec.name})
                self._loading.drop(model)

    def _is_half_done(self, model: Model, job: Job) -> bool:
        """Return whether giving a load up would waste more than finishing it costs.

        Else a client whose patience ends shortly before the load does would never be served, however often it came.
        """
        if not job.stage.started:
            return False
        worker = self._cluster.workers.get(job.worker)
        if worker is None:
            return False
        times = self._cluster.experience.expect(model.spec, worker.located, worker.kind)
        expected_s = times.wake_s if job.stage is Stage.WAKE else times.load_s
        done, total = job.progress.done_bytes, job.progress.total_bytes
        read = total > 0 and 2 * done >= total
        return read or 2 * (self._effects.now_s() - job.began_at_s) >= expected_s

    # ------------------------------------------------------------ operators

    def on_unload(self, event: events.Unload) -> None:
        """Drain and end every replica; give up a load under way. The reply waits until they are gone."""
        if (model := self._cluster.resolve(event.model)) is None:
            refuse(event.reply, self._cluster.not_found(event.model))
            return
        model.wanted = False
        waiters, model.waiters = model.waiters, []
        for waiter in waiters:
            waiter.fail(Unavailable(f"{model.spec.name} was unloaded while it was being brought up."))
        states = (WorkerState.LOADING, WorkerState.READY, WorkerState.RESTING, WorkerState.ASLEEP, WorkerState.WAKING)
        theirs = self._cluster.of(model.spec.name, *states)
        self._loading.drop(model)
        for worker in theirs:
            self._retiring.gently(worker, self._runtime.config.drain_s, "unloaded on request", pb.EVENT_KIND_UNLOADED)
        model.failure, model.retry_at_s = "", 0.0
        self._unloads.append((event.reply, frozenset(worker.generation for worker in theirs)))
        self.answer_unloads()
        self._runtime.publish()

    def on_sleep(self, event: events.Sleep) -> None:
        """Put every ready replica to sleep."""
        if (model := self._cluster.resolve(event.model)) is None:
            refuse(event.reply, self._cluster.not_found(event.model))
            return
        ready = self._cluster.ready(model.spec.name)
        for worker in ready:
            if not self._resting.can_sleep(worker):
                refuse(event.reply, InvalidRequest(self._resting.why_not(worker), param="model"))
                return
            self._resting.put_to_sleep(worker, "on request")
        model.wanted = False
        answer(event.reply, len(ready))

    def answer_unloads(self) -> None:
        """Answer every unload whose workers are all gone."""
        for entry in self._unloads.copy():
            reply, generations = entry
            if not generations & self._cluster.workers.keys():
                self._unloads.remove(entry)
                answer(reply, len(generations))

    def on_pin(self, event: events.Pin) -> None:
        """Pin or unpin; who waits for memory may profit."""
        if (model := self._cluster.resolve(event.model)) is None:
            refuse(event.reply, self._cluster.not_found(event.model))
            return
        if model.pinned != event.pinned:
            kind = pb.EVENT_KIND_PINNED if event.pinned else pb.EVENT_KIND_UNPINNED
            self._runtime.journal.note(kind, "on request", model=model.spec.name)
        model.pinned = event.pinned
        self._loading.place_waiting()
        answer(event.reply, None)

    def on_ask_plan(self, event: events.AskPlan) -> None:
        """Look the files up, then plan on what they need."""
        if (model := self._cluster.resolve(event.model)) is None:
            refuse(event.reply, self._cluster.not_found(event.model))
        elif (worker := self._cluster.least_loaded(model.spec.name)) is not None:
            here = Plan(model.spec.name, worker.parts, worker.kv_cache_bytes, f"already loaded: {worker.reason}")
            answer(event.reply, wire.plan(here, model, self._cluster))
        elif not model.spec.has_files:
            self.on_planned(events.Planned(event, models.NOWHERE))
        else:
            self._runtime.run(self._look_up(event, model.spec))

    async def _look_up(self, event: events.AskPlan, spec: models.ModelSpec) -> None:
        try:
            self._runtime.post(events.Planned(event, await self._effects.locate(spec)))
        except HostlerError as error:
            self._runtime.post(events.Planned(event, None, error))
        except Exception:
            log.exception("a model's files could not be looked up", extra={"model": spec.name})
            self._runtime.post(events.Planned(event, None, Internal("The model's files could not be read.")))

    def on_planned(self, event: events.Planned) -> None:
        """Answer with the policy's words."""
        ask, model = event.ask, self._cluster.resolve(event.ask.model)
        if event.error is not None:
            refuse(ask.reply, event.error)
        elif model is None:
            refuse(ask.reply, self._cluster.not_found(ask.model))
        elif event.located is None:
            reason = f"{model.spec.name} must be fetched first; its size is not known yet"
            answer(ask.reply, wire.plan(Refusal(Obstacle.SOON, 0, 0, reason), model, self._cluster))
        else:
            answer(ask.reply, wire.plan(self._placing.ask(model, event.located), model, self._cluster))

    def stop(self) -> None:
        """End every wait and every load, and drain every worker."""
        for model in self._cluster.models.values():
            model.wanted = False
            waiters, model.waiters = model.waiters, []
            for waiter in waiters:
                waiter.fail(Unavailable("The server is stopping."))
            self._loading.drop(model)
        for worker in list(self._cluster.workers.values()):
            self._retiring.gently(worker, self._runtime.config.drain_s, "the server stops", pb.EVENT_KIND_UNLOADED)

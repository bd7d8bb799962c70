"""The model of truth: what the scheduler says, event by event, against what is.

Above it: the walk. Below it: the invariants, the world. It hooks itself around the handlers of one scheduler, so that
every event is judged by itself: who left because of it, what memory is held and promised after it, and whether it was
one that must change nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator import events
from orchestrator.scheduler import Scheduler
from orchestrator.state import Job, Model, Stage, Worker, WorkerState
from orchestrator.views import Part

from . import invariants
from .shapes import MAX_WAIT_S
from .world import World

_STAGES: dict[type[Any], Stage | None] = {
    events.LocateDone: Stage.LOCATE,
    events.FetchDone: Stage.FETCH,
    events.LoadDone: Stage.LOAD,
    events.WakeDone: Stage.WAKE,
    events.Progressed: None,
}
_OF_WORKERS = (events.SleepDone, events.ResizeDone, events.Reported, events.WatchEnded, events.Retired)
_BY_OPERATORS = (events.Unload, events.Sleep)
_LEAVING = (WorkerState.RESTING, WorkerState.DRAINING)
_GOING = (WorkerState.DRAINING, WorkerState.LOST)
_STAYING = (WorkerState.READY, WorkerState.ASLEEP)


@dataclass(slots=True)
class Departure:
    """A worker that an event sent to sleep or away.

    Attributes:
        job: for whose plan; None when no plan names it.
        asked: an operator asked for it, or the scheduler stops.
        turn: somebody has waited so long for its room that it may go although it is busy.
    """

    worker: Worker
    model: Model
    was: WorkerState
    job: Job | None
    asked: bool
    turn: bool


class Truth:
    """Judges one scheduler after another, over one world.

    Attributes:
        granted: what each worker was last given on devices, by worker id; it outlives the scheduler that gave it.
        held, held_before: bytes by device after and before the event; `promised` alike, with those who give way taken
            off and promises added.
        departures: who left with the last event.
        over: generations that were, and are not any more, newest last.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.granted: dict[str, tuple[Part, ...]] = {}
        self.held: dict[str, int] = dict.fromkeys(world.all_devices, 0)
        self.held_before = dict(self.held)
        self.promised: dict[str, int] = dict(self.held)
        self.promised_before = dict(self.held)
        self.departures: list[Departure] = []
        self.over: deque[int] = deque(maxlen=32)
        self.num_events = 0
        self._states: dict[int, WorkerState] = {}
        self._jobs: set[int] = set()
        self._begun: set[int] = set()
        self._leaving: set[str] = set()
        self._given: dict[int, tuple[int, int]] = {}
        self._confessed: dict[str, int] = {}
        world.is_leaving = self._leaving.__contains__

    def attach(self, scheduler: Scheduler) -> None:
        """Judge this scheduler from now on."""
        self.scheduler = scheduler
        self.cluster = scheduler._cluster
        self.runtime = scheduler._runtime
        self._states, self._jobs = {}, set()
        self.promised = dict(self.held)
        handlers = scheduler._handlers
        for kind, handle in list(handlers.items()):
            handlers[kind] = self._judged(handle)

    def _judged(self, handle: Callable[[Any], object]) -> Callable[[Any], object]:
        def judged(event: Any) -> None:
            before = self.fingerprint() if self.must_change_nothing(event) else None
            teller = self.cluster.workers.get(event.generation) if type(event) is events.Reported else None
            told = teller.parts if teller is not None else ()
            try:
                handle(event)
            except Exception as error:
                self.world.breach("handlers never raise", f"{type(event).__name__}: {error!r}")
                raise
            if before is not None and before != (after := self.fingerprint()):
                changed = next((b, a) for b, a in zip(before, after, strict=True) if b != a)
                self.world.breach("what is over changes nothing", f"{event!r}"[:200] + f": {changed}"[:400])
            self._confessed = _growth(told, teller.parts) if teller is not None else {}
            self._look(event)
            for name, holds in invariants.AFTER_EVENTS:
                if (text := holds(self)) is not None:
                    self.world.breach(name, f"{text} (after {type(event).__name__})")

        return judged

    # ------------------------------------------------------------ looking

    def _look(self, event: Any) -> None:
        """Take in what is after an event."""
        self.num_events += 1
        cluster, processes = self.cluster, self.world.processes
        self.held_before, self.promised_before = self.held, self.promised
        self.held = held = dict.fromkeys(self.world.all_devices, 0)
        self.promised = promised = dict.fromkeys(self.world.all_devices, 0)
        self.departures.clear()
        if type(event) is events.WorkersFound:  # What was there already is promised from now on.
            self.promised_before = {d: max(self.promised_before[d], self.held_before[d]) for d in held}
            # So is what has died since it was looked at: it holds nothing, and is found out in a moment.
            for part in (p for w in cluster.workers.values() if w.id not in processes for p in w.parts):
                self.held_before[part.device] += part.num_bytes
                self.promised_before[part.device] += part.num_bytes
        elif type(event) is events.Reported:  # It holds more than it was given: the ledger only says so.
            for device, num_bytes in self._confessed.items():
                self.held_before[device] += num_bytes
                self.promised_before[device] += num_bytes
        elif type(event) is events.ResizeDone:
            self._excuse_resize(event.generation)
        states: dict[int, WorkerState] = {}
        ids = set()
        self._leaving.clear()
        for generation, worker in cluster.workers.items():
            state = states[generation] = worker.state
            ids.add(worker.id)
            if state in _GOING:
                self._leaving.add(worker.id)
            if worker.parts:
                self.granted[worker.id] = worker.parts
                stays = state.stays
                for part in worker.parts:
                    held[part.device] += part.num_bytes
                    if stays:
                        promised[part.device] += part.num_bytes
                if stays and (given := _giving_up(worker)):
                    promised[worker.parts[0].device] -= given
            elif (process := processes.get(worker.id)) is not None and process.phase.holds:
                self._count_unseen(worker.id)
            was = self._states.get(generation)
            if state in _LEAVING and was in _STAYING:
                self._note_departure(worker, was, event)
        for worker_id, process in processes.items():
            if worker_id not in ids and process.phase.holds:
                self._count_unseen(worker_id)
        jobs = set()
        self._begun.clear()
        for model in cluster.models.values():
            job = model.job
            if job is not None:
                jobs.add(job.generation)
                if job.stage.started:
                    self._begun.add(job.generation)
                if job.plan is not None and not job.stage.started:
                    for part in job.plan.parts:
                        promised[part.device] += part.num_bytes
        self.over.extend(self._states.keys() - states.keys())
        self.over.extend(self._jobs - jobs - states.keys())
        self._states, self._jobs = states, jobs
        self._given = {
            g: (w.parts[0].num_bytes, _giving_up(w))
            for g, w in cluster.workers.items()
            if w.resizing_to is not None and w.parts
        }

    def _excuse_resize(self, generation: int) -> None:
        """Take a worker's word that it holds more than it was told to: that is nobody's mistake."""
        worker = self.cluster.workers.get(generation)
        before = self._given.get(generation)
        if worker is None or before is None or not worker.parts:
            return
        (was, given_was), device = before, worker.parts[0].device
        self.held_before[device] += max(0, worker.parts[0].num_bytes - was)
        grown = (worker.parts[0].num_bytes - _giving_up(worker)) - (was - given_was)
        if worker.state.stays:
            self.promised_before[device] += max(0, grown)

    def _count_unseen(self, worker_id: str) -> None:
        """Count what a living process holds although the ledger says nothing of it."""
        for part in self.granted.get(worker_id, ()):
            self.held[part.device] += part.num_bytes

    def _note_departure(self, worker: Worker, was: WorkerState, event: Any) -> None:
        model = self.cluster.models[worker.model]
        job = None
        for other in self.cluster.models.values():
            # Once a load has begun, whoever was to make room for it has: a later departure is for another reason.
            plan = other.job.plan if other.job is not None and other.job.generation not in self._begun else None
            if plan is not None and (worker.id in plan.evict or worker.id in plan.sleep):
                job = other.job
        asked = isinstance(event, events.Stop)
        if isinstance(event, _BY_OPERATORS):
            asked = asked or self.cluster.resolve(event.model) is model
        self.departures.append(Departure(worker, model, was, job, asked, self._is_turn(job)))

    def _is_turn(self, job: Job | None) -> bool:
        if job is None:
            return False
        waiters = self.cluster.models[job.model].waiters
        return bool(waiters) and self.now_s - min(w.since_s for w in waiters) >= MAX_WAIT_S

    @property
    def now_s(self) -> float:
        return self.world.loop.time()

    def usable_bytes(self, device_id: str) -> int:
        """Return what may be held on a device, as far as the scheduler was told; 0 on one that is gone."""
        device = self.cluster.devices.get(device_id)
        if device is None:
            return 0
        return max(0, min(device.budget_bytes, device.total_bytes - self.cluster.foreign_bytes.get(device_id, 0)))

    # ------------------------------------------------------------ what must change nothing

    def must_change_nothing(self, event: Any) -> bool:
        """Return whether an event is of an attempt that is over, or of a stage that is."""
        kind = type(event)
        if kind in _STAGES:
            job = next(
                (m.job for m in self.cluster.models.values() if m.job and m.job.generation == event.generation), None
            )
            return job is None or _STAGES[kind] not in (None, job.stage)
        if kind not in _OF_WORKERS:
            return False
        worker = self.cluster.workers.get(event.generation)
        if worker is None or kind is events.Retired:
            return worker is None
        if worker.state is WorkerState.LOST:
            return True
        return kind is events.Reported and event.report.generation != worker.generation

    def fingerprint(self) -> tuple[Any, ...]:
        """Return everything that an event could change."""
        cluster = self.cluster
        latest = self.runtime.routes.latest
        return (
            *(
                (
                    name,
                    m.pinned,
                    m.wanted,
                    (m.job.generation, m.job.stage, m.job.attempt, m.job.plan, m.job.worker) if m.job else None,
                    tuple(id(waiter) for waiter in m.waiters),
                    (m.failure, m.num_failures, m.retry_at_s, len(m.deaths_s), m.keep_alive_s, m.reuse.weights),
                )
                for name, m in sorted(cluster.models.items())
            ),
            tuple(
                (
                    *(g, w.state, w.parts, w.kv_cache_bytes, w.resizing_to, w.pid, w.sleep_bytes, w.own_bytes),
                    *(w.heard_at_s, w.advanced_at_s, w.used_at_s, w.busy_until_s, w.ready_at_s, id(w.report)),
                )
                for g, w in sorted(cluster.workers.items())
            ),
            tuple(cluster.devices),
            tuple(cluster.foreign_bytes.items()),
            tuple(cluster.host_spare_bytes.items()),
            cluster.generation,
            latest.version if latest else 0,
        )


def _giving_up(worker: Worker) -> int:
    """Return what a worker was told to give up of its KV cache, and has not confirmed yet."""
    if worker.resizing_to is None or len(worker.parts) != 1:
        return 0
    return max(0, worker.kv_cache_bytes - worker.resizing_to)


class Complaints(logging.Handler):
    """Turns what the runtime can only log into breaches: an effect that ended without saying how."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "an effect failed without posting an outcome":
            error = record.exc_info[1] if record.exc_info else None
            self.world.breach("every effect says how it ended", repr(error))


def _growth(before: tuple[Part, ...], after: tuple[Part, ...]) -> dict[str, int]:
    """Return by how much each part of a worker's reservation grew, by device."""
    return {new.device: new.num_bytes - old.num_bytes for old, new in zip(before, after, strict=False)}

"""One machine in virtual time: requests come, models are loaded, give way, sleep and wake, as a strategy decides.

Above it: `figures.py`, the tests. Below it: the strategies, `traces.py`, `hardware.py`, the orchestrator's views,
rates, experience and rules. The rules of waiting are the scheduler's: callers of one model share one load, the oldest
load is placed first, a plan's room is promised at once, whoever gives way ends what it runs, a shut model takes no
more.

Left out: KV caches do not grow back, calls to workers take no time, nothing fails.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from orchestrator import models
from orchestrator.experience import Experience
from orchestrator.reuse import Reuse
from orchestrator.views import (
    ClusterView,
    Demand,
    DeviceView,
    HolderState,
    HolderView,
    NodeView,
    Part,
    Plan,
    Refusal,
    Rules,
)

from .hardware import GB, Hardware, PageCache
from .strategies import Strategy
from .traces import MAX_RUNNING, Asked, Served, Trace

PATIENCE_S = 600.0
"""A caller leaves after so long, and has failed."""
KIND = "cuda"


class State(Enum):
    """What a worker does; as the scheduler's `WorkerState`."""

    LOADING = "loading"
    WAKING = "waking"
    READY = "ready"
    RESTING = "resting"
    ASLEEP = "asleep"
    DRAINING = "draining"


STAYS = {State.LOADING: HolderState.COMING, State.WAKING: HolderState.COMING, State.READY: HolderState.READY}


@dataclass(slots=True, eq=False)
class Worker:
    """One process that has a model; `num_bytes` on its device, 0 while asleep."""

    id: str
    model: Served
    device: str
    num_bytes: int
    kv_bytes: int
    kv_keep_bytes: int
    state: State = State.LOADING
    num_running: int = 0
    queue: deque[Asked] = field(default_factory=deque)
    ready_at_s: float = 0.0
    used_at_s: float = 0.0

    @property
    def spare_bytes(self) -> int:
        held = self.kv_bytes * self.num_running // (2 * MAX_RUNNING)
        return max(0, self.kv_bytes - max(self.kv_keep_bytes, held)) if self.state is State.READY else 0


@dataclass(slots=True, eq=False)
class Job:
    """The one attempt to bring a model up, and who waits for it."""

    number: int
    model: Served
    waiting: list[Asked] = field(default_factory=list)
    plan: Plan | None = None
    worker: Worker | None = None


@dataclass(slots=True)
class Outcome:
    """What a strategy made of a trace. Waits are from coming to being served, in seconds, one for each request served.

    `reload_s`: the seconds of all loads and wakes together.
    """

    trace: str
    strategy: str
    reload_s: float = 0.0
    num_loads: int = 0
    num_wakes: int = 0
    num_hand_overs: int = 0
    num_sleeps: int = 0
    num_evicted: int = 0
    num_failed: int = 0
    num_decisions: int = 0
    waits_s: list[float] = field(default_factory=list)


class World:
    """One run of one strategy over one trace. `run` it once."""

    def __init__(
        self, trace: Trace, strategy: Strategy, hardware: Hardware | None = None, rules: Rules | None = None
    ) -> None:
        self.trace, self.strategy = trace, strategy
        self.hardware, self.rules = hardware or Hardware(), rules or Rules()
        self.now_s = 0.0
        self.outcome = Outcome(trace.name, strategy.name)
        self.workers: list[Worker] = []
        self.jobs: dict[str, Job] = {}
        self.usable = {f"gpu{i}": int(gb * GB) for i, gb in enumerate(trace.device_gb)}
        self.sleep_bytes = int(trace.host_gb * GB * strategy.sleep_share)
        self.cache = PageCache(int(trace.host_gb * GB) - self.sleep_bytes)
        self.experience = Experience()
        self.reuse = {model.name: Reuse() for model in trace.models}
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._num_coming = self._num_jobs = self._num_workers = 0
        self._rings_at_s = 0.0

    # ------------------------------------------------------------ time

    def at(self, when_s: float, do: Callable[[], None]) -> None:
        """Have something happen then; what was asked for first happens first."""
        self._num_coming += 1
        heapq.heappush(self._coming, (when_s, self._num_coming, do))

    def run(self) -> Outcome:
        """Let everything happen, and return what came of it."""
        arrivals = iter(self.trace.asked)
        following = next(arrivals, None)
        while self._coming or following is not None:
            if following is not None and (not self._coming or following.at_s <= self._coming[0][0]):
                self.now_s = following.at_s
                self.arrive(following)
                following = next(arrivals, None)
            else:
                self.now_s, _, do = heapq.heappop(self._coming)
                do()
        assert not self.jobs, f"nobody serves {list(self.jobs)}"
        return self.outcome

    # ------------------------------------------------------------ callers

    def arrive(self, asked: Asked) -> None:
        """Take one request in: to the ready worker, or to those who wait for the model."""
        self.note_use(asked)
        worker = self.of(asked.model, State.READY)
        if worker is not None:
            self.hand(worker, asked)
            return
        job = self.jobs.get(asked.model)
        if job is None:
            self._num_jobs += 1
            job = self.jobs[asked.model] = Job(self._num_jobs, self.trace.by_name[asked.model])
        job.waiting.append(asked)
        self.at(asked.at_s + PATIENCE_S, lambda: self._leave(asked))
        self.place_waiting()

    def note_use(self, asked: Asked) -> None:
        """Count a use, for the policy's rates and the strategy's own account."""
        self.reuse[asked.model].seen(self.now_s)
        self.strategy.seen(asked.model, self.now_s)

    def _leave(self, asked: Asked) -> None:
        job = self.jobs.get(asked.model)
        if job is None or asked not in job.waiting:
            return
        job.waiting.remove(asked)
        self.outcome.num_failed += 1
        if not job.waiting and job.worker is None:
            del self.jobs[asked.model]
            self.place_waiting()

    def hand(self, worker: Worker, asked: Asked) -> None:
        """Have a worker serve a request, now or when it has a place in its batch."""
        worker.used_at_s = self.now_s
        if worker.num_running >= MAX_RUNNING:
            worker.queue.append(asked)
            return
        worker.num_running += 1
        self.outcome.waits_s.append(self.now_s - asked.at_s)
        self.at(self.now_s + asked.runs_s, lambda: self._served(worker))

    def _served(self, worker: Worker) -> None:
        worker.num_running -= 1
        worker.used_at_s = self.now_s
        if worker.queue:
            self.hand(worker, worker.queue.popleft())
        elif not worker.num_running:
            self.idle(worker)

    def idle(self, worker: Worker) -> None:
        """Let go what waits for a worker to have nothing to do."""
        if worker.state is State.RESTING:
            self.at(self.now_s + self.hardware.sleep_s(worker.model.weight_bytes), lambda: self._asleep(worker))
        elif worker.state is State.DRAINING:
            self.at(self.now_s + self.hardware.evict_s, lambda: self.gone(worker))
        self.place_waiting()

    def of(self, model: str, *states: State) -> Worker | None:
        """Return the model's worker that is in one of these states."""
        return next((w for w in self.workers if w.model.name == model and w.state in states), None)

    # ------------------------------------------------------------ place

    def place_waiting(self) -> None:
        """Plan and begin every load that memory allows, the oldest first; see `Loading.place_waiting`."""
        for job in sorted(self.jobs.values(), key=lambda job: job.number):
            if job.worker is not None or self.of(job.model.name, State.RESTING) is not None:
                continue
            if job.plan is not None and self._is_stale(job.plan):
                job.plan = None
            if job.plan is None:
                self.outcome.num_decisions += 1
                answer = self.strategy.plan(self.view(), self.demand(job), self.rules)
                if isinstance(answer, Refusal):
                    continue
                job.plan = answer
                self._give_way(answer)
            if self._has_room(job.plan):
                self.begin(job, job.plan)
        self._ring()

    def _is_stale(self, plan: Plan) -> bool:
        sleeper = plan.wake or plan.take_over
        return bool(sleeper) and all(w.id != sleeper or w.state is not State.ASLEEP for w in self.workers)

    def occupied_bytes(self, device: str) -> int:
        """Return what processes hold, the ones on their way out or to sleep included."""
        return sum(worker.num_bytes for worker in self.workers if worker.device == device)

    def _has_room(self, plan: Plan) -> bool:
        return all(p.num_bytes <= self.usable[p.device] - self.occupied_bytes(p.device) for p in plan.parts)

    def _ring(self) -> None:
        """Ask again when the next residency, or the next caller's patience with busy models, is over."""
        if all(job.plan is not None for job in self.jobs.values()):
            return
        moments = [w.ready_at_s + self.rules.min_residency_s for w in self.workers if w.state is State.READY]
        moments += [self._since_s(job) + self.rules.max_wait_s for job in self.jobs.values() if job.plan is None]
        when_s = min((moment for moment in moments if moment > self.now_s), default=None)
        if when_s is not None and not self.now_s < self._rings_at_s <= when_s:
            self._rings_at_s = when_s
            self.at(when_s, self.place_waiting)

    @staticmethod
    def _since_s(job: Job) -> float:
        return min((asked.at_s for asked in job.waiting), default=0.0)

    def _give_way(self, plan: Plan) -> None:
        by_id = {worker.id: worker for worker in self.workers}
        for worker_id, num_bytes in plan.shrink:
            by_id[worker_id].kv_bytes -= num_bytes
            by_id[worker_id].num_bytes -= num_bytes
        for worker_id in plan.evict:
            self.send_away(by_id[worker_id])
        for worker_id in plan.sleep:
            worker = by_id[worker_id]
            worker.state = State.RESTING
            self.outcome.num_sleeps += 1
            if not worker.num_running:
                self.at(self.now_s + self.hardware.sleep_s(worker.model.weight_bytes), lambda w=worker: self._asleep(w))  # type: ignore[misc]

    def send_away(self, worker: Worker) -> None:
        """End a worker once it has nothing to do; a sleeping one is gone at once."""
        was, worker.state = worker.state, State.DRAINING
        self.outcome.num_evicted += 1
        if was is State.ASLEEP:
            self.workers.remove(worker)
        elif not worker.num_running:
            self.at(self.now_s + self.hardware.evict_s, lambda: self.gone(worker))

    def _asleep(self, worker: Worker) -> None:
        worker.state, worker.num_bytes = State.ASLEEP, 0
        self.place_waiting()

    def gone(self, worker: Worker) -> None:
        """Take a worker out that has ended."""
        self.workers.remove(worker)
        self.place_waiting()

    # ------------------------------------------------------------ load and wake

    def begin(self, job: Job, plan: Plan) -> None:
        """Load the model, or wake it; its room is there."""
        (part,), weight_bytes = plan.parts, job.model.weight_bytes
        if plan.wake:
            worker = next(w for w in self.workers if w.id == plan.wake)
            worker.state, worker.num_bytes, worker.kv_bytes = State.WAKING, part.num_bytes, plan.kv_cache_bytes
            took_s = self.hardware.wake_s(weight_bytes)
            self.outcome.num_wakes += 1
        else:
            self._num_workers += 1
            context_bytes = models.context_bytes(job.model.spec, job.model.located.footprint)
            keep_bytes = min(plan.kv_cache_bytes, context_bytes)
            worker_id = f"w{self._num_workers}"
            worker = Worker(worker_id, job.model, part.device, part.num_bytes, plan.kv_cache_bytes, keep_bytes)
            self.workers.append(worker)
            if plan.take_over:
                took_s = self.hardware.hand_over_s(weight_bytes)
                self.outcome.num_hand_overs += 1
            else:
                took_s = self.hardware.load_s(weight_bytes, cached=self.cache.read(job.model.name, weight_bytes))
                self.outcome.num_loads += 1
        job.worker = worker
        self.outcome.reload_s += took_s
        self.at(self.now_s + took_s, lambda: self._ready(job, worker, took_s))

    def _ready(self, job: Job, worker: Worker, took_s: float) -> None:
        what = "wake_s" if worker.state is State.WAKING else "load_s"
        if job.plan is not None and job.plan.take_over:
            what = "hand_over_s"
            self.workers = [other for other in self.workers if other.id != job.plan.take_over]
        self.experience.learn(job.model.spec, job.model.located, KIND, **{what: took_s})
        worker.state, worker.ready_at_s, worker.used_at_s = State.READY, self.now_s, self.now_s
        del self.jobs[job.model.name]
        for asked in job.waiting:
            self.hand(worker, asked)
        self.place_waiting()

    # ------------------------------------------------------------ what the policy sees

    def demand(self, job: Job) -> Demand:
        """Return what the model asks for now; see `Placing.demand`."""
        spec, located = job.model.spec, job.model.located
        resident = {worker.model.name for worker in self.workers if worker.state is not State.DRAINING}
        num_others = len(self.trace.models) - len(resident | {spec.name})
        return replace(
            models.demand(spec, located, num_others=num_others),
            waited_s=self.now_s - self._since_s(job),
            load_s=self.experience.expect(spec, located, KIND).load_s,
            uses_per_s=self.strategy.uses_per_s(spec.name, self.now_s, self.reuse[spec.name].per_s(self.now_s)),
            sleep_bytes=models.sleep_bytes(located.footprint, KIND),
        )

    def view(self) -> ClusterView:
        """Return everything as the policy sees it; see `Cluster.view`."""
        left = self.sleep_bytes
        holders = []
        for worker in self.workers:
            if worker.state is State.RESTING:
                left -= models.sleep_bytes(worker.model.located.footprint, KIND)
            elif worker.state is State.ASLEEP or worker.state in STAYS:
                holders.append(self._holder(worker))
        holders += [
            HolderView(f"job-{job.number}", job.model.name, job.plan.parts, HolderState.COMING, busy=True)
            for job in self.jobs.values()
            if job.plan is not None and job.worker is None
        ]
        devices = tuple(DeviceView(name, num_bytes) for name, num_bytes in self.usable.items())
        return ClusterView(devices, tuple(holders), (NodeView("", max(0, left)),), self.now_s)

    def _holder(self, worker: Worker) -> HolderView:
        spec, located = worker.model.spec, worker.model.located
        times, reuse = self.experience.expect(spec, located, KIND), self.reuse[spec.name]
        asleep, busy = worker.state is State.ASLEEP, worker.num_running > 0 or worker.state is not State.READY
        return HolderView(
            id=worker.id,
            model=spec.name,
            parts=() if asleep else (Part(worker.device, worker.num_bytes),),
            state=HolderState.ASLEEP if asleep else STAYS[worker.state],
            busy=busy and not asleep,
            last_used_s=self.now_s if busy and not asleep else worker.used_at_s,
            ready_since_s=worker.ready_at_s,
            spare_bytes=worker.spare_bytes,
            sleep_bytes=models.sleep_bytes(located.footprint, KIND) if self.sleep_bytes else None,
            load_s=times.load_s,
            wake_s=times.wake_s,
            hand_over_s=times.hand_over_s if asleep else None,
            uses_per_s=self.strategy.uses_per_s(spec.name, self.now_s, reuse.per_s(self.now_s)),
            lasting_per_s=self.strategy.uses_per_s(spec.name, self.now_s, reuse.lasting_per_s(self.now_s)),
            wakes_on=frozenset((worker.device,)),
        )

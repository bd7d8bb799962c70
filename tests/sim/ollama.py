"""Ollama's scheduler, as its `server/sched.go` has it: other rules of waiting, not only another choice of victims.

Above it: `__main__.py`. Below it: the world, whose loads and requests it shares.

One request after the other is looked at, and none behind it is, not even for a model that is up, until it has its model
or the one to be unloaded for it has ended what it ran. Without a limit set, three models a GPU. Each goes where most is
free. A model goes when it has not been used for five minutes; to make room, the idle one with the shortest keep-alive
does (all have the same here, so by name), else the first of all as soon as it is idle. While a model loads, whoever
finds no room asks again a quarter of a second later, at the end of the queue. Models that do not fit are not split with
the CPU here, and its idea of their memory is ours.
"""

from __future__ import annotations

from collections import deque
from functools import partial

from orchestrator import policy
from orchestrator.policy.room import comfortable_bytes, rooms_of
from orchestrator.views import ClusterView, Demand, Part, Plan, Refusal, Rules

from .hardware import Hardware
from .strategies import Hostler
from .traces import Asked, Trace
from .world import PATIENCE_S, Job, State, Worker, World

KEEP_ALIVE_S = 300.0
ASKS_AGAIN_S = 0.25
MOST_PER_GPU = 3


class Ollama(Hostler):
    """The name, and no memory for sleepers; the rules are in the world."""

    name = "Ollama"
    sleep_share = 0.0

    def plan(self, view: ClusterView, demand: Demand, rules: Rules) -> Plan | Refusal:
        """Return a place that is free, where most is, with one context for each of no more requests; else a refusal."""
        rooms = [r for r in rooms_of(view).values() if comfortable_bytes(r.device, demand) <= r.free_bytes]
        if not rooms:
            return policy.plan(ClusterView((), ()), demand, rules)
        room = max(rooms, key=lambda room: (room.free_bytes, room.device.id))
        needed = comfortable_bytes(room.device, demand)
        return Plan(demand.model, (Part(room.device.id, needed),), needed - demand.base_bytes, "most is free there")


class OllamaWorld(World):
    """The same machine under Ollama's rules."""

    def __init__(self, trace: Trace, hardware: Hardware | None = None) -> None:
        super().__init__(trace, Ollama(), hardware)
        self._pending: deque[Asked] = deque()
        self._expiring: Worker | None = None
        self._most = MOST_PER_GPU * len(trace.device_gb)

    def arrive(self, asked: Asked) -> None:
        """Put a request at the end of the queue."""
        self.note_use(asked)
        self._pending.append(asked)
        self.place_waiting()

    def place_waiting(self) -> None:
        """Look at one request after the other, until one has to wait."""
        while self._pending and self._expiring is None:
            asked = self._pending[0]
            if self.now_s - asked.at_s >= PATIENCE_S:
                self.outcome.num_failed += 1
            elif (worker := self.of(asked.model, State.READY)) is not None:
                self.hand(worker, asked)
            elif asked.model in self.jobs:
                self.jobs[asked.model].waiting.append(asked)
            elif not self._find_room(asked):
                return
            if self._pending and self._pending[0] is asked:
                self._pending.popleft()

    def _find_room(self, asked: Asked) -> bool:
        """Load the model; or have another one go, or ask again later, and return False."""
        job = Job(0, self.trace.by_name[asked.model], [asked])
        if len(self.workers) < self._most:
            answer = self.strategy.plan(self.view(), self.demand(job), self.rules)
            self.outcome.num_decisions += 1
            if isinstance(answer, Plan):
                self.jobs[asked.model] = job
                self.begin(job, answer)
                return True
            if self.jobs:
                self._pending.popleft()
                self.at(self.now_s + ASKS_AGAIN_S, partial(self._again, asked))
                return True
        idle = [w for w in self.workers if w.state is State.READY and not w.num_running]
        self._expiring = min(idle or self.workers, key=lambda worker: worker.model.name)
        if idle:
            self.send_away(self._expiring)
        return False

    def _again(self, asked: Asked) -> None:
        self._pending.append(asked)
        self.place_waiting()

    def idle(self, worker: Worker) -> None:
        """Let go the one that has to; else begin its keep-alive."""
        if worker is self._expiring:
            self.send_away(worker)
        elif worker.state is State.READY:
            self.at(self.now_s + KEEP_ALIVE_S, partial(self._expire, worker, self.now_s))

    def _expire(self, worker: Worker, used_at_s: float) -> None:
        if worker.state is State.READY and worker.used_at_s == used_at_s and not worker.num_running:
            self.send_away(worker)

    def gone(self, worker: Worker) -> None:
        """Take a worker out; whoever waits for that goes on."""
        if worker is self._expiring:
            self._expiring = None
        super().gone(worker)

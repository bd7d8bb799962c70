"""The scheduler's state: models, jobs, workers, those who wait. Plain data that one task owns.

Above it: the scheduler and its parts, the only writers. Below it: the policy's views. Nothing here waits, and nothing
here talks to the outside. The sums over it, the memory ledger among them, are in `cluster.py`.

A `Job` is one attempt to bring up one replica: by a load, or by waking one that sleeps. Its generation names it in
events; a load's worker has the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator.models import Located, ModelSpec
from orchestrator.reuse import Reuse
from orchestrator.views import Part, Plan


class Stage(Enum):
    """Where a job stands."""

    BACKOFF = "backoff"
    LOCATE = "locate"
    FETCH = "fetch"
    PLACE = "place"
    SPAWN = "spawn"
    LOAD = "load"
    WAKE = "wake"

    @property
    def started(self) -> bool:
        """True once a worker process belongs to the job and holds its room."""
        return self in (Stage.SPAWN, Stage.LOAD, Stage.WAKE)


class WorkerState(Enum):
    """What the scheduler lets a worker do; the worker's own report may lag behind.

    RESTING: off the routes, on its way to sleep; it holds its room until it is ASLEEP. DRAINING: on its way out.
    LOST: fenced, to be killed.
    """

    LOADING = "loading"
    READY = "ready"
    RESTING = "resting"
    ASLEEP = "asleep"
    WAKING = "waking"
    DRAINING = "draining"
    LOST = "lost"

    @property
    def stays(self) -> bool:
        """True for one that holds, or will hold, its room on a device for its model."""
        return self in (WorkerState.LOADING, WorkerState.READY, WorkerState.WAKING)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is, for people. `stage` and the rest as in the contract's EnsureProgress."""

    stage: str
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    num_ahead: int = 0
    eta_s: float = 0.0


class Waiter:
    """One caller that waits for a model. Holds the latest progress only, so a slow reader costs nothing.

    Args:
        batch: nobody waits for the answer; it never displaces those who do.
        since_s: when it came.
    """

    def __init__(self, *, batch: bool = False, since_s: float = 0.0) -> None:
        self.batch = batch
        self.since_s = since_s
        self.progress: Progress | None = None
        self.worker: Worker | None = None
        self.error: HostlerError | None = None
        self.left = False
        self.changed = asyncio.Event()

    def tell(self, progress: Progress) -> None:
        """Show progress."""
        self.progress = progress
        self.changed.set()

    def succeed(self, worker: Worker) -> None:
        """End the wait with a worker."""
        self.worker = worker
        self.changed.set()

    def fail(self, error: HostlerError) -> None:
        """End the wait with an error."""
        self.error = error
        self.changed.set()


@dataclass(slots=True)
class Job:
    """One attempt to bring up one replica of a model.

    Attributes:
        replica: one more beside a ready one; it takes only room that is free.
        worker: generation of the worker that the job started or wakes; 0 before.
        began_at_s: when the worker began to load or wake, for what the next one will be expected to take.
    """

    generation: int
    model: str
    attempt: int
    replica: bool = False
    stage: Stage = Stage.LOCATE
    not_before_s: float = 0.0
    progress: Progress = field(default_factory=lambda: Progress("queue"))
    located: Located | None = None
    fetched: bool = False
    plan: Plan | None = None
    worker: int = 0
    began_at_s: float = 0.0
    advanced_at_s: float = 0.0


@dataclass(slots=True)
class Worker:
    """One worker process that has, or gets, a model.

    Attributes:
        parts: what it may hold on each of its devices; none while asleep.
        kv_cache_bytes: how much of that is the KV cache's budget.
        kind: of its devices, "cpu" or "cuda".
        kv_keep_bytes: a neighbour's need never shrinks the KV cache below this: one full context.
        resizing_to: the KV budget that it was just told; None when it is not being resized.
        owed_bytes: of its KV cache, counted as its own already, until it has confirmed that it gave them up.
        sleep_bytes: host memory that it holds asleep, or is expected to.
        own_bytes: the most that it was seen to hold beside its KV cache.
        home: devices that its process sees; a GPU's process can wake on no other.
        busy_until_s: callers that were just handed it are on their way until then.
        recipe: of what it was loaded with (`models.recipe`); empty: not known.
    """

    id: str
    model: str
    generation: int
    parts: tuple[Part, ...]
    kv_cache_bytes: int
    reason: str
    kind: str = "cpu"
    kv_keep_bytes: int = 0
    state: WorkerState = WorkerState.LOADING
    node: str = ""
    located: Located | None = None
    address: str = ""
    pid: int = 0
    heard_at_s: float = 0.0
    advanced_at_s: float = 0.0
    used_at_s: float = 0.0
    used_unix_ms: int = 0
    ready_at_s: float = 0.0
    busy_until_s: float = 0.0
    loaded_unix_ms: int = 0
    max_running: int = 0
    home: frozenset[str] = frozenset()
    resizing_to: int | None = None
    owed_bytes: int = 0
    sleep_bytes: int = 0
    own_bytes: int = 0
    tokens_per_s: float = 0.0
    recipe: str = ""
    report: lifecycle_pb2.WatchResponse | None = None

    @property
    def num_requests(self) -> int:
        """Requests running or queued in it, as last reported."""
        return self.report.num_running + self.report.num_queued if self.report else 0

    @property
    def shelf(self) -> str:
        """Where a worker on another device may take over what it holds asleep; empty where none can, or not now."""
        return self.report.shelf if self.state is WorkerState.ASLEEP and self.report else ""

    @property
    def reserved_bytes(self) -> int:
        """What it may hold on all its devices together."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def devices(self) -> str:
        """Where it is, in words."""
        return " + ".join(part.device for part in self.parts)

    def bytes_on(self, device: str) -> int:
        """Return what it may hold on one device."""
        return sum(part.num_bytes for part in self.parts if part.device == device)


@dataclass(slots=True)
class Model:
    """One servable model and everything that is going on with it.

    Attributes:
        wanted: it is to be up even if nobody waits: preloaded, asked for by an operator, or being replaced.
        keep_alive_s: how long it may be idle before it rests; None: until its room is needed.
        leaving: it is configured no more, and known only until its last worker has gone.
    """

    spec: ModelSpec
    leaving: bool = False
    pinned: bool = False
    wanted: bool = False
    job: Job | None = None
    waiters: list[Waiter] = field(default_factory=list)
    info: lifecycle_pb2.ModelInfo | None = None
    failure: str = ""
    num_failures: int = 0
    retry_at_s: float = 0.0
    deaths_s: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    reuse: Reuse = field(default_factory=Reuse)
    keep_alive_s: float | None = None
    crowded_since_s: float | None = None
    roomy_since_s: float | None = None
    replica_retry_at_s: float = 0.0

    @property
    def batch(self) -> bool:
        """True when nothing but batch work wants it now."""
        if self.spec.batch:
            return True
        return bool(self.waiters) and all(waiter.batch for waiter in self.waiters)

    def tell(self, progress: Progress) -> None:
        """Show progress to everybody who waits, and remember it for those who join."""
        if self.job is not None:
            self.job.progress = progress
        for waiter in self.waiters:
            waiter.tell(progress)

"""The scheduler's state: models, loads, workers, the memory ledger. Plain data that one task owns.

Above it: the scheduler and its parts, the only writers. Below it: the policy's views. Nothing here waits,
and nothing here talks to the outside.

A `Job` is one attempt to bring a model up; it has the generation that its worker will have. The ledger is
not stored but summed: what live workers hold plus what jobs were promised is *committed*; what any worker
process may still occupy, draining ones too, is *occupied*. A plan needs committed room, a spawn occupied room.
"""

from __future__ import annotations

import asyncio
import difflib
from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum

from hostler.errors import HostlerError, ModelNotFound
from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator.devices import Device
from orchestrator.models import Located, ModelSpec
from orchestrator.policy import ClusterView, DeviceView, HolderView, Plan


class Stage(Enum):
    """Where a job stands."""

    BACKOFF = "backoff"
    LOCATE = "locate"
    FETCH = "fetch"
    PLACE = "place"
    SPAWN = "spawn"
    LOAD = "load"

    @property
    def started(self) -> bool:
        """True once a worker process belongs to the job: then it is finished even if nobody waits any more."""
        return self in (Stage.SPAWN, Stage.LOAD)


class WorkerState(Enum):
    """What the scheduler lets a worker do; the worker's own report may lag behind."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is, for people. `stage` as in the contract's EnsureProgress."""

    stage: str
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class Waiter:
    """One caller that waits for a model. Holds the latest progress only, so a slow reader costs nothing."""

    def __init__(self) -> None:
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
    """One attempt to bring one model up."""

    generation: int
    model: str
    attempt: int
    stage: Stage = Stage.LOCATE
    not_before_s: float = 0.0
    progress: Progress = field(default_factory=lambda: Progress("queue"))
    located: Located | None = None
    fetched: bool = False
    plan: Plan | None = None
    advanced_at_s: float = 0.0


@dataclass(slots=True)
class Worker:
    """One worker process."""

    id: str
    model: str
    generation: int
    device: str
    reserved_bytes: int
    reason: str
    state: WorkerState = WorkerState.LOADING
    address: str = ""
    pid: int = 0
    heard_at_s: float = 0.0
    advanced_at_s: float = 0.0
    used_at_s: float = 0.0
    used_unix_ms: int = 0
    hold_until_s: float = 0.0
    loaded_unix_ms: int = 0
    max_running: int = 0
    report: lifecycle_pb2.WatchResponse | None = None

    @property
    def num_requests(self) -> int:
        """Requests running or queued in it, as last reported."""
        return self.report.num_running + self.report.num_queued if self.report else 0


@dataclass(slots=True)
class Model:
    """One servable model and everything that is going on with it."""

    spec: ModelSpec
    pinned: bool = False
    wanted: bool = False
    job: Job | None = None
    waiters: list[Waiter] = field(default_factory=list)
    info: lifecycle_pb2.ModelInfo | None = None
    failure: str = ""
    num_failures: int = 0
    retry_at_s: float = 0.0
    deaths_s: deque[float] = field(default_factory=lambda: deque(maxlen=16))

    def tell(self, progress: Progress) -> None:
        """Show progress to everybody who waits, and remember it for those who join."""
        if self.job is not None:
            self.job.progress = progress
        for waiter in self.waiters:
            waiter.tell(progress)


@dataclass(slots=True)
class Cluster:
    """All state. Keys: models by public name, workers by generation."""

    devices: dict[str, Device]
    models: dict[str, Model] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    foreign_bytes: dict[str, int] = field(default_factory=dict)
    generation: int = 0

    def resolve(self, name: str) -> Model | None:
        """Return the model of this name or alias, or whose adapter has this name."""
        if (model := self.models.get(name)) is not None:
            return model
        return next((m for m in self.models.values() if name in m.spec.names), None)

    def not_found(self, name: str) -> ModelNotFound:
        """Return the error for a name that nobody knows, with what the caller may have meant."""
        names = [name for model in self.models.values() for name in model.spec.names]
        near = difflib.get_close_matches(name, names, n=1)
        if near:
            hint = f"Did you mean {near[0]!r}?"
        elif names:
            hint = f"Available: {', '.join(sorted(names)[:8])}."
        else:
            hint = "No model is configured."
        return ModelNotFound(f"The model {name[:200]!r} does not exist here. {hint}", param="model")

    def live(self, model: str) -> list[Worker]:
        """Return the workers of a model that were not given up."""
        return [w for w in self.workers.values() if w.model == model and w.state in _LIVE]

    def ready(self, model: str) -> Worker | None:
        """Return the newest ready worker of a model."""
        ready = [w for w in self.workers.values() if w.model == model and w.state is WorkerState.READY]
        return max(ready, key=lambda w: w.generation, default=None)

    def job(self, generation: int) -> tuple[Model, Job] | None:
        """Return the job of this generation and its model; None when it is over."""
        for model in self.models.values():
            if model.job is not None and model.job.generation == generation:
                return model, model.job
        return None

    def _promised(self) -> list[Job]:
        return [m.job for m in self.models.values() if m.job and m.job.plan and not m.job.stage.started]

    def usable_bytes(self, device: Device) -> int:
        """Return the budget less what other programs make unusable of it."""
        if not device.total_bytes:
            return device.budget_bytes
        return max(0, min(device.budget_bytes, device.total_bytes - self.foreign_bytes.get(device.id, 0)))

    def occupied_bytes(self, device: str) -> int:
        """Return what worker processes may occupy now, the ones on their way out included."""
        return sum(w.reserved_bytes for w in self.workers.values() if w.device == device)

    def committed_bytes(self, device: str) -> int:
        """Return what will be held when everybody who was told to go has gone."""
        live = sum(w.reserved_bytes for w in self.workers.values() if w.device == device and w.state in _LIVE)
        return live + sum(j.plan.needed_bytes for j in self._promised() if j.plan and j.plan.device == device)

    def view(self, now_s: float) -> ClusterView:
        """Return what the policy decides on."""
        holders = [
            HolderView(
                id=w.id,
                model=w.model,
                device=w.device,
                reserved_bytes=w.reserved_bytes,
                busy=w.state is not WorkerState.READY or w.num_requests > 0 or now_s < w.hold_until_s,
                pinned=self.models[w.model].pinned,
                last_used_s=w.used_at_s,
            )
            for w in self.workers.values()
            if w.state in _LIVE
        ]
        holders += [
            HolderView(f"job-{j.generation}", j.model, j.plan.device, j.plan.needed_bytes, True, False, now_s)
            for j in self._promised()
            if j.plan
        ]
        devices = tuple(DeviceView(d.id, self.usable_bytes(d)) for d in self.devices.values())
        return ClusterView(devices, tuple(holders))

    def num_others(self, name: str) -> int:
        """Return how many configured models beside this one are not resident yet and will want memory."""
        return sum(
            1
            for m in self.models.values()
            if m.spec.configured and m.spec.has_files and m.spec.name != name and not self.live(m.spec.name)
        )

    def grow_budget(self, device: str, num_bytes: int) -> None:
        """Add to a budget that was measured while our own adopted worker already held part of the memory."""
        found = self.devices.get(device)
        if found is not None and found.kind == "cpu" and found.auto_budget:
            self.devices[device] = replace(found, budget_bytes=found.budget_bytes + num_bytes)


_LIVE = (WorkerState.LOADING, WorkerState.READY)

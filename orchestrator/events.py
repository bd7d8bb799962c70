"""Everything that can happen to the scheduler, as data. Posted by effects and by the service, in any order.

An event that belongs to one attempt carries its generation; when that attempt is over the event finds
nothing and changes nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hostler.config import HostlerConfig
from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2
from hostler.placement.v1 import placement_pb2

from orchestrator.devices import Device
from orchestrator.effects import FoundWorker
from orchestrator.models import Located, ModelSpec
from orchestrator.state import Progress, Waiter


@dataclass(frozen=True, slots=True)
class Ensure:
    """Somebody wants a model up. `explicit`: an operator, who also overrides a remembered failure."""

    model: str
    waiter: Waiter
    explicit: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """A waiter went away."""

    waiter: Waiter


@dataclass(frozen=True, slots=True)
class Unload:
    """An operator wants every replica of a model gone; the reply is how many went."""

    model: str
    reply: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class Sleep:
    """An operator wants every replica of a model asleep; the reply is how many went."""

    model: str
    reply: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator pins a model or lets it go."""

    model: str
    pinned: bool
    reply: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class AskPlan:
    """What would `Ensure` do?"""

    model: str
    reply: asyncio.Future[placement_pb2.PlanModelResponse]


@dataclass(frozen=True, slots=True)
class Planned:
    """The files of a model were looked up for an `AskPlan`."""

    ask: AskPlan
    located: Located | None
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class AskStatus:
    """What is there now?"""

    reply: asyncio.Future[placement_pb2.GetStatusResponse]


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain, unload and end."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class StoreListed:
    """The store was read again; None: it could not be."""

    specs: tuple[ModelSpec, ...] | None


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The configuration has changed while the server runs."""

    config: HostlerConfig


@dataclass(frozen=True, slots=True)
class WorkersFound:
    """Which workers outlived the last orchestrator; `stored`: it is known which models there are in the store."""

    workers: tuple[FoundWorker, ...]
    stored: bool = True


@dataclass(frozen=True, slots=True)
class WorkersSeen:
    """Which workers there are, on a later look; `last`: there will be no other."""

    workers: tuple[FoundWorker, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class ForeignMeasured:
    """What other programs hold, by device."""

    foreign_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostsMeasured:
    """What sleepers may still take of the host memory of machines with GPUs, by node; below zero: too much is taken."""

    spare_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class DevicesChanged:
    """The devices that there are now, all of them; `why` in words. `sleep_budget_bytes`: host memory by node."""

    devices: tuple[Device, ...]
    why: str
    sleep_budget_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlankReady:
    """A blank worker is up and answers, or not."""

    worker_id: str
    pid: int = 0
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class BlankLost:
    """A blank worker's heartbeat stream ended."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class LocateDone:
    """The store was asked for a model's files; None: not there."""

    generation: int
    located: Located | None
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class Progressed:
    """A fetch, spawn or load got further."""

    generation: int
    progress: Progress


@dataclass(frozen=True, slots=True)
class FetchDone:
    """A fetch ended."""

    generation: int
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A worker holds its model, or not."""

    generation: int
    info: lifecycle_pb2.ModelInfo | None = None
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class WakeDone:
    """A sleeping worker is back, or not. `generation` is the job's."""

    generation: int
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class SleepDone:
    """A worker sleeps, or could not. `generation` is the worker's."""

    generation: int
    freed_bytes: int = 0
    host_bytes: int = 0
    error: HostlerError | None = None


@dataclass(frozen=True, slots=True)
class ResizeDone:
    """What a worker's KV cache may grow to now; None: it did not say. `generation` is the worker's.

    `fixed`: it can never be resized.
    """

    generation: int
    kv_cache_bytes: int | None
    why: str
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Reported:
    """A worker's heartbeat."""

    generation: int
    report: lifecycle_pb2.WatchResponse


@dataclass(frozen=True, slots=True)
class WatchEnded:
    """A worker's heartbeat stream ended; `why` in words."""

    generation: int
    why: str


@dataclass(frozen=True, slots=True)
class Retired:
    """A worker process is gone and its memory with it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that could not be taken over is gone, and its memory with it."""

    worker_id: str


Event = (
    Ensure
    | Leave
    | Unload
    | Sleep
    | Pin
    | AskPlan
    | Planned
    | AskStatus
    | Stop
    | Tick
    | StoreListed
    | Reconfigured
    | WorkersFound
    | WorkersSeen
    | ForeignMeasured
    | HostsMeasured
    | DevicesChanged
    | BlankReady
    | BlankLost
    | LocateDone
    | Progressed
    | FetchDone
    | LoadDone
    | WakeDone
    | SleepDone
    | ResizeDone
    | Reported
    | WatchEnded
    | Retired
    | Ended
)

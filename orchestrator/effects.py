"""The scheduler's system calls: everything it does to the world, as one protocol.

Above it: the scheduler's parts. Below it: `effects_ray.py` (Ray, gRPC, the store, the clock); a fake with a
manual clock in tests. Coroutines raise `HostlerError` for what went wrong and may be cancelled at any await.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from hostler.lifecycle.v1 import lifecycle_pb2

from orchestrator.experience import Experience
from orchestrator.models import Located, ModelSpec
from orchestrator.nodes import NodesSeen
from orchestrator.state import Progress

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Placement:
    """What the run directory remembers of a worker, beyond what the worker itself can say.

    `parts`: device and bytes of each part that it was given; none for one that sleeps. `fenced`: its end was begun; it
    is remembered only because it may hold them still. `recipe`: of what it was loaded with (`models.recipe`); empty:
    not known.
    """

    worker_id: str
    generation: int
    model: str
    parts: tuple[tuple[str, int], ...]
    kv_cache_bytes: int
    reason: str
    loaded_unix_ms: int
    kv_keep_bytes: int = 0
    node: str = ""
    fenced: bool = False
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """What must survive the orchestrator: the last generation given out, and where workers were placed."""

    generation: int = 0
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundWorker:
    """A worker of an earlier orchestrator, on a machine (empty: this one).

    `report`: None when it does not answer. `started`: its process is known to have come up once; if not, one that does
    not answer may still be on its way.
    """

    worker_id: str
    report: lifecycle_pb2.WatchResponse | None
    placement: Placement | None = None
    node: str = ""
    started: bool = True


class Effects(Protocol):
    """What the scheduler can do. The clock is here too, so that tests can hold it."""

    def now_s(self) -> float:
        """Return monotonic seconds."""
        ...

    def unix_ms(self) -> int:
        """Return wall-clock milliseconds, for people."""
        ...

    def new_worker_id(self) -> str:
        """Return an id that was never used."""
        ...

    def address(self, worker_id: str) -> str:
        """Return the worker's gRPC target; one on another machine has it once it was spawned."""
        ...

    def recall_experience(self) -> Experience:
        """Return what earlier loads, of any run, have taught."""
        ...

    def remember_experience(self, experience: Experience) -> None:
        """Store what loads have taught, for later runs, too."""
        ...

    def recall(self) -> Memory:
        """Return what `remember` stored last, in this life or an earlier one."""
        ...

    def remember(self, memory: Memory) -> None:
        """Store what must survive this process."""
        ...

    async def find_workers(self) -> tuple[FoundWorker, ...]:
        """Return the living workers of an earlier orchestrator, waiting for Ray to be up."""
        ...

    def watch_nodes(self) -> AsyncIterator[NodesSeen]:
        """Yield what other machines offer, first those that are there already, then after every change."""
        ...

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        """Return every model in the store."""
        ...

    async def locate(self, spec: ModelSpec) -> Located | None:
        """Return the model's files and footprint if they are on this machine, else on another. No Internet."""
        ...

    async def bring(self, spec: ModelSpec, node: str, report: Report) -> Located:
        """Return the model's files on one machine, fetching them there if need be."""
        ...

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        """Bring the model's files to this machine. Cancelling ends the download; what came stays resumable."""
        ...

    async def measure_hosts(self) -> dict[str, int]:
        """Return what sleepers may still take of each GPU machine's memory, by node; below zero: that much too much.

        A machine that does not answer is left out.
        """

    async def measure_foreign(self, pids: Collection[int], reserved: dict[str, int]) -> dict[str, int]:
        """Return what other programs hold, by device."""
        ...

    async def spawn(self, worker_id: str, node: str) -> int:
        """Start a blank worker on a machine (empty: this one); return its pid once it serves."""
        ...

    async def load(
        self,
        worker_id: str,
        generation: int,
        request: lifecycle_pb2.LoadRequest,
        report: Report,
    ) -> lifecycle_pb2.ModelInfo:
        """Claim a blank worker for a generation and have it load its model."""
        ...

    async def sleep(self, worker_id: str, generation: int, deadline_s: float) -> lifecycle_pb2.SleepResponse:
        """Have the worker refuse new requests, finish the running ones and free its devices."""
        ...

    async def wake(self, worker_id: str, generation: int, devices: Sequence[str], kv_cache_bytes: int) -> None:
        """Have a sleeping worker serve again, on `devices` as its own process numbers them."""
        ...

    async def resize(self, worker_id: str, generation: int, kv_cache_bytes: int) -> int:
        """Change what the worker's KV cache may grow to; return what it is now."""
        ...

    def watch(self, worker_id: str, generation: int) -> AsyncIterator[lifecycle_pb2.WatchResponse]:
        """Yield the heartbeats of a worker, generation 0 for a blank one, until its stream ends."""
        ...

    async def drain(self, worker_id: str, generation: int, deadline_s: float) -> int:
        """Have the worker refuse new requests; return how many still run when it is empty or at the deadline."""
        ...

    async def unload(self, worker_id: str, generation: int) -> None:
        """Ask the worker to end itself."""
        ...

    async def kill(self, worker_id: str) -> None:
        """End the worker process for certain; return when it is gone. Never raises for a worker already gone."""
        ...

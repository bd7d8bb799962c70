"""A scheduler over fake effects: every outcome is the test's to give, and time stands until it is moved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

import pytest
from hostler.config import build
from hostler.errors import HostlerError
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.devices import Device
from orchestrator.effects import FoundWorker, Memory, Report
from orchestrator.experience import Experience
from orchestrator.models import Footprint, Located, ModelSpec
from orchestrator.nodes import NodesSeen
from orchestrator.scheduler import Scheduler
from orchestrator.state import Progress

MB = 1_000_000


class FakeWorker:
    """A worker process that does what the test says. Blank until a load claims it for a generation."""

    def __init__(self, worker_id: str, generation: int = 0, node: str = "") -> None:
        self.id, self.generation, self.node = worker_id, generation, node
        self.request: life.LoadRequest | None = None
        self.reports: asyncio.Queue[life.WatchResponse | Exception | None] = asyncio.Queue()
        self.num_steps = 0
        self.draining = self.unloaded = self.killed = self.asleep = False
        self.kv_cache_bytes = 0

    def say(
        self, state: Any = life.WORKER_STATE_READY, *, generation: int = 0, loads_lighter: bool = False, **values: Any
    ) -> None:
        model = self.request.model if self.request else ""
        self.reports.put_nowait(
            life.WatchResponse(
                state=state,
                generation=generation or self.generation,
                pid=1000 + self.generation,
                info=life.ModelInfo(model=model, loads_lighter=loads_lighter),
                **values,
            )
        )

    def break_stream(self, error: Exception | None = None) -> None:
        self.reports.put_nowait(error)


class FakeEffects:
    """Effects without a world. Gates hold an effect until the test opens them."""

    def __init__(self) -> None:
        self.clock_s = 1000.0
        self.num_ids = 0
        self.stored: dict[str, Footprint] = {}
        self.on_gpu: dict[str, Footprint] = {}
        self.listed: tuple[ModelSpec, ...] = ()
        self.found: tuple[FoundWorker, ...] = ()
        self.memory = Memory()
        self.by_id: dict[str, FakeWorker] = {}
        self.experience = Experience()
        self.sleep_error: HostlerError | None = None
        self.wake_errors: list[HostlerError] = []
        self.resized_at_least = 0
        self.calls: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.load_errors: list[HostlerError] = []
        self.spawn_errors: list[HostlerError] = []
        self.host_spare_bytes: int | None = None
        self.fetch_error: HostlerError | None = None
        self.kill_error: Exception | None = None
        self.drain_error: Exception | None = None
        self.cancelled: list[str] = []
        self.nodes: asyncio.Queue[NodesSeen] = asyncio.Queue()

    @property
    def workers(self) -> dict[int, FakeWorker]:
        """Those that were claimed, by generation."""
        return {worker.generation: worker for worker in self.by_id.values() if worker.generation}

    def hold(self, name: str) -> asyncio.Event:
        """Make an effect ("load:m", "fetch:m", "spawn", "drain" …) wait until the returned event is set."""
        return self.gates.setdefault(name, asyncio.Event())

    async def _pass(self, *names: str) -> None:
        for name in names:
            if name in self.gates:
                try:
                    await self.gates[name].wait()
                except asyncio.CancelledError:
                    self.cancelled.append(name)
                    raise

    def now_s(self) -> float:
        return self.clock_s

    def unix_ms(self) -> int:
        return int(self.clock_s * 1000)

    def new_worker_id(self) -> str:
        self.num_ids += 1
        return f"w{self.num_ids}"

    def address(self, worker_id: str) -> str:
        return f"unix:/run/w-{worker_id}.sock"

    def recall(self) -> Memory:
        return self.memory

    def remember(self, memory: Memory) -> None:
        self.memory = memory

    def recall_experience(self) -> Experience:
        return self.experience

    def remember_experience(self, experience: Experience) -> None:
        self.calls.append("learned")

    async def watch_nodes(self) -> AsyncIterator[NodesSeen]:
        while True:
            yield await self.nodes.get()

    async def find_workers(self) -> tuple[FoundWorker, ...]:
        await self._pass("find")
        return self.found

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        self.calls.append("list")
        return self.listed

    async def locate(self, spec: ModelSpec) -> Located | None:
        self.calls.append(f"locate:{spec.name}")
        await self._pass(f"locate:{spec.name}")
        footprint, on_gpu = self.stored.get(spec.name), self.on_gpu.get(spec.name)
        if footprint is None:
            return None
        return Located("/models/" + spec.name, footprint, on_gpu=Located("", on_gpu) if on_gpu else None)

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        self.calls.append(f"fetch:{spec.name}")
        report(Progress("download", "weights", 1, 2))
        await self._pass(f"fetch:{spec.name}")
        if self.fetch_error is not None:
            raise self.fetch_error
        self.stored[spec.name] = Footprint(10 * MB)

    async def bring(self, spec: ModelSpec, node: str, report: Report) -> Located:
        self.calls.append(f"bring:{spec.name}:{node}")
        report(Progress("download", f"fetching {spec.source} on {node}", 1, 2))
        await self._pass(f"bring:{spec.name}")
        return Located(f"/{node}/models/{spec.name}", self.stored[spec.name], node=node)

    async def measure_hosts(self) -> dict[str, int]:
        return {} if self.host_spare_bytes is None else {"": self.host_spare_bytes}

    async def measure_foreign(self, pids: Collection[int], reserved: dict[str, int]) -> dict[str, int]:
        return {}

    async def spawn(self, worker_id: str, node: str) -> int:
        self.calls.append(f"spawn:{worker_id}")
        await self._pass("spawn")
        if self.spawn_errors:
            raise self.spawn_errors.pop(0)
        self.by_id[worker_id] = FakeWorker(worker_id, 0, node)
        return 1000 + len(self.by_id)

    async def load(self, worker_id: str, generation: int, request: life.LoadRequest, report: Report) -> life.ModelInfo:
        self.calls.append(f"load:{request.model}")
        worker = self.by_id[worker_id]
        worker.request, worker.generation, worker.kv_cache_bytes = request, generation, request.kv_cache_bytes
        report(Progress("read", "", 5, 10))
        await self._pass(f"load:{request.model}")
        if self.load_errors:
            raise self.load_errors.pop(0)
        return life.ModelInfo(model=request.model)

    async def sleep(self, worker_id: str, generation: int, deadline_s: float) -> life.SleepResponse:
        worker = self.by_id[worker_id]
        self.calls.append(f"sleep:{worker.request.model if worker.request else ''}")
        await self._pass("sleep")
        if self.sleep_error is not None:
            raise self.sleep_error
        worker.asleep = True
        return life.SleepResponse(freed_bytes=MB, host_bytes=MB)

    async def wake(self, worker_id: str, generation: int, devices: Sequence[str], kv_cache_bytes: int) -> None:
        worker = self.by_id[worker_id]
        self.calls.append(f"wake:{worker.request.model if worker.request else ''}")
        await self._pass("wake")
        if self.wake_errors:
            raise self.wake_errors.pop(0)
        worker.asleep, worker.kv_cache_bytes = False, kv_cache_bytes

    async def resize(self, worker_id: str, generation: int, kv_cache_bytes: int) -> int:
        worker = self.by_id[worker_id]
        self.calls.append(f"resize:{worker.request.model if worker.request else ''}")
        await self._pass("resize")
        worker.kv_cache_bytes = max(kv_cache_bytes, self.resized_at_least)
        return worker.kv_cache_bytes

    async def watch(self, worker_id: str, generation: int) -> AsyncIterator[life.WatchResponse]:
        worker = self.by_id[worker_id]
        while (report := await worker.reports.get()) is not None:
            if isinstance(report, Exception):
                raise report
            yield report

    async def drain(self, worker_id: str, generation: int, deadline_s: float) -> int:
        self.by_id[worker_id].draining = True
        await self._pass("drain")
        if self.drain_error is not None:
            raise self.drain_error
        return 0

    async def unload(self, worker_id: str, generation: int) -> None:
        self.by_id[worker_id].unloaded = True

    async def kill(self, worker_id: str) -> None:
        self.calls.append(f"kill:{worker_id}")
        await self._pass("kill")
        if (worker := self.by_id.get(worker_id)) is not None:
            worker.killed = True
        if self.kill_error is not None:
            raise self.kill_error


class Caller:
    """One `ensure` call, collected."""

    def __init__(self, scheduler: Scheduler, model: str, explicit: bool = False) -> None:
        self.stages: list[str] = []
        self.progress: list[pb.EnsureProgress] = []
        self.ready: pb.Replica | None = None
        self.error: HostlerError | None = None
        self.task = asyncio.create_task(self._run(scheduler, model, explicit))

    async def _run(self, scheduler: Scheduler, model: str, explicit: bool) -> None:
        events = scheduler.ensure(model, explicit=explicit)
        try:
            async for event in events:
                if event.HasField("ready"):
                    self.ready = event.ready
                else:
                    self.stages.append(event.progress.stage)
                    self.progress.append(event.progress)
        except HostlerError as error:
            self.error = error
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class Rig:
    """Scheduler, fakes and the clock."""

    def __init__(self, effects: FakeEffects, scheduler: Scheduler) -> None:
        self.effects, self.scheduler = effects, scheduler
        self.task = asyncio.create_task(scheduler.run())

    async def settle(self) -> None:
        """Let everything that can happen without time passing happen."""
        for _ in range(60):
            await asyncio.sleep(0)

    async def advance(self, seconds: float, step_s: float = 0.25) -> None:
        """Move the clock in ticks, as the process does."""
        end_s = self.effects.clock_s + seconds
        while self.effects.clock_s < end_s - 1e-9:
            self.effects.clock_s = min(end_s, self.effects.clock_s + step_s)
            self.scheduler.post(events.Tick())
            await self.settle()

    async def advance_heard(self, seconds: float) -> None:
        """Move the clock while every living worker sends idle heartbeats."""
        for _ in range(round(seconds / 0.5)):
            for worker in self.effects.workers.values():
                if not worker.killed:
                    worker.say(num_steps=worker.num_steps)
            await self.settle()
            await self.advance(0.5)

    async def ensure(self, model: str, *, explicit: bool = False) -> Caller:
        caller = Caller(self.scheduler, model, explicit)
        await self.settle()
        return caller

    async def routes(self) -> dict[str, pb.ModelRoute]:
        async for table in self.scheduler.watch_routes():
            return {route.name: route for route in table.models}
        raise AssertionError

    def worker(self, model: str) -> FakeWorker:
        """The newest worker that was asked to load a model."""
        return max(
            (w for w in self.effects.workers.values() if w.request and w.request.model == model),
            key=lambda w: w.generation,
        )


@pytest.fixture
async def effects() -> FakeEffects:
    return FakeEffects()


@pytest.fixture
async def start(effects: FakeEffects) -> AsyncIterator[Callable[..., Any]]:
    rigs: list[Rig] = []

    async def begin(*models: str | dict[str, Any], budget: int = 100 * MB, **config: Any) -> Rig:
        entries = [{"name": m} if isinstance(m, str) else m for m in models]
        for entry in entries:
            effects.stored.setdefault(entry["name"], Footprint(40 * MB))
        device = Device("cpu", "cpu", "CPU", 0, budget)
        config = {"min_residency": 0, "warm_workers": 0} | config
        sleep = config.pop("sleep", 0)
        rig = Rig(effects, Scheduler(build({"models": entries, **config}), [device], effects, {"": sleep}))
        rigs.append(rig)
        await rig.settle()
        return rig

    yield begin
    for rig in rigs:
        rig.task.cancel()
        await asyncio.gather(rig.task, return_exceptions=True)

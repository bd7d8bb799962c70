"""The scheduler's system calls, carried out on the world, on behalf of one life of the orchestrator.

Above it: the scheduler. Below it: the world, the fates. What is checked here is what can be seen at the moment of the
call and never again: who is asked to load twice, whose running requests are cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from typing import Any

from hostler.errors import HostlerError, ModelLoadFailed, StaleGeneration, Unavailable, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life

from orchestrator.effects import FoundWorker, Memory, Report
from orchestrator.experience import Experience
from orchestrator.models import Located, ModelSpec
from orchestrator.nodes import NodesSeen
from orchestrator.state import Progress

from .fates import Fate
from .process import Phase, Process
from .world import World

SPAWN_TIMEOUT_S = 60.0
SLACK_S = 60.0


class WorldEffects:
    """What one orchestrator does to the world; nothing any more once it is dead."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead = False
        self._stock = {"models", "workers"}  # what an orchestrator looks for when it starts
        self._generations: dict[str, int] = {}

    # ------------------------------------------------------------ clock, names, memory

    def now_s(self) -> float:
        return self.world.loop.time()

    def unix_ms(self) -> int:
        return int(self.world.loop.time() * 1000)

    def new_worker_id(self) -> str:
        self.world.num_ids += 1
        return f"w{self.world.num_ids}"

    def address(self, worker_id: str) -> str:
        return f"unix:{worker_id}"

    def recall(self) -> Memory:
        return self.world.memory

    def remember(self, memory: Memory) -> None:
        if not self.dead:
            self.world.memory = memory

    def recall_experience(self) -> Experience:
        return Experience.from_json(self.world.experience.as_json())

    def remember_experience(self, experience: Experience) -> None:
        if not self.dead:
            self.world.experience = Experience.from_json(experience.as_json())

    # ------------------------------------------------------------ what all effects share

    async def _take(self, effect: str, what: str) -> Fate:
        """Take the time that the effect takes, and say how it ends. Dead callers wait for ever."""
        if self.dead:
            await self.world.loop.create_future()
        fate = self.world.fates.of(effect)
        seconds = self.world.fates.seconds(effect)
        self.world.tell(f"    → {effect} {what}: {fate.value} after {seconds:.2f} s")
        if seconds:
            await asyncio.sleep(seconds)
        return fate

    async def _simple(self, effect: str, what: str) -> None:
        if await self._take(effect, what) is Fate.FAILS:
            raise self.world.fates.error(effect)

    def _process(self, worker_id: str, generation: int) -> Process:
        process = self.world.processes.get(worker_id)
        if process is None or not process.alive:
            raise WorkerLost("no such process")
        if process.generation != generation:
            raise StaleGeneration(f"it is of generation {process.generation}")
        return process

    async def _outlive(self, future: asyncio.Future[Any], process: Process) -> Any:
        """Wait for an outcome; sometimes be so late with it that nobody wants it any more."""
        try:
            return await process.wait(future)
        except asyncio.CancelledError:
            if self.dead or not self.world.fates.happens(0.3):
                raise
            await asyncio.sleep(self.world.fates.seconds("load"))
            if future.done() and not future.cancelled() and future.exception() is None:
                return future.result()
            raise

    # ------------------------------------------------------------ store and devices

    @property
    def has_taken_stock(self) -> bool:
        return not self._stock

    async def find_workers(self) -> tuple[FoundWorker, ...]:
        try:
            await self._take("find", "workers")
        finally:
            self._stock.discard("workers")
        placements = {p.worker_id: p for p in self.recall().placements}
        return tuple(
            FoundWorker(p.id, None if p.frozen else p.report(), placements.get(p.id))
            for p in self.world.processes.values()
        )

    async def list_stored(self) -> tuple[ModelSpec, ...]:
        try:
            await self._simple("list", "models")
        finally:
            self._stock.discard("models")
        return tuple(self.world.listed.values())

    async def locate(self, spec: ModelSpec) -> Located | None:
        await self._simple("locate", spec.name)
        return self.world.locate(spec.name)

    async def watch_nodes(self) -> AsyncIterator[NodesSeen]:
        await asyncio.Event().wait()  # Machines come and go as `DevicesChanged`, which the walk posts itself.
        yield NodesSeen()

    async def bring(self, spec: ModelSpec, node: str, report: Report) -> Located:
        await self._simple("fetch", spec.name)
        found = self.world.locate(spec.name)
        if found is None:
            raise ModelLoadFailed(f"{spec.name} is not there")
        return replace(found, node=node)

    async def fetch(self, spec: ModelSpec, report: Report) -> None:
        report(Progress("download", "weights", 1, 2))
        await self._simple("fetch", spec.name)
        self.world.stored.add(spec.name)

    async def measure_hosts(self) -> dict[str, int]:
        await self._take("measure", "host memory")
        return self.world.host_spare_bytes()

    async def measure_foreign(self, pids: Collection[int], reserved: dict[str, int]) -> dict[str, int]:
        await self._take("measure", "foreign memory")
        return self.world.foreign_bytes()

    # ------------------------------------------------------------ processes

    async def spawn(self, worker_id: str, node: str) -> int:
        world, future = self.world, self.world.loop.create_future()
        if self.dead:
            await future
        fate, seconds = world.fates.of("spawn"), world.fates.seconds("spawn")
        world.tell(f"    → spawn {worker_id}: {fate.value} after {seconds:.2f} s")
        if fate is Fate.FAILS:
            await asyncio.sleep(seconds)
            if world.fates.happens(0.5):  # It may be there all the same.
                world.bear(worker_id, node, seconds, lambda process: None)
            raise world.fates.error("spawn")

        def born(process: Process) -> None:
            if not future.done():
                future.set_result(process.pid)

        world.bear(worker_id, node, SPAWN_TIMEOUT_S + 1 if fate is Fate.NEVER else seconds, born)
        try:
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                return int(await future)
        except TimeoutError:
            raise Unavailable("a worker process did not start") from None

    async def load(self, worker_id: str, generation: int, request: life.LoadRequest, report: Report) -> life.ModelInfo:
        world = self.world
        if self.dead:
            await world.loop.create_future()
        process = self._process(worker_id, 0)
        self._check_load(process, generation, request.model)
        process.generation, process.kind = generation, world.kind_for(request)
        process.devices = _visible(request)
        process.kv_bytes, process.max_running = request.kv_cache_bytes, request.max_running
        process.become(Phase.LOADING)
        report(Progress("import"))
        fate, seconds = world.fates.of("load"), world.fates.seconds("load")
        world.tell(f"    → load {request.model} in {worker_id} g{generation}: {fate.value} after {seconds:.2f} s")
        future = world.loop.create_future()

        def over() -> None:
            report(Progress("read", "", 5, 10))
            self._finish(process, future, fate, "load", Phase.LOADING, Phase.READY, Phase.FAILED)

        world.loop.call_later(seconds, over)
        await self._outlive(future, process)
        return life.ModelInfo(model=request.model)

    def _finish(
        self,
        process: Process,
        future: asyncio.Future[Any],
        fate: Fate,
        effect: str,
        during: Phase,
        after: Phase,
        failed: Phase,
        result: Any = None,
    ) -> None:
        """Let what a process does come to its end, unless something else has come in between."""
        if not process.alive or process.phase is not during or fate is Fate.NEVER:
            return
        if process.frozen:
            self.world.loop.call_later(0.5, self._finish, process, future, fate, effect, during, after, failed, result)
        elif fate in (Fate.DIES, Fate.FREEZES):
            self.world.afflict(process, fate)
        elif fate is Fate.FAILS:
            process.unsound = True
            process.become(failed)
            if not future.done():
                future.set_exception(self.world.fates.error(effect))
        else:
            process.become(after)
            if not future.done():
                future.set_result(result)

    def _check_load(self, process: Process, generation: int, model: str) -> None:
        world = self.world
        if process.phase is not Phase.BLANK:
            world.breach("a worker loads once", f"{process.id} ({process.phase.value}) was asked to load {model}")
        if generation <= world.earlier_generation or generation in world.generations:
            world.breach("generations rise", f"{generation} was used before, or is older than an earlier life's")
        world.generations.add(generation)
        self._check_alone(process, model)

    def _check_alone(self, process: Process, model: str) -> None:
        """See that no model is loaded or woken more often than it may have replicas."""
        self.world.num_attempts[model] += 1
        held = [
            other
            for other in self.world.processes.values()
            if other.model == model and other is not process and not other.doomed and not other.unsound
            if other.phase in (Phase.LOADING, Phase.READY, Phase.WAKING) and not self.world.is_leaving(other.id)
        ]
        most = next((m.max_replicas for m in self.world.shape.config.models if m.name == model), 1)
        if len(held) >= most:
            ids = ", ".join(f"{other.id} ({other.phase.value})" for other in held)
            self.world.breach("no double load", f"{process.id} beside {ids}, of {model}, which may have {most}")

    async def kill(self, worker_id: str) -> None:
        world = self.world
        if self.dead:
            await world.loop.create_future()
        process = world.processes.get(worker_id)
        if (birth := world.births.pop(worker_id, None)) is not None:
            birth.stillborn = True
        if process is not None:
            self._check_cut(process, "killed")
            process.doomed = True
        fate, seconds = world.fates.of("kill"), world.fates.seconds("kill")
        world.tell(f"    → kill {worker_id}: {fate.value} after {seconds:.2f} s")
        if seconds:
            if process is not None:
                world.loop.call_later(seconds, world.end, process)
            await asyncio.sleep(seconds)
        elif process is not None:
            world.end(process)
        if fate is Fate.FAILS:
            raise world.fates.error("kill")

    def _check_cut(self, process: Process, how: str) -> None:
        over = self.now_s() >= process.drained_until_s
        if process.requests and not process.unsound and not process.doomed and not over:
            text = f"{process.id} ({process.model}) was {how} with {len(process.requests)} requests"
            self.world.breach("what runs is never cut off", text)

    # ------------------------------------------------------------ calls to a worker

    async def sleep(self, worker_id: str, generation: int, deadline_s: float) -> life.SleepResponse:
        process = await self._reach("sleep", worker_id, generation)
        kind = process.kind
        assert kind is not None
        if process.phase is not Phase.READY:
            raise Unavailable(f"it is {process.phase.value}")
        process.become(Phase.RESTING)
        done = life.SleepResponse(freed_bytes=kind.own_bytes + process.kv_bytes, host_bytes=kind.own_bytes)
        await self._once_idle(process, "sleep", (Phase.RESTING, Phase.ASLEEP, Phase.READY), deadline_s + SLACK_S, done)
        return done

    async def wake(self, worker_id: str, generation: int, devices: Sequence[str], kv_cache_bytes: int) -> None:
        process = await self._reach("wake", worker_id, generation)
        if process.phase is not Phase.ASLEEP:
            raise Unavailable(f"it is {process.phase.value}")
        self._check_alone(process, process.model)
        if len(devices) > len(process.devices):
            raise Unavailable(f"it sees {len(process.devices)} devices")
        process.kv_bytes = kv_cache_bytes
        process.become(Phase.WAKING)
        await self._once_idle(process, "wake", (Phase.WAKING, Phase.READY, Phase.ASLEEP), None, None)

    async def _once_idle(
        self, process: Process, effect: str, phases: tuple[Phase, Phase, Phase], timeout_s: float | None, result: Any
    ) -> None:
        """Have a process change once its requests have ended: from the first phase to the second, or the third."""
        world, future = self.world, self.world.loop.create_future()
        fate, seconds = world.fates.of(effect), world.fates.seconds(effect)
        world.tell(f"    → {effect} {process.id} ({process.model}): {fate.value} {seconds:.2f} s after it is idle")
        during, after, failed = phases

        def idle() -> None:
            world.loop.call_later(seconds, self._finish, process, future, fate, effect, during, after, failed, result)

        process.once_idle(idle)
        try:
            async with asyncio.timeout(timeout_s):
                await self._outlive(future, process)
        except TimeoutError:
            process.unsound = True
            raise Unavailable(f"{effect}: deadline exceeded") from None

    async def resize(self, worker_id: str, generation: int, kv_cache_bytes: int) -> int:
        process = await self._reach("resize", worker_id, generation)
        fate = self.world.fates.of("resize")
        await process.call(self.world.fates.seconds("resize"))
        if fate in (Fate.DIES, Fate.FREEZES):
            self.world.afflict(process, fate)
            raise WorkerLost("the connection broke")
        if fate is Fate.FAILS:
            raise self.world.fates.error("resize")
        if process.phase.holds:
            process.kv_bytes = max(kv_cache_bytes, process.kv_held_bytes)
            process.say()
        self.world.tell(f"    → resize {worker_id} ({process.model}) is {process.kv_bytes >> 20} MiB")
        if fate is Fate.NEVER:  # It was done; the answer is lost.
            await asyncio.sleep(SLACK_S)
            raise Unavailable("resize: deadline exceeded")
        return process.kv_bytes

    async def watch(self, worker_id: str, generation: int) -> AsyncIterator[life.WatchResponse]:
        process = self._process(worker_id, generation)
        stream = process.listen()
        try:
            while (said := await stream.get()) is not None:
                if isinstance(said, HostlerError):
                    raise said
                yield said
        finally:
            if stream in process.streams:
                process.streams.remove(stream)

    async def drain(self, worker_id: str, generation: int, deadline_s: float) -> int:
        process = await self._reach("drain", worker_id, generation)
        process.drained_until_s = self.now_s() + deadline_s
        process.become(Phase.ASLEEP if process.phase is Phase.ASLEEP else Phase.DRAINING)
        future = self.world.loop.create_future()
        fate = self.world.fates.of("drain")
        if fate is Fate.FAILS:
            process.unsound = True
            raise self.world.fates.error("drain")
        if fate in (Fate.DIES, Fate.FREEZES):
            self.world.loop.call_later(self.world.fates.seconds("drain"), self.world.afflict, process, fate)

        def over() -> None:
            if not future.done():
                future.set_result(len(process.requests))

        if fate is not Fate.NEVER:
            process.once_idle(over)
        timer = self.world.loop.call_later(deadline_s, over)
        try:
            return int(await process.wait(future))
        finally:
            timer.cancel()

    async def unload(self, worker_id: str, generation: int) -> None:
        process = await self._reach("unload", worker_id, generation)
        await self._simple("unload", worker_id)
        self._check_cut(process, "unloaded")
        self.world.end(process)

    async def _reach(self, effect: str, worker_id: str, generation: int) -> Process:
        """Return the process once it has taken the call."""
        if self.dead:
            await self.world.loop.create_future()
        process = self._process(worker_id, generation)
        await process.call(self.world.fates.seconds(effect) if self.world.fates.happens(0.3) else 0.0)
        return self._process(worker_id, generation)


def _visible(request: life.LoadRequest) -> tuple[str, ...]:
    """Return which devices a process can see from now on, by their ids."""
    names = request.environment["CUDA_VISIBLE_DEVICES"]
    return tuple(f"cuda:{name.removeprefix('GPU-')}" for name in names.split(",") if name)

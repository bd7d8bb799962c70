"""The same trace through the real scheduler, with all its parts, in the proof's virtual time: does the world here tell
the truth about it?

Above it: `tests/orchestrator/test_sim.py`. Below it: the proof's loop, world and effects, with the hardware's times.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Any

from hostler.lifecycle.v1 import lifecycle_pb2 as life

from orchestrator import events
from orchestrator.devices import SLEEP_SHARE_BESIDE_GPUS
from orchestrator.effects import Report
from orchestrator.models import Footprint
from orchestrator.scheduler import Scheduler
from orchestrator.views import Rules
from tests.orchestrator.proof import shapes
from tests.orchestrator.proof.callers import running
from tests.orchestrator.proof.effects import WorldEffects
from tests.orchestrator.proof.fates import Fates
from tests.orchestrator.proof.loop import VirtualLoop
from tests.orchestrator.proof.process import Process
from tests.orchestrator.proof.world import World

from .hardware import GB, Hardware, PageCache
from .traces import MAX_RUNNING, Asked, Served, Trace

TICK_S = 0.5
RULES = Rules(shapes.MIN_RESIDENCY_S, shapes.MAX_WAIT_S)
"""Those that the proof's shapes are configured with."""


@dataclass(frozen=True, slots=True)
class ServedKind(shapes.Kind):
    """A model of a trace as a kind of the proof's."""

    served: Served | None = None

    @property
    def footprint(self) -> Footprint:
        assert self.served is not None
        return self.served.located.footprint


class TimedFates(Fates):
    """Everything goes well, in the time that was set for it."""

    seconds_s = 0.0

    def seconds(self, effect: str) -> float:
        if effect not in ("load", "wake", "sleep", "unload"):
            return 0.0
        taken_s, self.seconds_s = self.seconds_s, 0.0
        return taken_s


class TimedEffects(WorldEffects):
    """The proof's effects with the hardware's times; `reload_s` counts loads and wakes."""

    def __init__(self, world: World, fates: TimedFates, trace: Trace) -> None:
        super().__init__(world)
        self._fates, self._trace, self._hardware = fates, trace, Hardware()
        self._cache = PageCache(int(trace.host_gb * GB * (1 - SLEEP_SHARE_BESIDE_GPUS)))
        self.reload_s = 0.0
        self.num_loads = self.num_wakes = self.num_hand_overs = 0

    async def load(self, worker_id: str, generation: int, request: life.LoadRequest, report: Report) -> life.ModelInfo:
        weight_bytes = self._trace.by_name[request.model].weight_bytes
        if request.shelf:
            took_s = self._hardware.hand_over_s(weight_bytes)
            self.num_hand_overs += 1
        else:
            took_s = self._hardware.load_s(weight_bytes, cached=self._cache.read(request.model, weight_bytes))
            self.num_loads += 1
        self.reload_s += took_s
        self._fates.seconds_s = took_s
        return await super().load(worker_id, generation, request, report)

    async def _once_idle(self, process: Process, effect: str, *rest: Any) -> None:
        weight_bytes = self._trace.by_name[process.model].weight_bytes
        if effect == "wake":
            self._fates.seconds_s = self._hardware.wake_s(weight_bytes)
            self.num_wakes, self.reload_s = self.num_wakes + 1, self.reload_s + self._fates.seconds_s
        else:
            self._fates.seconds_s = self._hardware.sleep_s(weight_bytes)
        await super()._once_idle(process, effect, *rest)

    async def unload(self, worker_id: str, generation: int) -> None:
        self._fates.seconds_s = self._hardware.evict_s
        await super().unload(worker_id, generation)


class RealRun:
    """One trace through the real scheduler. `run` it once; then `effects` has the counts, `num_served` the requests."""

    def __init__(self, trace: Trace) -> None:
        mb = shapes.MB
        self._trace, self._loop = trace, VirtualLoop()  # type: ignore[abstract]
        shape = shapes.Shape(
            trace.name,
            tuple((int(gb * GB) // mb,) * 2 for gb in trace.device_gb),
            int(trace.host_gb * GB * SLEEP_SHARE_BESIDE_GPUS) // mb,
            tuple(
                ServedKind(m.name, m.weight_bytes // mb, options=(("max_running", MAX_RUNNING),), served=m)
                for m in trace.models
            ),
        )
        self._world = World(self._loop, shape, random.Random(0))
        self._world.fates = fates = TimedFates(random.Random(0), calm=True)
        self.effects = TimedEffects(self._world, fates, trace)
        self.num_served = 0
        self._tasks: list[asyncio.Task[None]] = []
        with running(self._loop):
            self._scheduler = Scheduler(
                shape.config, tuple(self._world.devices.values()), self.effects, self._world.sleep_budgets()
            )
            self._task = self._loop.create_task(self._scheduler.run())

    def run(self, rest_s: float = 120.0) -> None:
        """Let every request come at its time, then let what waits end."""
        log = logging.getLogger("orchestrator")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            began_s = self._loop.time()
            for asked in self._trace.asked:
                self._until(began_s + asked.at_s)
                self._tasks.append(self._loop.create_task(self._ask(asked)))
            self._until(self._loop.time() + rest_s)
        finally:
            with running(self._loop):
                self._task.cancel()
                for task in self._tasks:
                    task.cancel()
                self._loop.settle()
            log.setLevel(level)

    def _until(self, when_s: float) -> None:
        while (left_s := when_s - self._loop.time()) > 1e-9:
            self._loop.advance(min(TICK_S, left_s))
            self._scheduler.post(events.Tick())
            self._loop.settle()

    async def _ask(self, asked: Asked) -> None:
        """Go where the routes say, or wait for the model, as a gateway does."""
        while True:
            replica = await self._replica(asked.model)
            process = self._world.processes.get(replica.id)
            if process is not None and self._world.ask(process, asked.runs_s) is not None:
                self.num_served += 1
                return

    async def _replica(self, model: str) -> Any:
        latest = self._scheduler._runtime.routes.latest
        for route in latest.models if latest else ():
            if route.name == model and route.replicas:
                return route.replicas[0]
        async for event in self._scheduler.ensure(model):
            if event.HasField("ready"):
                return event.ready
        raise AssertionError("neither ready nor refused")

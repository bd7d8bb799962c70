"""What the scheduler's parts share: the state, the effects, the event queue, the tasks, the published routes.

Above it: `scheduler.py` and its parts. Below it: `effects.py`, `state.py`, `cluster.py`.
Only the scheduler's task calls into it, except `post`, which any task of the same loop may call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from hostler.config import HostlerConfig
from hostler.errors import HostlerError, Internal
from hostler.placement.v1 import placement_pb2

from orchestrator import wire
from orchestrator.cluster import Cluster
from orchestrator.effects import Effects, Memory, Placement
from orchestrator.events import Event
from orchestrator.journal import Journal
from orchestrator.models import ModelSpec
from orchestrator.state import Job, Worker, WorkerState
from orchestrator.views import Rules

log = logging.getLogger(__name__)


class RouteFeed:
    """The latest route table, for any number of watchers. A slow watcher skips versions, never blocks."""

    def __init__(self) -> None:
        self._latest: placement_pb2.WatchRoutesResponse | None = None
        self._changed = asyncio.Event()

    @property
    def latest(self) -> placement_pb2.WatchRoutesResponse | None:
        """The last table published; None before the first."""
        return self._latest

    def publish(self, models: list[placement_pb2.ModelRoute]) -> None:
        """Give watchers a new table unless it says the same as the last."""
        version = 1
        if self._latest is not None:
            if list(self._latest.models) == models:
                return
            version = self._latest.version + 1
        self._latest = placement_pb2.WatchRoutesResponse(version=version, models=models)
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[placement_pb2.WatchRoutesResponse]:
        """Yield the table now (or the first one, when there is one), then after every change. Never ends."""
        seen = 0
        while True:
            changed = self._changed
            if self._latest is not None and self._latest.version != seen:
                seen = self._latest.version
                yield self._latest
            else:
                await changed.wait()


class Runtime:
    """State, effects and the tasks that run effects on the scheduler's behalf."""

    def __init__(self, config: HostlerConfig, cluster: Cluster, effects: Effects) -> None:
        self.config = config
        self.cluster = cluster
        self.effects = effects
        self.rules = Rules(min_residency_s=config.min_residency, max_wait_s=config.max_wait)
        self.routes = RouteFeed()
        self.journal = Journal(effects.unix_ms)
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.started_unix_ms = effects.unix_ms()
        self.may_publish = False
        self.stopping = False
        self._tasks: dict[asyncio.Task[None], int] = {}

    def post(self, event: Event) -> None:
        """Queue an event; the scheduler handles it after those before it."""
        self.queue.put_nowait(event)

    def run(self, work: Coroutine[Any, Any, None], generation: int = 0) -> None:
        """Run an effect as a task that `cancel(generation)` can end. It must post its own outcome."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = generation
        task.add_done_callback(self._ended)

    def run_stage(self, job: Job, work: Coroutine[Any, Any, None], on_error: Callable[[HostlerError], Event]) -> None:
        """Run one stage of a job; whatever goes wrong in it becomes the stage's own failure event."""

        async def guarded() -> None:
            try:
                await work
            except HostlerError as error:
                self.post(on_error(error))
            except Exception as error:
                log.exception("an effect failed", extra={"model": job.model, "generation": job.generation})
                self.post(on_error(Internal(f"an internal error ({type(error).__name__}); see the log")))

        self.run(guarded(), job.generation)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an effect failed without posting an outcome", exc_info=error)

    def cancel(self, generation: int) -> None:
        """Cancel every effect of one attempt."""
        for task, owner in list(self._tasks.items()):
            if owner == generation:
                task.cancel()

    async def cancel_all(self) -> None:
        """Cancel every effect and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def kill(self, worker_id: str) -> None:
        """End a worker process. Never raises: whatever went wrong, whoever waits for its end must go on."""
        try:
            await self.effects.kill(worker_id)
        except Exception:
            log.exception("killing a worker failed", extra={"worker": worker_id})

    def next_generation(self) -> int:
        """Return a number that no placement had before, in this life or an earlier one."""
        self.cluster.generation += 1
        self.remember()
        return self.cluster.generation

    def remember(self) -> None:
        """Store what the next orchestrator must know to take our workers over."""
        ours = (_placement(worker) for worker in self.cluster.workers.values())
        self.effects.remember(Memory(self.cluster.generation, (*ours, *self.cluster.ending.values())))

    def learn(self, spec: ModelSpec, worker: Worker, **seen: float) -> None:
        """Take a measurement of a worker in, and store it when it says something new.

        Bytes of a load that leaves later ones less to hold say nothing about those: they go by what is known. Nor do
        those of a split model say what it holds whole.
        """
        lighter = worker.report is not None and worker.report.info.loads_lighter
        if lighter or len(worker.parts) > 1 or len(worker.home) > 1:
            seen = {key: value for key, value in seen.items() if not key.endswith("_bytes")}
            if not seen:
                return
        if worker.located is not None and self.cluster.experience.learn(spec, worker.located, worker.kind, **seen):
            self.effects.remember_experience(self.cluster.experience)

    def publish(self) -> None:
        """Publish the routes as they are now. Held back until it is known which workers live."""
        if self.may_publish:
            self.routes.publish(wire.routes(self.cluster))


def _placement(worker: Worker) -> Placement:
    return Placement(
        worker_id=worker.id,
        generation=worker.generation,
        model=worker.model,
        parts=tuple((part.device, part.num_bytes) for part in worker.parts),
        kv_cache_bytes=worker.kv_cache_bytes + worker.owed_bytes,
        reason=worker.reason,
        loaded_unix_ms=worker.loaded_unix_ms,
        kv_keep_bytes=worker.kv_keep_bytes,
        node=worker.node,
        fenced=worker.state is WorkerState.LOST,
        recipe=worker.recipe,
    )

"""Blank workers: processes that have everything imported and no model yet. Every worker begins as one.

Above it: `starting.py`, which takes them or orders one, and the scheduler (ticks, adoption). Below it: the effects.

Some are started ahead, so that a load is only bytes: only while some model with files is not resident, for what is all
loaded needs none; one at a time, and not while a load is under way, for their imports cost seconds of CPU. Streams feel
them, too (on two cores gaps of 60 ms where a token takes 11), so a start waits a while for its machine to serve nobody.
One that is still starting is never killed, because Ray holds the next start up for as long as a start may take: a load
that is given up leaves it to the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from hostler.errors import HostlerError, WorkerLost

from orchestrator import events
from orchestrator.runtime import Runtime

log = logging.getLogger(__name__)

CALM_S, PATIENCE_S = 2.0, 30.0
"""How long a machine's workers must have been idle for a start, and how long it waits for that."""
RETRY_S = 5.0
"""After a blank that could not be started, or died, for no reason that we know."""


@dataclass(slots=True)
class Blank:
    """One blank worker process. `pid`: 0 until it is up. `generation`: of the load that waits for it, if one does."""

    id: str
    node: str
    pid: int = 0
    generation: int = 0


class Pool:
    """Every method is called by the scheduler's task and returns at once.

    Attributes:
        on_ordered: what to do when one that a load has ordered is up (its pid), or could not be started; set by
            `starting.py`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._blanks: dict[str, Blank] = {}
        self._not_before_s = 0.0
        self._missing_since_s: dict[str, float] = {}
        self.on_ordered: Callable[[int, int, HostlerError | None], None] = lambda generation, pid, error: None

    def num_ready(self, node: str) -> int:
        """Return how many blanks stand ready on a node."""
        return sum(1 for blank in self._blanks.values() if blank.pid and blank.node == node)

    def take(self, node: str) -> Blank | None:
        """Return a blank to be claimed on a node, if one is ready. It is the caller's from now on."""
        found = next((b for b in self._blanks.values() if b.pid and b.node == node), None)
        if found is not None:
            del self._blanks[found.id]
        return found

    def order(self, node: str, generation: int) -> Blank:
        """Return a blank that is starting on a node, and tell the load when it is up."""
        starting = (b for b in self._blanks.values() if not b.pid and not b.generation and b.node == node)
        blank = next(starting, None) or self._start(node)
        blank.generation = generation
        return blank

    def release(self, generation: int) -> None:
        """Leave to others what a load has ordered that is given up."""
        for blank in self._blanks.values():
            if blank.generation == generation:
                blank.generation = 0

    def knows(self, worker_id: str) -> bool:
        """Return whether a process is one of these."""
        return worker_id in self._blanks

    def adopt(self, worker_id: str, node: str, pid: int) -> None:
        """Take over a blank of the last orchestrator."""
        self._watch(Blank(worker_id, node, pid))

    def _watch(self, blank: Blank) -> None:
        self._blanks[blank.id] = blank
        self._runtime.run(self._listen(blank.id))

    async def _listen(self, worker_id: str) -> None:
        try:
            async for report in self._runtime.effects.watch(worker_id, 0):
                if report.generation:
                    return  # Claimed: from now on its load and its own watch tell how it fares.
        except HostlerError:
            pass
        except Exception:
            log.exception("listening to a blank worker failed", extra={"worker": worker_id})
        self._runtime.post(events.BlankLost(worker_id))

    def on_lost(self, event: events.BlankLost) -> None:
        """Forget a blank that died; one that was taken is its load's to mourn."""
        if self._blanks.pop(event.worker_id, None) is not None:
            log.warning("a blank worker died", extra={"worker": event.worker_id})
            self._not_before_s = self._runtime.effects.now_s() + RETRY_S
            self._runtime.run(self._runtime.kill(event.worker_id))

    def tick(self, now_s: float) -> None:
        """Start a blank where one is missing; end one that is not needed any more."""
        cluster = self._runtime.cluster
        if self._runtime.stopping or not self._runtime.may_publish:
            return
        if any(model.job is not None and model.job.stage.started for model in cluster.models.values()):
            return
        resident = {worker.model for worker in cluster.workers.values()}
        num_missing = sum(1 for m in cluster.models.values() if m.spec.has_files and m.spec.name not in resident)
        wanted = min(self._runtime.config.warm_workers, num_missing)
        serving = {w.node for w in cluster.workers.values() if w.num_requests or now_s - w.used_at_s < CALM_S}
        for node in {device.node for device in cluster.devices.values()}:
            mine = [blank for blank in self._blanks.values() if blank.node == node and not blank.generation]
            if len(mine) > wanted and mine[-1].pid:
                self._end(mine[-1])
            if len(mine) >= wanted or any(not blank.pid for blank in mine):
                self._missing_since_s.pop(node, None)
                continue
            waited_s = now_s - self._missing_since_s.setdefault(node, now_s)
            if now_s >= self._not_before_s and (node not in serving or waited_s >= PATIENCE_S):
                self._start(node)

    def _start(self, node: str) -> Blank:
        blank = Blank(self._runtime.effects.new_worker_id(), node)
        self._blanks[blank.id] = blank
        self._runtime.run(self._spawn(blank))
        return blank

    async def _spawn(self, blank: Blank) -> None:
        try:
            pid = await self._runtime.effects.spawn(blank.id, blank.node)
            self._runtime.post(events.BlankReady(blank.id, pid))
        except HostlerError as error:
            self._runtime.post(events.BlankReady(blank.id, error=error))
        except Exception:
            log.exception("starting a blank worker failed", extra={"worker": blank.id})
            self._runtime.post(events.BlankReady(blank.id, error=WorkerLost("it could not be started")))

    def on_ready(self, event: events.BlankReady) -> None:
        """Hand a blank that came up to the load that waits for it, or keep it; try again later when it did not."""
        blank = self._blanks.get(event.worker_id)
        if blank is None:
            self._runtime.run(self._runtime.kill(event.worker_id))
            return
        if event.error is not None:
            log.warning("a blank worker could not be started", extra={"error": event.error.message})
            self._not_before_s = self._runtime.effects.now_s() + RETRY_S
            self._runtime.run(self._runtime.kill(blank.id))
        if blank.generation or event.error is not None:
            del self._blanks[blank.id]
        if blank.generation:
            self.on_ordered(blank.generation, event.pid, event.error)
        elif event.error is None:
            blank.pid = event.pid
            self._watch(blank)

    def _end(self, blank: Blank) -> None:
        del self._blanks[blank.id]
        self._runtime.run(self._runtime.kill(blank.id))

    def close(self) -> None:
        """End every blank."""
        for blank in list(self._blanks.values()):
            self._end(blank)

"""Ending workers: gently (drain, unload, kill) or at once (kill). Either way `Retired` follows.

Above it: `placing.py` (evictions), `loading.py` (failed attempts), `resting.py` (keep-alive), `watching.py` (fencing),
the scheduler (unload, stop). Below it: the effects.
"""

from __future__ import annotations

import logging

from hostler.errors import HostlerError
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator.events import Retired
from orchestrator.runtime import Runtime
from orchestrator.state import Worker, WorkerState

log = logging.getLogger(__name__)

EVICTION_DRAIN_S = 600.0
"""An eviction chose an idle model; a request that slipped in meanwhile is allowed to end."""


class Retiring:
    """Takes workers out of service. Their memory stays occupied in the ledger until the process is gone."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def gently(
        self, worker: Worker, drain_s: float, why: str, kind: pb.EventKind.ValueType = pb.EVENT_KIND_EVICTED
    ) -> None:
        """Take a ready worker off the routes, let its requests end, then end it; a sleeping one at once."""
        if worker.state not in (WorkerState.READY, WorkerState.RESTING, WorkerState.ASLEEP):
            return
        asleep = worker.state is WorkerState.ASLEEP
        worker.state = WorkerState.DRAINING
        log.info("draining a worker", extra={"worker": worker.id, "model": worker.model, "why": why})
        self._runtime.journal.note(
            kind,
            why,
            model=worker.model,
            device=worker.devices,
            replica=worker.id,
            num_bytes=worker.reserved_bytes or worker.sleep_bytes,
        )
        self._runtime.run(self._kill(worker) if asleep else self._drain(worker, drain_s))
        self._runtime.publish()

    def at_once(self, worker: Worker, why: str) -> None:
        """Fence a worker: nothing it says counts any more, and its process is killed."""
        if worker.state is WorkerState.LOST:
            return
        worker.state = WorkerState.LOST
        log.warning("killing a worker", extra={"worker": worker.id, "model": worker.model, "why": why})
        self._runtime.cancel(worker.generation)
        self._runtime.remember()
        self._runtime.run(self._kill(worker))
        self._runtime.publish()

    def gone(self, generation: int) -> Worker | None:
        """Take a worker whose process has ended out of the ledger; None if that was done before."""
        worker = self._runtime.cluster.workers.pop(generation, None)
        if worker is not None:
            self._runtime.cancel(generation)
            self._runtime.remember()
            self._runtime.publish()
        return worker

    async def _drain(self, worker: Worker, drain_s: float) -> None:
        effects = self._runtime.effects
        try:
            num_remaining = await effects.drain(worker.id, worker.generation, drain_s)
            if num_remaining:
                log.warning("requests were cut off", extra={"worker": worker.id, "num_requests": num_remaining})
            await effects.unload(worker.id, worker.generation)
        except HostlerError as error:  # It died or froze on the way: the kill below is what counts.
            log.info("a worker did not drain", extra={"worker": worker.id, "error": error.message})
        except Exception:
            log.exception("draining a worker failed", extra={"worker": worker.id})
        await self._kill(worker)

    async def _kill(self, worker: Worker) -> None:
        await self._runtime.kill(worker.id)
        self._runtime.post(Retired(worker.generation))

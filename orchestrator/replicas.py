"""How many replicas a busy model has: more while requests queue and there is free room, fewer once they idle.

Above it: the scheduler's tick. Below it: `loading.py`, `retiring.py`.
"""

from __future__ import annotations

from orchestrator.loading import Loading
from orchestrator.retiring import EVICTION_DRAIN_S, Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Model, Worker

CROWDED_S = 2.0
"""Requests must have queued for so long before another replica is worth its load."""
ROOMY_S = 60.0
"""The remaining replicas must have been able to hold everything for so long before one goes."""


class Replicas:
    """Called once a tick by the scheduler's task."""

    def __init__(self, runtime: Runtime, loading: Loading, retiring: Retiring) -> None:
        self._runtime = runtime
        self._loading = loading
        self._retiring = retiring

    def tick(self, now_s: float) -> None:
        """Judge every model that has, or may have, more than one replica."""
        for model in self._runtime.cluster.models.values():
            ready = self._runtime.cluster.ready(model.spec.name)
            if ready and (model.spec.max_replicas > 1 or len(ready) > 1):
                self._grow(model, ready, now_s)
                self._shrink(model, ready, now_s)

    def _grow(self, model: Model, ready: list[Worker], now_s: float) -> None:
        num_queued = sum(worker.report.num_queued for worker in ready if worker.report)
        if not num_queued or len(ready) >= model.spec.max_replicas or model.job is not None:
            model.crowded_since_s = None
        elif model.crowded_since_s is None:
            model.crowded_since_s = now_s
        elif now_s - model.crowded_since_s >= CROWDED_S and now_s >= model.replica_retry_at_s:
            model.crowded_since_s = None
            self._loading.start(model, replica=True)

    def _shrink(self, model: Model, ready: list[Worker], now_s: float) -> None:
        num_requests = sum(worker.num_requests for worker in ready)
        fewer = len(ready) - 1
        fits = num_requests <= fewer * max(1, model.spec.max_running // 2)
        if not fewer or not fits:
            model.roomy_since_s = None
        elif model.roomy_since_s is None:
            model.roomy_since_s = now_s
        elif now_s - model.roomy_since_s >= ROOMY_S:
            idle = [worker for worker in ready if not worker.num_requests]
            if idle:
                model.roomy_since_s = None
                newest = max(idle, key=lambda worker: worker.generation)
                self._retiring.gently(newest, EVICTION_DRAIN_S, f"{fewer} of {len(ready)} replicas are enough now")

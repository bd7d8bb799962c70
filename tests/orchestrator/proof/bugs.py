"""Planted bugs: each is put into the real scheduler while a test runs, and must be found.

Above it: `test_proof.py`. Below it: the scheduler's parts, of which each bug replaces one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator import cluster, loading, placing, policy, resting, retiring, starting, watching
from orchestrator.state import Stage, Worker, WorkerState
from orchestrator.views import ClusterView, Demand, Plan, Refusal, Rules

Plant = Callable[[pytest.MonkeyPatch], None]


def _seen_as(change: Callable[[Any], Any]) -> Plant:
    """Show the policy every holder changed."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = policy.plan

        def plan(view: ClusterView, demand: Demand, rules: Rules = Rules()) -> Plan | Refusal:
            return real(replace(view, holders=tuple(change(h) for h in view.holders)), demand, rules)

        patch.setattr(policy, "plan", plan)

    return plant


def _promises_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster.Cluster, "_promised", lambda self: iter(()))


def _memory_is_free_before_the_process_is_gone(patch: pytest.MonkeyPatch) -> None:
    def occupied(self: cluster.Cluster, device: str) -> int:
        return sum(w.bytes_on(device) for w in self.workers.values() if w.state.stays)

    patch.setattr(cluster.Cluster, "occupied_bytes", occupied)


def _a_failure_forgets_its_waiters(patch: pytest.MonkeyPatch) -> None:
    real = loading.Loading.fail

    def fail(self: loading.Loading, model: Any, error: Any) -> None:
        model.waiters.clear()
        real(self, model, error)

    patch.setattr(loading.Loading, "fail", fail)


def _every_caller_starts_a_load(patch: pytest.MonkeyPatch) -> None:
    real = starting.Starting.begin

    def begin(self: starting.Starting, model: Any, job: Any, plan: Plan) -> None:
        real(self, model, replace(job, generation=self._runtime.next_generation()), plan)
        real(self, model, job, plan)

    patch.setattr(starting.Starting, "begin", begin)


def _the_fenced_stay_on_the_routes(patch: pytest.MonkeyPatch) -> None:
    real = cluster.Cluster.ready

    def ready(self: cluster.Cluster, model: str) -> list[Worker]:
        return [*real(self, model), *self.of(model, WorkerState.LOST, WorkerState.RESTING)]

    patch.setattr(cluster.Cluster, "ready", ready)


def _silence_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(watching, "SILENCE_S", 1e9)
    patch.setattr(watching.Watching, "on_watch_ended", lambda self, event: None)


def _a_drain_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    async def at_once(self: retiring.Retiring, worker: Worker, drain_s: float) -> None:
        await self._kill(worker)

    patch.setattr(retiring.Retiring, "_drain", at_once)


def _a_late_word_counts(patch: pytest.MonkeyPatch) -> None:
    def on_load_done(self: starting.Starting, event: Any) -> None:
        worker = self._cluster.workers.get(event.generation)
        if worker is not None and event.error is None:
            self.ready(self._cluster.models[worker.model], worker)

    patch.setattr(starting.Starting, "on_load_done", on_load_done)


def _a_sleeper_still_counts_as_ready(patch: pytest.MonkeyPatch) -> None:
    real = resting.Resting.on_sleep_done

    def on_sleep_done(self: resting.Resting, event: Any) -> bool:
        freed = real(self, event)
        worker = self._cluster.workers.get(event.generation)
        if worker is not None and worker.state is WorkerState.ASLEEP:
            worker.state = WorkerState.READY
            self._runtime.publish()
        return freed

    patch.setattr(resting.Resting, "on_sleep_done", on_sleep_done)


def _a_load_begins_before_its_room_is_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cluster.Cluster, "has_room", lambda self, parts: True)


def _nobody_who_waits_is_placed_later(patch: pytest.MonkeyPatch) -> None:
    real = placing.Placing.decide

    def decide(self: placing.Placing, model: Any, job: Any) -> Any:
        answer = real(self, model, job)
        if answer is not None:
            job.stage = Stage.BACKOFF
            job.not_before_s = 1e12
        return answer

    patch.setattr(placing.Placing, "decide", decide)


BUGS: dict[str, Plant] = {
    "the busy look idle": _seen_as(lambda h: replace(h, busy=False) if h.state.value == "ready" else h),
    "the pinned look free": _seen_as(lambda h: replace(h, pinned=False)),
    "the fresh look old": _seen_as(lambda h: replace(h, ready_since_s=-1e9, busy=False)),
    "promises are forgotten": _promises_are_forgotten,
    "memory is free before the process is gone": _memory_is_free_before_the_process_is_gone,
    "a failure forgets its waiters": _a_failure_forgets_its_waiters,
    "every caller starts a load": _every_caller_starts_a_load,
    "the fenced stay on the routes": _the_fenced_stay_on_the_routes,
    "silence is not noticed": _silence_is_not_noticed,
    "a drain does not wait": _a_drain_does_not_wait,
    "a late word counts": _a_late_word_counts,
    "a sleeper still counts as ready": _a_sleeper_still_counts_as_ready,
    "a load begins before its room is free": _a_load_begins_before_its_room_is_free,
    "nobody who waits is placed later": _nobody_who_waits_is_placed_later,
}

"""Asking the policy where a job goes, and having others give way: shrink, sleep or leave.

Above it: `loading.py`, which begins a job once its room is there. Below it: the policy, `resting.py`, `retiring.py`.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import models, policy
from orchestrator.resting import Resting
from orchestrator.retiring import EVICTION_DRAIN_S, Retiring
from orchestrator.runtime import Runtime
from orchestrator.state import Job, Model, Progress, Worker, WorkerState
from orchestrator.views import Demand, Plan, Refusal, in_words

log = logging.getLogger(__name__)


class Placing:
    """Every method is called by the scheduler's task and returns at once."""

    def __init__(self, runtime: Runtime, retiring: Retiring, resting: Resting) -> None:
        self._runtime = runtime
        self._cluster = runtime.cluster
        self._retiring = retiring
        self._resting = resting

    def demand(self, model: Model, located: models.Located, *, replica: bool = False) -> Demand:
        """Return what one more replica of a model asks of the policy now."""
        cluster, spec, now_s = self._cluster, model.spec, self._runtime.effects.now_s()
        kind = cluster.kind_for(spec)
        seen = cluster.experience.of(spec, located, kind)
        here, num_others = located.on(kind), cluster.num_others(spec.name)
        asked = models.demand(spec, here, num_others=num_others, own_bytes=seen.own_bytes)
        split = next((split for split in located.splits if split.kind == kind), models.Split(kind, 1))
        since_s = min((waiter.since_s for waiter in model.waiters), default=now_s)
        return replace(
            asked,
            waited_s=now_s - since_s,
            batch=model.batch,
            replica=replica,
            max_parts=min(split.max_parts, spec.max_devices or split.max_parts),
            kv_copies=split.kv_copies,
            load_s=cluster.experience.expect(spec, located, kind).load_s,
            uses_per_s=model.reuse.per_s(now_s),
            sleep_bytes=seen.sleep_bytes or models.sleep_bytes(here.footprint, kind),
        )

    def ask(self, model: Model, located: models.Located, *, replica: bool = False) -> Plan | Refusal:
        """Return what the policy says of one more replica now. Changes nothing."""
        view = self._cluster.view(self._runtime.effects.now_s())
        return policy.plan(view, self.demand(model, located, replica=replica), self._runtime.rules)

    def decide(self, model: Model, job: Job) -> Refusal | None:
        """Give a job its plan and have others give way for it; or return why there is none now."""
        if job.located is None:
            return None
        answer = self.ask(model, job.located, replica=job.replica)
        if isinstance(answer, Refusal):
            return answer
        # From here on the ledger counts the promise, so no other load can take the room.
        job.plan = answer
        self._give_way(model, answer)
        return None

    def _give_way(self, model: Model, plan: Plan) -> None:
        by_id = {worker.id: worker for worker in self._cluster.workers.values()}
        if plan.evict or plan.sleep or plan.shrink:
            model.tell(Progress("evict", plan.reason, eta_s=plan.expected_s))
        for worker_id, num_bytes in plan.shrink:
            worker = by_id[worker_id]
            self._resting.resize(worker, max(0, worker.kv_cache_bytes - num_bytes), f"room for {model.spec.name}")
        for worker_id in plan.evict:  # First: they may be sleepers that make room for new sleepers.
            self._retiring.gently(by_id[worker_id], EVICTION_DRAIN_S, f"for {model.spec.name}: {plan.reason}")
        for worker_id in plan.sleep:
            self._resting.put_to_sleep(by_id[worker_id], f"for {model.spec.name}: {plan.reason}")

    def is_stale(self, job: Job) -> bool:
        """Return whether a plan cannot be carried out any more: its room is missing and nobody is giving way."""
        plan = job.plan
        if plan is None or job.stage.started:
            return False
        if (plan.wake or plan.take_over) and self._sleeper(plan) is None:
            return True
        if any(part.device not in self._cluster.devices for part in plan.parts):
            return True
        if self._cluster.has_room(plan.parts):
            return False
        return not any(self._cluster.is_giving_way(part.device) for part in plan.parts)

    def _sleeper(self, plan: Plan) -> Worker | None:
        return next((w for w in self._cluster.workers.values() if w.id in (plan.wake, plan.take_over)), None)

    def shelf(self, plan: Plan) -> str:
        """Return where the weights can be taken over that the plan says lie in host memory; empty: from their files."""
        sleeper = self._sleeper(plan) if plan.take_over else None
        return sleeper.shelf if sleeper is not None else ""

    def dismiss(self, plan: Plan, why: str) -> None:
        """Send the sleeper away whose weights the plan's worker has taken over, or could not."""
        sleeper = self._sleeper(plan) if plan.take_over else None
        if sleeper is not None and sleeper.state is WorkerState.ASLEEP:
            self._retiring.gently(sleeper, EVICTION_DRAIN_S, why)

    def note_placed(self, model: Model, worker: Worker, plan: Plan) -> None:
        """Write down where a model goes."""
        what = f"{plan.reason} ({in_words(plan.needed_bytes)}, of it {in_words(plan.kv_cache_bytes)} KV cache)"
        self._runtime.journal.note(
            pb.EVENT_KIND_PLACED,
            what,
            model=model.spec.name,
            device=worker.devices,
            replica=worker.id,
            num_bytes=plan.needed_bytes,
        )

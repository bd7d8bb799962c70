"""What must hold: after every event, after every step, and once the world is at rest. One function each.

Above it: the truth and the walk, which call them. Below it: the truth, which they read. Each returns None, or what is
wrong, in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.loading import MAX_ATTEMPTS
from orchestrator.state import WorkerState

from .process import Phase
from .shapes import MIN_RESIDENCY_S

if TYPE_CHECKING:
    from .truth import Truth
    from .walk import Walk

FROZEN_NOTICED_S = 3.0
"""A frozen worker is off the routes by then: its connection has failed, and the ticks around that."""


# ---------------------------------------------------------------- after every event


def budget_holds(truth: Truth) -> str | None:
    """What processes may hold fits the device; what does not, because of other programs, at least never grows."""
    for device, held in truth.held.items():
        if held > truth.held_before[device] and held > (usable := truth.usable_bytes(device)):
            return f"{held >> 20} MiB may be held on {device}, of {usable >> 20}"
    return None


def promises_hold(truth: Truth) -> str | None:
    """What will be held, promises included and those who give way left out, fits, too."""
    for device, promised in truth.promised.items():
        if promised > truth.promised_before[device] and promised > (usable := truth.usable_bytes(device)):
            return f"{promised >> 20} MiB are held or promised on {device}, of {usable >> 20}"
    return None


def busy_stays(truth: Truth) -> str | None:
    """A busy worker, or one whose callers are on their way, never makes room, but for a turn."""
    for one in truth.departures:
        worker = one.worker
        busy = one.was is WorkerState.READY and (worker.num_requests or truth.now_s < worker.busy_until_s)
        if busy and not one.asked and not one.turn:
            return f"{worker.id} ({worker.model}) was sent away with {worker.num_requests} requests"
    return None


def pinned_stays(truth: Truth) -> str | None:
    """A pinned model stays until an operator says otherwise; of several replicas one does."""
    for one in truth.departures:
        if one.job is not None and one.job.model == one.worker.model:
            continue  # A sleeper that its own model's load elsewhere replaces.
        others = truth.cluster.ready(one.worker.model)
        if one.was is WorkerState.ASLEEP and (others or one.model.job is not None):
            continue  # … and has taken over, or tried to.
        if one.model.pinned and not one.asked and not (others and one.job is None and one.was is WorkerState.READY):
            return f"{one.worker.id} ({one.worker.model}) was sent away though pinned"
    return None


def fresh_stays(truth: Truth) -> str | None:
    """A model that was just brought up stays a while, so that two who need one room do not undo each other's work."""
    for one in truth.departures:
        age_s = truth.now_s - one.worker.ready_at_s
        if one.was is WorkerState.READY and one.job and not one.asked and not one.turn and age_s < MIN_RESIDENCY_S:
            return f"{one.worker.id} ({one.worker.model}) was sent away {age_s:.2f} s after it was ready"
    return None


def batch_yields(truth: Truth) -> str | None:
    """Batch work never displaces what people have used within the longest wait."""
    now_s, long_s = truth.runtime.effects.now_s(), truth.runtime.rules.max_wait_s
    for one in truth.departures:
        if now_s - one.worker.used_at_s >= long_s:
            continue
        if one.job is None or one.asked or one.was is not WorkerState.READY:
            continue
        if truth.cluster.models[one.job.model].batch and not one.model.batch:
            return f"{one.worker.id} ({one.worker.model}) made room for batch work of {one.job.model}"
    return None


def rivals_stay_apart(truth: Truth) -> str | None:
    """Models of one group do not share a device where the group says so."""
    apart = truth.cluster.apart
    if not apart:
        return None
    seen: dict[tuple[str, str], str] = {}
    for worker in truth.cluster.workers.values():
        group = truth.cluster.models[worker.model].spec.group
        if group not in apart or not worker.state.stays:
            continue
        for part in worker.parts:
            other = seen.setdefault((group, part.device), worker.model)
            if other != worker.model:
                return f"{worker.model} and {other} are both on {part.device}"
    return None


def host_memory_holds(truth: Truth) -> str | None:
    """Nobody is put to sleep where host memory has no room for it."""
    for one in truth.departures:
        if one.worker.state is WorkerState.RESTING:
            node = one.worker.node
            used = sum(
                w.sleep_bytes
                for w in truth.cluster.workers.values()
                if w.node == node and w.state in (WorkerState.RESTING, WorkerState.ASLEEP)
            )
            budget = truth.cluster.sleep_budget_bytes.get(node, 0)
            if used > budget:
                return f"{used >> 20} MiB asleep, of {budget >> 20}"
    return None


def attempts_end(truth: Truth) -> str | None:
    """No load is tried more often than is allowed."""
    for model in truth.cluster.models.values():
        if model.job is not None and model.job.attempt > MAX_ATTEMPTS:
            return f"{model.spec.name} is at attempt {model.job.attempt}"
    return None


def routes_say_what_is(truth: Truth) -> str | None:
    """The published routes list the ready workers, all of them and no others."""
    latest = truth.runtime.routes.latest
    if latest is None or not truth.runtime.may_publish:
        return None
    listed = {replica.generation for route in latest.models for replica in route.replicas}
    ready = {g for g, worker in truth.cluster.workers.items() if worker.state is WorkerState.READY}
    if listed != ready:
        return f"routes list {sorted(listed)}, ready are {sorted(ready)}"
    return None


AFTER_EVENTS: tuple[tuple[str, Callable[[Truth], str | None]], ...] = (
    ("budgets hold", budget_holds),
    ("promises hold", promises_hold),
    ("the busy stay", busy_stays),
    ("the pinned stay", pinned_stays),
    ("the fresh stay", fresh_stays),
    ("batch work yields", batch_yields),
    ("rivals stay apart", rivals_stay_apart),
    ("host memory holds", host_memory_holds),
    ("attempts end", attempts_end),
    ("routes say what is", routes_say_what_is),
)


# ---------------------------------------------------------------- after every step


def routed_live(walk: Walk) -> str | None:
    """Whoever is on the routes is alive, has that model, and is not silent for longer than it takes to notice."""
    latest = walk.truth.runtime.routes.latest
    if latest is None:
        return None
    for route in latest.models:
        for replica in route.replicas:
            process = walk.world.processes.get(replica.id)
            if process is None or process.generation != replica.generation or process.model != route.name:
                return f"{replica.id} is routed to as {route.name} g{replica.generation}, which it is not"
            if process.frozen and process.frozen_ticks_s > FROZEN_NOTICED_S:
                return f"{replica.id} is routed to, {process.frozen_ticks_s:.1f} s after it froze"
    return None


def nobody_is_forgotten(walk: Walk) -> str | None:
    """Every client that waits is known to wait."""
    waiting = sum(1 for client in walk.clients if client.waits)
    known = sum(len(model.waiters) for model in walk.truth.cluster.models.values())
    known += sum(1 for ensure in walk.life.scheduler._requests._unknown if not ensure.waiter.left)
    return f"{waiting} clients wait, the scheduler knows of {known}" if waiting != known else None


def patience_is_not_tried(walk: Walk) -> str | None:
    """Nobody sees more attempts than are allowed."""
    for client in walk.clients:
        num_seen = walk.world.num_attempts[client.model] - client.num_attempts_before
        if client.waits and num_seen > MAX_ATTEMPTS:
            return f"a client of {client.model} has seen {num_seen} attempts"
    return None


def ledger_knows_caches(walk: Walk) -> str | None:
    """No KV cache may grow further than the ledger counts, and no worker stands where the ledger does not say."""
    for worker in walk.truth.cluster.workers.values():
        process = walk.world.processes.get(worker.id)
        if process is None or worker.state is not WorkerState.READY or process.phase is not Phase.READY:
            continue
        if worker.resizing_to is None and process.kv_bytes > worker.kv_cache_bytes:
            return (
                f"the KV cache of {worker.id} ({worker.model}) may grow to {process.kv_bytes >> 20} MiB, "
                f"the ledger has {worker.kv_cache_bytes >> 20}"
            )
        if not {part.device for part in worker.parts} <= set(process.devices):
            return f"{worker.id} ({worker.model}) is on {process.devices}, the ledger says {worker.devices}"
    return None


AFTER_STEPS: tuple[tuple[str, Callable[[Walk], str | None]], ...] = (
    ("the routed live", routed_live),
    ("nobody is forgotten", nobody_is_forgotten),
    ("patience is not tried", patience_is_not_tried),
    ("the ledger knows the caches", ledger_knows_caches),
)


# ---------------------------------------------------------------- at rest


def everybody_was_answered(walk: Walk) -> str | None:
    """Once the world is quiet, every wait ends: with a worker or with an error."""
    waiting = sorted(client.model for client in walk.clients if client.waits)
    return f"still waiting: {', '.join(waiting)}" if waiting else None


def ledger_is_the_truth(walk: Walk) -> str | None:
    """Every living process is in the ledger or in the pool, and the other way round; nothing is held for the dead."""
    cluster, processes = walk.truth.cluster, walk.world.processes
    blanks = walk.life.scheduler._pool._blanks
    ours = {worker.id: worker for worker in cluster.workers.values()}
    if stray := processes.keys() - ours.keys() - blanks.keys():
        return "nobody knows of " + ", ".join(f"{i} ({processes[i].phase.value})" for i in sorted(stray))
    if ghosts := (ours.keys() | blanks.keys()) - processes.keys():
        return "there is no process " + ", ".join(sorted(ghosts))
    for worker_id, worker in ours.items():
        phase = processes[worker_id].phase
        if (worker.state, phase) not in ((WorkerState.READY, Phase.READY), (WorkerState.ASLEEP, Phase.ASLEEP)):
            return f"{worker_id} is {worker.state.value} in the ledger and {phase.value} in truth"
        if bool(worker.parts) != phase.holds:
            return f"{worker_id} is {phase.value}, and the ledger has {worker.reserved_bytes >> 20} MiB for it"
    return None


def ledger_adds_up(walk: Walk) -> str | None:
    """What the scheduler counts as occupied is what living processes were given."""
    cluster = walk.truth.cluster
    for device in cluster.devices:
        truth = sum(w.bytes_on(device) for w in cluster.workers.values() if w.id in walk.world.processes)
        if cluster.occupied_bytes(device) != truth or cluster.committed_bytes(device) != truth:
            return (
                f"{cluster.occupied_bytes(device) >> 20} MiB occupied and {cluster.committed_bytes(device) >> 20} "
                f"committed on {device}, {truth >> 20} in truth"
            )
    return None


AT_REST: tuple[tuple[str, Callable[[Walk], str | None]], ...] = (
    ("everybody was answered", everybody_was_answered),
    ("the ledger is the truth", ledger_is_the_truth),
    ("the ledger adds up", ledger_adds_up),
)

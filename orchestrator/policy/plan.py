"""The decision: fit first, else give way where it costs least, else say why not. Pure.

Above it: the package. Below it: `room.py`, `hosts.py`, `victims.py`, `split.py`, `refusal.py`, `telling.py`, the views.

In this order: room that is free (the device with the fewest busy models, then the tightest fit, which keeps large holes
for large models), unless the model sleeps where others can give way for less than a cold load would cost; else, over
all devices, the least expected loss among shrinking neighbours' KV caches, putting models to sleep and sending them
away; else, where no device could ever have room for it alone, split over several; else the reason why not.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.policy import refusal, split
from orchestrator.policy.giving import Option, arrives_s, can_hand_over_to, can_wake_on, cold_s, give_way
from orchestrator.policy.hosts import LEAST_RATE, Hosts
from orchestrator.policy.room import Room, comfortable_bytes, kv_cache_bytes, least_bytes, must_leave, rooms_of
from orchestrator.policy.telling import reason_of
from orchestrator.policy.victims import GiveWay
from orchestrator.views import ClusterView, Demand, HolderState, HolderView, Part, Plan, Refusal, Rules

_NO_RULES = Rules()


def plan(view: ClusterView, demand: Demand, rules: Rules = _NO_RULES) -> Plan | Refusal:
    """Decide where `demand` goes now, who must give way first, and why; or why not."""
    rooms = rooms_of(view)
    candidates = [room for room in rooms.values() if demand.device in (None, room.device.id)]
    if not candidates:
        return refusal.no_such_device(view, demand)
    least = least_bytes(demand)
    able = [room for room in candidates if least <= room.device.usable_bytes]
    ways = split.ways(candidates, demand)
    if not able and not ways:
        return refusal.never(candidates, list(rooms.values()), demand)
    sleeper = None if demand.replica else _sleeper(view, demand)

    option = _free(able, demand, view, sleeper)
    hosts: Hosts | None = None
    if option is not None and sleeper is not None and option.loss > 0.0:
        hosts = Hosts(view, demand.model)
        home = [room for room in able if can_wake_on(sleeper, room)]
        woken = _by_giving_way(home, demand, view, rules, sleeper, hosts)
        if woken is not None and woken.loss < option.loss:
            option = woken
    if option is not None:
        return _plan(view, demand, option, sleeper, hosts)
    if not demand.replica:
        hosts = Hosts(view, demand.model)
        option = _by_giving_way(able, demand, view, rules, sleeper, hosts)
        if option is not None:
            return _plan(view, demand, option, sleeper, hosts)
        # Where one device could have room in the end, waiting for it costs less than a workspace on each of several.
        alone = any(refusal.could_ever(room, demand, view) for room in able)
        for num_parts, share in ways if not alone else ():
            chosen = split.choose(candidates, share, num_parts, view, rules, sleeper, hosts)
            if chosen:
                return split.plan_of(view, demand, share, chosen, sleeper, hosts)
    return refusal.not_now(able, ways, candidates, demand, view, rules)


def _sleeper(view: ClusterView, demand: Demand) -> HolderView | None:
    """Return the sleeping holder of the model that was used last."""
    mine = (h for h in view.holders if h.model == demand.model and h.state is HolderState.ASLEEP)
    return max(mine, key=lambda h: (h.last_used_s, h.id), default=None)


def _free(able: Sequence[Room], demand: Demand, view: ClusterView, sleeper: HolderView | None) -> Option | None:
    """Return the best device that has room as it is; its loss is that of a cold load, if the model sleeps elsewhere."""
    fitting = [
        room
        for room in able
        if comfortable_bytes(room.device, demand) <= room.free_bytes and not must_leave(room, demand, view.apart)
    ]
    if not fitting:
        return None
    best = min(
        fitting,
        key=lambda room: (cold_s(room, demand, sleeper), room.num_busy, room.free_bytes, room.device.id),
    )
    return Option(best, GiveWay(), cold_s(best, demand, sleeper) * max(demand.uses_per_s, LEAST_RATE))


def _by_giving_way(
    able: Sequence[Room], demand: Demand, view: ClusterView, rules: Rules, sleeper: HolderView | None, hosts: Hosts
) -> Option | None:
    """Return where others give way at the least loss: with room for a full context if possible, else the floor."""
    rate = max(demand.uses_per_s, LEAST_RATE)
    for needed_on in (comfortable_bytes, lambda device, demand: least_bytes(demand)):
        best: tuple[tuple[float, int, int, str], Option] | None = None
        for room in able:
            cold = cold_s(room, demand, sleeper) * rate
            # A little above the best one, so that equal losses are still told apart by the rest of the rank.
            below = float("inf") if best is None else best[0][0] * (1 + 1e-9) + 1e-15 - cold
            give = give_way(room, needed_on(room.device, demand), demand, view, rules, hosts, below)
            if give is None:
                continue
            rank = (give.loss + cold, len(give.victims), give.freed_bytes, room.device.id)
            if best is None or rank < best[0]:
                best = rank, Option(room, give, give.loss + cold)
        if best is not None:
            return best[1]
    return None


def _plan(view: ClusterView, demand: Demand, option: Option, sleeper: HolderView | None, hosts: Hosts | None) -> Plan:
    room, give = option.room, option.give
    free = room.free_bytes + give.freed_bytes
    kv_bytes = kv_cache_bytes(free, demand)
    needed = demand.base_bytes + kv_bytes
    wakes = sleeper is not None and can_wake_on(sleeper, room)
    taken = sleeper is not None and can_hand_over_to(sleeper, room)
    sleep, evict = hosts.send(give.victims) if hosts is not None else ((), ())
    if sleeper is not None and not wakes and not taken:
        evict = (*evict, sleeper.id)  # It cannot wake where there is room: its host memory is of no use any more.
    return Plan(
        model=demand.model,
        parts=(Part(room.device.id, needed),),
        kv_cache_bytes=kv_bytes,
        reason=reason_of(view, room.device.id, free, needed, give, sleep, evict, wakes=wakes, taken=taken),
        wake=sleeper.id if sleeper is not None and wakes else "",
        take_over=sleeper.id if sleeper is not None and taken else "",
        sleep=sleep,
        evict=evict,
        shrink=give.shrink,
        expected_s=arrives_s(room, demand, sleeper),
    )

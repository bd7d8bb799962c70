"""The decision: fit first, else give way where it costs least, else say why not. Pure.

Above it: the package. Below it: `room.py`, `victims.py`, `split.py`, `refusal.py`, the views.

In this order: room that is free (the device with the fewest busy models, then the tightest fit, which keeps large holes
for large models); else, over all devices, the least expected loss among shrinking neighbours' KV caches, putting models
to sleep and sending them away; else split over several devices; else the reason why not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.policy import refusal, split
from orchestrator.policy.room import (
    Room,
    comfortable_bytes,
    kv_cache_bytes,
    least_bytes,
    may_leave,
    must_leave,
    rooms_of,
)
from orchestrator.policy.victims import GiveWay, cheapest, shrinking, where_to
from orchestrator.views import (
    ClusterView,
    Demand,
    HolderState,
    HolderView,
    Part,
    Plan,
    Refusal,
    Rules,
    in_words,
)

_NO_RULES = Rules()


@dataclass(frozen=True, slots=True)
class Option:
    """One device, what it takes to have room there, and what that costs; `loss` has the cold load in it, too."""

    room: Room
    give: GiveWay
    loss: float


def plan(view: ClusterView, demand: Demand, rules: Rules = _NO_RULES) -> Plan | Refusal:
    """Decide where `demand` goes now, who must give way first, and why; or why not."""
    rooms = rooms_of(view)
    candidates = [room for room in rooms.values() if demand.device in (None, room.device.id)]
    if not candidates:
        return refusal.no_such_device(view, demand)
    least = least_bytes(demand)
    able = [room for room in candidates if least <= room.device.usable_bytes]
    if not able:
        return _in_parts(view, demand, rules, candidates) or refusal.never(candidates, list(rooms.values()), demand)
    sleeper = None if demand.replica else _sleeper(view, demand)

    option = _free(able, demand, view, sleeper)
    if option is None and not demand.replica:
        option = _by_giving_way(able, demand, view, rules, sleeper)
    if option is None:
        return _in_parts(view, demand, rules, candidates) or refusal.not_now(able, demand, view, rules)
    return _plan(view, demand, option, sleeper)


def _sleeper(view: ClusterView, demand: Demand) -> HolderView | None:
    """Return the sleeping holder of the model that was used last."""
    mine = (h for h in view.holders if h.model == demand.model and h.state is HolderState.ASLEEP)
    return max(mine, key=lambda h: (h.last_used_s, h.id), default=None)


def can_wake_on(sleeper: HolderView | None, room: Room) -> bool:
    """Return whether the sleeper can wake on this device."""
    if sleeper is None or sleeper.node != room.device.node:
        return False
    return sleeper.wakes_on is None or room.device.id in sleeper.wakes_on


def _cold_s(room: Room, demand: Demand, sleeper: HolderView | None) -> float:
    """Return how much longer it takes here than it would where a sleeper wakes."""
    return 0.0 if sleeper is None or can_wake_on(sleeper, room) else max(0.0, demand.load_s - sleeper.wake_s)


def _free(able: Sequence[Room], demand: Demand, view: ClusterView, sleeper: HolderView | None) -> Option | None:
    """Return the best device that has room as it is."""
    fitting = [
        room
        for room in able
        if comfortable_bytes(room.device, demand) <= room.free_bytes and not must_leave(room, demand, view.apart)
    ]
    if not fitting:
        return None
    best = min(
        fitting,
        key=lambda room: (_cold_s(room, demand, sleeper), room.num_busy, room.free_bytes, room.device.id),
    )
    return Option(best, GiveWay(), 0.0)


def _by_giving_way(
    able: Sequence[Room], demand: Demand, view: ClusterView, rules: Rules, sleeper: HolderView | None
) -> Option | None:
    """Return where others give way at the least loss: with room for a full context if possible, else the floor."""
    for needed_on in (comfortable_bytes, lambda device, demand: least_bytes(demand)):
        options: list[tuple[tuple[float, int, int, str], Option]] = []
        for room in able:
            give = _give_way(room, needed_on(room.device, demand), demand, view, rules)
            if give is None:
                continue
            loss = give.loss + _cold_s(room, demand, sleeper) * max(demand.uses_per_s, 1e-3)
            rank = (loss, len(give.victims), give.freed_bytes, room.device.id)
            options.append((rank, Option(room, give, loss)))
        if options:
            return min(options, key=lambda item: item[0])[1]
    return None


def _give_way(room: Room, needed: int, demand: Demand, view: ClusterView, rules: Rules) -> GiveWay | None:
    forced = must_leave(room, demand, view.apart)
    if any(not may_leave(holder, demand, rules, view.now_s) for holder in forced):
        return None
    device = room.device.id
    lacking = needed - room.free_bytes - sum(holder.bytes_on(device) for holder in forced)
    if lacking <= 0:
        found: GiveWay | None = GiveWay()
    else:
        left = Room(room.device, [h for h in room.holders if h not in forced]) if forced else room
        found = shrinking(left, lacking)
        if found is None:
            leaving = [h for h in left.holders if may_leave(h, demand, rules, view.now_s)]
            found = cheapest(left, leaving, lacking)
            if found is None:
                found = _shrink_and_send(left, leaving, lacking)
    if found is None or not forced:
        return found
    more = cheapest(room, forced, sum(holder.bytes_on(device) for holder in forced))
    if more is None:
        return None
    return GiveWay(
        found.loss + more.loss, found.freed_bytes + more.freed_bytes, found.shrink, (*more.victims, *found.victims)
    )


def _shrink_and_send(room: Room, leaving: Sequence[HolderView], lacking: int) -> GiveWay | None:
    """Return a mixture: everybody who may goes, and the KV caches of those who may not give what is still missing."""
    gone = sum(holder.bytes_on(room.device.id) for holder in leaving)
    staying = Room(room.device, [holder for holder in room.holders if holder not in leaving])
    rest = shrinking(staying, lacking - gone)
    if rest is None or not leaving:
        return None
    sent = cheapest(room, leaving, lacking - rest.freed_bytes)
    if sent is None:
        return None
    return GiveWay(rest.loss + sent.loss, rest.freed_bytes + sent.freed_bytes, rest.shrink, sent.victims)


def _plan(view: ClusterView, demand: Demand, option: Option, sleeper: HolderView | None) -> Plan:
    room, give = option.room, option.give
    free = room.free_bytes + give.freed_bytes
    kv_bytes = kv_cache_bytes(free, demand)
    needed = demand.base_bytes + kv_bytes
    wakes = can_wake_on(sleeper, room)
    sleep, evict = where_to(give.victims, _others_asleep(view, demand), view.nodes)
    if sleeper is not None and not wakes:
        evict = (*evict, sleeper.id)  # It cannot wake where there is room: its host memory is of no use any more.
    return Plan(
        model=demand.model,
        parts=(Part(room.device.id, needed),),
        kv_cache_bytes=kv_bytes,
        reason=reason_of(view, room.device.id, free, needed, give, sleep, wakes=wakes),
        wake=sleeper.id if sleeper is not None and wakes else "",
        sleep=sleep,
        evict=evict,
        shrink=give.shrink,
        expected_s=sleeper.wake_s if sleeper is not None and wakes else demand.load_s,
    )


def _others_asleep(view: ClusterView, demand: Demand) -> list[HolderView]:
    return [h for h in view.holders if h.state is HolderState.ASLEEP and h.model != demand.model]


def reason_of(
    view: ClusterView, device: str, free: int, needed: int, give: GiveWay, sleep: Iterable[str], *, wakes: bool
) -> str:
    """Say why here and why those, in words."""
    does = "wakes on" if wakes else "goes to"
    if not give.shrink and not give.victims:
        return f"{does} {device}: {in_words(free)} free, {in_words(needed)} needed"
    names = {holder.id: holder.model for holder in view.holders}
    done = []
    if give.shrink:
        done.append(f"the KV cache of {', '.join(sorted(names[i] for i, _ in give.shrink))} gives room")
    asleep = set(sleep)
    for verb, group in (
        ("sleeps", [v for v in give.victims if v.id in asleep]),
        ("leaves", [v for v in give.victims if v.id not in asleep]),
    ):
        if group:
            done.append(f"{', '.join(sorted(v.model for v in group))} {verb} ({_worth(group, view.now_s)})")
    return f"{does} {device}: {in_words(needed)} needed; {'; '.join(done)}"


def _worth(group: Sequence[HolderView], now_s: float) -> str:
    idle_s = now_s - max(holder.last_used_s for holder in group)
    back_s = sum(holder.load_s if holder.sleep_bytes is None else holder.wake_s for holder in group)
    busy = "busy, closed to new requests" if any(holder.busy for holder in group) else f"idle for {idle_s:.0f} s"
    return f"{busy}, back within {back_s:.1f} s"


def _in_parts(view: ClusterView, demand: Demand, rules: Rules, candidates: Sequence[Room]) -> Plan | None:
    """Return a plan over several devices of one node, the fewest that do, or None."""
    if demand.max_parts < 2 or demand.device is not None or demand.replica:
        return None
    sleeper = _sleeper(view, demand)
    for num_parts in range(2, demand.max_parts + 1):
        share = split.share_of(demand, num_parts)
        options: list[Option] = []
        for room in candidates:
            if least_bytes(share) > room.device.usable_bytes:
                continue
            give = _give_way(room, comfortable_bytes(room.device, share), share, view, rules)
            give = give or _give_way(room, least_bytes(share), share, view, rules)
            if give is not None:
                options.append(Option(room, give, give.loss))
        chosen = split.choose(options, num_parts)
        if chosen:
            return _plan_in_parts(view, demand, share, chosen, sleeper)
    return None


def _plan_in_parts(
    view: ClusterView, demand: Demand, share: Demand, chosen: Sequence[Option], sleeper: HolderView | None
) -> Plan:
    kv_each = min(kv_cache_bytes(o.room.free_bytes + o.give.freed_bytes, share) for o in chosen)
    parts = tuple(Part(o.room.device.id, share.base_bytes + kv_each) for o in chosen)
    # One holder may stand on several of the devices.
    victims = tuple({victim.id: victim for o in chosen for victim in o.give.victims}.values())
    leaving = {victim.id for victim in victims}
    sleep, evict = where_to(victims, _others_asleep(view, demand), view.nodes)
    wakes = sleeper is not None and sleeper.wakes_on == frozenset(part.device for part in parts)
    if sleeper is not None and not wakes:
        evict = (*evict, sleeper.id)
    names = " + ".join(part.device for part in parts)
    needed = sum(part.num_bytes for part in parts)
    gone = f"; {', '.join(sorted(v.model for v in victims))} gives way" if victims else ""
    return Plan(
        model=demand.model,
        parts=parts,
        kv_cache_bytes=kv_each * len(parts),
        reason=f"split over {names}, no single device could hold {in_words(needed)}{gone}",
        wake=sleeper.id if sleeper is not None and wakes else "",
        sleep=sleep,
        evict=evict,
        shrink=tuple(item for o in chosen for item in o.give.shrink if item[0] not in leaving),
        expected_s=sleeper.wake_s if sleeper is not None and wakes else demand.load_s,
    )

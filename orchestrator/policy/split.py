"""One model over several devices of one node: even shares, which devices, who gives way for all of them. Pure.

Above it: `plan.py`. Below it: `giving.py`, `hosts.py`, `room.py`, `telling.py`, the views. Parts are even: weights and
KV heads divide by the number of devices. A model is split only when no single device takes it, and over the fewest
devices that do: every part costs an exchange in each layer, and a split model's KV cache does not shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.policy.giving import Option, cold_s, give_way
from orchestrator.policy.hosts import LEAST_RATE, Hosts
from orchestrator.policy.room import Room, comfortable_bytes, kv_cache_bytes, least_bytes, must_leave
from orchestrator.policy.telling import giving
from orchestrator.policy.victims import GiveWay
from orchestrator.views import ClusterView, Demand, HolderView, Part, Plan, Rules, in_words

OVERHEAD_PERMILLE = 30
"""What each part needs beyond its even share of the weights: norms and vectors that every part keeps, buffers."""


def share_of(demand: Demand, num_parts: int) -> Demand:
    """Return what one of so many parts asks of its device: a share of the weights, and a workspace of its own."""
    copies = demand.kv_copies[num_parts - 2] if num_parts - 2 < len(demand.kv_copies) else 1

    def part_of(num_bytes: int) -> int:
        return -(-num_bytes * copies // num_parts)

    weights = -(-(demand.base_bytes - demand.workspace_bytes) // num_parts)
    return replace(
        demand,
        base_bytes=weights + weights * OVERHEAD_PERMILLE // 1000 + demand.workspace_bytes,
        kv_floor_bytes=part_of(demand.kv_floor_bytes),
        kv_context_bytes=part_of(demand.kv_context_bytes),
        kv_want_bytes=part_of(demand.kv_want_bytes),
    )


def by_node(rooms: Sequence[Room]) -> dict[str, list[Room]]:
    """Return the rooms of each node."""
    found: dict[str, list[Room]] = {}
    for room in rooms:
        found.setdefault(room.device.node, []).append(room)
    return found


def ways(candidates: Sequence[Room], demand: Demand) -> list[tuple[int, Demand]]:
    """Return into how many parts the model could go if all devices were empty, fewest first, with one part's demand."""
    if demand.max_parts < 2 or demand.device is not None:
        return []
    found = []
    nodes = by_node(candidates)
    for num_parts in range(2, min(demand.max_parts, max(len(rooms) for rooms in nodes.values())) + 1):
        share = share_of(demand, num_parts)
        least = least_bytes(share)
        if any(sum(least <= room.device.usable_bytes for room in rooms) >= num_parts for rooms in nodes.values()):
            found.append((num_parts, share))
    return found


def choose(
    candidates: Sequence[Room],
    share: Demand,
    num_parts: int,
    view: ClusterView,
    rules: Rules,
    sleeper: HolderView | None,
    hosts: Hosts,
) -> list[Option]:
    """Return the cheapest so many devices of one node; empty when no node has as many that can have room."""
    free = [
        Option(room, GiveWay(), 0.0)
        for room in candidates
        if comfortable_bytes(room.device, share) <= room.free_bytes and not must_leave(room, share, view.apart)
    ]
    if sleeper is None and (chosen := _cheapest_node(free, num_parts)):
        return chosen
    rate = max(share.uses_per_s, LEAST_RATE)
    options = []
    for room in candidates:
        if least_bytes(share) > room.device.usable_bytes:
            continue
        give = give_way(room, comfortable_bytes(room.device, share), share, view, rules, hosts)
        give = give or give_way(room, least_bytes(share), share, view, rules, hosts)
        if give is not None:
            options.append(Option(room, give, give.loss + cold_s(room, share, sleeper) * rate / num_parts))
    return _cheapest_node(options, num_parts)


def _cheapest_node(options: Sequence[Option], num_parts: int) -> list[Option]:
    nodes: dict[str, list[Option]] = {}
    for option in options:
        nodes.setdefault(option.room.device.node, []).append(option)
    enough = [
        sorted(node, key=lambda o: (o.loss, o.room.num_busy, -o.room.free_bytes, o.room.device.id))[:num_parts]
        for node in nodes.values()
        if len(node) >= num_parts
    ]
    return min(enough, key=lambda node: (sum(o.loss for o in node), node[0].room.device.node), default=[])


def _settle(chosen: Sequence[Option], share: Demand, view: ClusterView) -> GiveWay:
    """Return who gives way for all parts together: a holder may stand on several devices, and none goes needlessly."""
    victims = {victim.id: victim for option in chosen for victim in option.give.victims}
    forced = {holder.id for option in chosen for holder in must_leave(option.room, share, view.apart)}
    slack: dict[str, int] = {}
    for option in chosen:
        device = option.room.device.id
        freed = sum(victim.bytes_on(device) for victim in victims.values())
        at_hand = option.room.free_bytes + freed + sum(num_bytes for _, num_bytes in option.give.shrink)
        comfortable = comfortable_bytes(option.room.device, share)
        slack[device] = at_hand - (comfortable if comfortable <= at_hand else least_bytes(share))
    for victim in sorted(victims.values(), key=lambda v: (-v.uses_per_s * v.load_s, v.id)):
        on = [device for device in slack if victim.bytes_on(device)]
        if victim.id not in forced and all(slack[device] >= victim.bytes_on(device) for device in on):
            del victims[victim.id]
            for device in on:
                slack[device] -= victim.bytes_on(device)
    shrink = []
    for option in chosen:  # Only a holder of one device shrinks, so each is named once.
        device = option.room.device.id
        for holder_id, num_bytes in option.give.shrink:
            spared = min(num_bytes, slack[device])
            slack[device] -= spared
            if num_bytes > spared:
                shrink.append((holder_id, num_bytes - spared))
    return GiveWay(sum(option.give.loss for option in chosen), 0, tuple(shrink), tuple(victims.values()))


def plan_of(
    view: ClusterView,
    demand: Demand,
    share: Demand,
    chosen: Sequence[Option],
    sleeper: HolderView | None,
    hosts: Hosts,
) -> Plan:
    """Return the plan over the chosen devices."""
    give = _settle(chosen, share, view)
    shrinking = dict(give.shrink)

    def free_bytes(room: Room) -> int:
        device = room.device.id
        shrunk = sum(shrinking.get(holder.id, 0) for holder in room.holders)
        return room.free_bytes + shrunk + sum(victim.bytes_on(device) for victim in give.victims)

    kv_each = min(kv_cache_bytes(free_bytes(option.room), share) for option in chosen)
    parts = tuple(Part(option.room.device.id, share.base_bytes + kv_each) for option in chosen)
    wakes = sleeper is not None and sleeper.wakes_on == frozenset(part.device for part in parts)
    sleep, evict = hosts.send(give.victims)
    if sleeper is not None and not wakes:
        evict = (*evict, sleeper.id)
    does = "wakes on" if wakes else "split over"
    names = " + ".join(part.device for part in parts)
    needed = sum(part.num_bytes for part in parts)
    told = giving(view, give, sleep, evict)
    return Plan(
        model=demand.model,
        parts=parts,
        kv_cache_bytes=kv_each * len(parts),
        reason=f"{does} {names}, no single device takes {in_words(needed)} now" + (f"; {told}" if told else ""),
        wake=sleeper.id if sleeper is not None and wakes else "",
        sleep=sleep,
        evict=evict,
        shrink=give.shrink,
        expected_s=sleeper.wake_s if sleeper is not None and wakes else demand.load_s,
    )

"""Why there is no plan, in words, and what would help. Pure.

Above it: `plan.py`. Below it: `room.py`, the views.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.policy.room import Room, comfortable_bytes, is_turn, least_bytes, may_leave, must_leave, stays_until_s
from orchestrator.views import ClusterView, Demand, HolderState, Obstacle, Refusal, Rules, in_words


def no_such_device(view: ClusterView, demand: Demand) -> Refusal:
    """Return the refusal of a model that is pinned to a device that is not there."""
    known = ", ".join(device.id for device in view.devices) or "none"
    needed = least_bytes(demand)
    reason = f"{demand.model} is pinned to {demand.device}, which does not exist; devices: {known}"
    return Refusal(Obstacle.NEVER, needed, needed, reason, advice=("Change its device in the configuration.",))


def never(candidates: Sequence[Room], everywhere: Sequence[Room], demand: Demand) -> Refusal:
    """Return the refusal of a model that no device could hold, even empty."""
    needed = least_bytes(demand)
    largest = max(candidates, key=lambda room: (room.device.usable_bytes, room.device.id)).device
    lacking = needed - largest.usable_bytes
    reason = (
        f"{demand.model} needs at least {in_words(needed)}; {largest.id} has {in_words(largest.usable_bytes)} "
        f"even when empty, {in_words(lacking)} too little"
    )
    return Refusal(
        Obstacle.NEVER,
        needed,
        lacking,
        reason,
        largest.id,
        _advice(demand, largest.usable_bytes, everywhere, candidates),
    )


def _advice(
    demand: Demand, usable_bytes: int, everywhere: Sequence[Room], candidates: Sequence[Room]
) -> tuple[str, ...]:
    advice = [
        f"With quantize: {kind} it would need {in_words(num_bytes + demand.kv_floor_bytes)}."
        for kind, num_bytes in demand.quantized_bytes
        if num_bytes + demand.kv_floor_bytes <= usable_bytes
    ][:1]
    if demand.kv_floor_bytes and demand.base_bytes < usable_bytes:
        share = (usable_bytes - demand.base_bytes) / demand.kv_floor_bytes
        advice.append(f"A smaller max_context_tokens would do: {share:.0%} of the KV cache would fit.")
    others = [room.device.id for room in everywhere if room not in candidates]
    holding = [room.device.id for room in everywhere if least_bytes(demand) <= room.device.usable_bytes]
    if others and holding:
        advice.append(f"{holding[0]} could hold it: change its device in the configuration.")
    if not advice:
        advice.append(f"A device with {in_words(least_bytes(demand))} for it is needed.")
    return tuple(advice)


def not_now(
    able: Sequence[Room],
    ways: Sequence[tuple[int, Demand]],
    candidates: Sequence[Room],
    demand: Demand,
    view: ClusterView,
    rules: Rules,
) -> Refusal:
    """Say who is in the way where the model comes nearest to having room, and when to ask again.

    Args:
        able: devices that could hold it whole when empty.
        ways: into how many parts it could go, with one part's demand; what is said holds for one part then.
    """
    tries = [(able, 1, demand)] if able else []
    tries += [([r for r in candidates if least_bytes(s) <= r.device.usable_bytes], n, s) for n, s in ways]
    rooms, num_parts, share = tries[0]
    nearest = _nearest(rooms, share)
    needed = comfortable_bytes(nearest.device, share)
    lacking = max(0, needed - nearest.free_bytes)
    if demand.replica:
        reason = f"one more {demand.model} needs {in_words(needed)} of free room"
        return Refusal(Obstacle.BUSY, needed, lacking, reason, nearest.device.id)
    for rooms, num_parts, share in tries:
        movable = _with_enough([room for room in rooms if could_ever(room, share, view)], num_parts)
        if movable:
            return _waiting(movable, num_parts, share, view, rules)
    pinned = sorted({h.model for rooms, _, _ in tries for room in rooms for h in room.holders if h.pinned})
    reason = f"{demand.model} needs {in_words(needed)}, but pinned models ({', '.join(pinned)}) hold the memory"
    advice = (f"Unpin one: hostler unpin {pinned[0]}.",)
    return Refusal(Obstacle.PINNED, needed, lacking, reason, nearest.device.id, advice)


def _nearest(rooms: Sequence[Room], demand: Demand) -> Room:
    return min(rooms, key=lambda room: (comfortable_bytes(room.device, demand) - room.free_bytes, room.device.id))


def _with_enough(rooms: Sequence[Room], num_parts: int) -> list[Room]:
    """Return the rooms of the nodes that have as many as there are parts."""
    nodes: dict[str, list[Room]] = {}
    for room in rooms:
        nodes.setdefault(room.device.node, []).append(room)
    return [room for node in nodes.values() if len(node) >= num_parts for room in node]


def _waiting(movable: Sequence[Room], num_parts: int, demand: Demand, view: ClusterView, rules: Rules) -> Refusal:
    """Say for whom or for how long the demand waits; of a split model, for which part's device."""
    room = _nearest([r for r in movable if comfortable_bytes(r.device, demand) > r.free_bytes] or movable, demand)
    needed = comfortable_bytes(room.device, demand)
    lacking = max(0, needed - room.free_bytes)
    for_part = f" (one of {num_parts} parts)" if num_parts > 1 else ""
    stuck = movable if num_parts > 1 else [room]
    busy = sorted({h.model for r in stuck for h in r.holders if h.busy and not h.pinned})
    if busy:
        turn_s = max(0.0, rules.max_wait_s - demand.waited_s)
        turn = "" if demand.batch or is_turn(demand, rules) else f"; its turn comes in {turn_s:.0f} s at the latest"
        where = ", ".join(sorted({r.device.id for r in stuck if any(h.busy and not h.pinned for h in r.holders)}))
        reason = f"waiting for {', '.join(busy)} on {where} to become idle{for_part}{turn}"
        return Refusal(Obstacle.BUSY, needed, lacking, reason, room.device.id)
    holders = [holder for r in stuck for holder in r.holders]
    if demand.batch and any(not h.batch for h in holders):
        reason = f"batch work waits for room on {room.device.id} that people have not used for {rules.max_wait_s:.0f} s"
        return Refusal(Obstacle.SOON, needed, lacking, reason, room.device.id, retry_in_s=1.0)
    kept = sorted({h.model for h in holders if not may_leave(h, demand, rules, view.now_s) and not h.pinned})
    reason = f"{', '.join(kept) or 'a model'} on {room.device.id} was brought up a moment ago and is used first"
    retry_in_s = stays_until_s(holders, rules, view.now_s) - view.now_s
    return Refusal(Obstacle.SOON, needed, lacking, reason, room.device.id, retry_in_s=min(retry_in_s, 60.0))


def could_ever(room: Room, demand: Demand, view: ClusterView) -> bool:
    """Return whether the device would have room if every holder that is not pinned were gone."""
    if any(holder.pinned for holder in must_leave(room, demand, view.apart)):
        return False
    pinned = sum(
        holder.bytes_on(room.device.id) - holder.spare_bytes
        for holder in room.holders
        if holder.pinned and holder.state is not HolderState.COMING
    )
    return least_bytes(demand) <= room.device.usable_bytes - pinned

"""One device as the policy weighs it: who is on it, what is free, what a demand needs there. Pure.

Above it: `plan.py`. Below it: the views.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.views import ClusterView, Demand, DeviceView, HolderState, HolderView, Rules


@dataclass(slots=True)
class Room:
    """A device and those who hold memory on it."""

    device: DeviceView
    holders: list[HolderView] = field(default_factory=list)
    held_bytes: int = 0
    num_busy: int = 0

    @property
    def free_bytes(self) -> int:
        """What nobody holds; below zero when other programs have taken some of it."""
        return self.device.usable_bytes - self.held_bytes


def rooms_of(view: ClusterView) -> dict[str, Room]:
    """Return every device with its holders."""
    rooms = {device.id: Room(device) for device in view.devices}
    for holder in view.holders:
        for part in holder.parts:
            room = rooms.get(part.device)
            if room is not None:
                room.holders.append(holder)
                room.held_bytes += part.num_bytes
                room.num_busy += holder.busy
    return rooms


def comfortable_bytes(device: DeviceView, demand: Demand) -> int:
    """Return what is to be free on the device: with one full context, where it could hold that at all."""
    comfortable = demand.base_bytes + demand.kv_context_bytes
    return comfortable if comfortable <= device.usable_bytes else least_bytes(demand)


def least_bytes(demand: Demand) -> int:
    """Return the least that is worth loading with."""
    return demand.base_bytes + demand.kv_floor_bytes


def kv_cache_bytes(free_bytes: int, demand: Demand) -> int:
    """Return a fair share of what is left, at least one context if that fits, at most what is of use."""
    left = free_bytes - demand.base_bytes
    least = demand.kv_context_bytes if demand.kv_context_bytes <= left else left
    return min(demand.kv_want_bytes, max(least, left // (1 + demand.num_others)), left)


def must_leave(room: Room, demand: Demand, apart: frozenset[str]) -> list[HolderView]:
    """Return those who may not share a device with the demand's model."""
    if not demand.group or demand.group not in apart:
        return []
    return [holder for holder in room.holders if holder.group == demand.group and holder.model != demand.model]


def is_turn(demand: Demand, rules: Rules) -> bool:
    """Return whether the demand has waited so long that a busy model must make way. Batch work has no turn."""
    return demand.waited_s >= rules.max_wait_s and not demand.batch


def may_leave(holder: HolderView, demand: Demand, rules: Rules, now_s: float) -> bool:
    """Return whether a holder may be sent away for the demand's sake now."""
    if holder.pinned or holder.state is not HolderState.READY or demand.replica or not holder.reserved_bytes:
        return False
    if demand.batch and not holder.batch and now_s - holder.last_used_s < rules.max_wait_s:
        return False
    if is_turn(demand, rules):
        return True
    return not holder.busy and now_s - holder.ready_since_s >= rules.min_residency_s


def stays_until_s(holders: Iterable[HolderView], rules: Rules, now_s: float) -> float:
    """Return when the next of the idle holders will have been there for long enough; a second on when none is."""
    idle = (h for h in holders if h.state is HolderState.READY and not h.busy and not h.pinned)
    ends = (holder.ready_since_s + rules.min_residency_s for holder in idle)
    return min((end_s for end_s in ends if end_s > now_s), default=now_s + 1.0)

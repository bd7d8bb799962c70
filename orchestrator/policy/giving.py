"""What it takes to have so much room on one device: who must leave, who shrinks, who goes, at what loss. Pure.

Above it: `plan.py`, `split.py`. Below it: `hosts.py`, `room.py`, `victims.py`, the views.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.policy.hosts import Hosts
from orchestrator.policy.room import Room, may_leave, must_leave
from orchestrator.policy.victims import BUSY_LOSS, GiveWay, cheapest
from orchestrator.views import ClusterView, Demand, HolderView, Rules


@dataclass(frozen=True, slots=True)
class Option:
    """One device, what it takes to have room there, and what that costs; `loss` has the cold load in it, too."""

    room: Room
    give: GiveWay
    loss: float


def can_wake_on(sleeper: HolderView, room: Room) -> bool:
    """Return whether the sleeper can wake on this device."""
    if sleeper.node != room.device.node:
        return False
    return sleeper.wakes_on is None or room.device.id in sleeper.wakes_on


def can_hand_over_to(sleeper: HolderView, room: Room) -> bool:
    """Return whether a worker on this device can take over what the sleeper holds, which cannot wake there itself."""
    return sleeper.hand_over_s is not None and sleeper.node == room.device.node and not can_wake_on(sleeper, room)


def arrives_s(room: Room, demand: Demand, sleeper: HolderView | None) -> float:
    """Return how long it takes the model to come up on this device: woken, taken over or loaded."""
    if sleeper is None:
        return demand.load_s
    if can_wake_on(sleeper, room):
        return sleeper.wake_s
    return sleeper.hand_over_s if sleeper.hand_over_s is not None and can_hand_over_to(sleeper, room) else demand.load_s


def cold_s(room: Room, demand: Demand, sleeper: HolderView | None) -> float:
    """Return how much longer it takes here than it would where a sleeper wakes."""
    return 0.0 if sleeper is None else max(0.0, arrives_s(room, demand, sleeper) - sleeper.wake_s)


def give_way(
    room: Room,
    needed_bytes: int,
    demand: Demand,
    view: ClusterView,
    rules: Rules,
    hosts: Hosts,
    below: float = float("inf"),
) -> GiveWay | None:
    """Return how the device comes to have so much free for the demand at the least loss.

    Returns:
        None when it cannot now, or when it would cost `below` or more.
    """
    forced = must_leave(room, demand, view.apart)
    if not forced:
        lacking = needed_bytes - room.free_bytes
        if lacking <= 0:
            return GiveWay()
        leaving = [holder for holder in room.holders if may_leave(holder, demand, rules, view.now_s)]
        return cheapest(room, leaving, lacking, hosts.loss_of, below)

    if any(not may_leave(holder, demand, rules, view.now_s) for holder in forced):
        return None
    loss = sum(hosts.loss_of(holder) + (BUSY_LOSS if holder.busy else 0.0) for holder in forced)
    freed = sum(holder.bytes_on(room.device.id) for holder in forced)
    lacking = needed_bytes - room.free_bytes - freed
    found: GiveWay | None = GiveWay()
    if lacking > 0:
        staying = [holder for holder in room.holders if holder not in forced]
        rest = Room(room.device, staying, room.held_bytes - freed)
        leaving = [holder for holder in staying if may_leave(holder, demand, rules, view.now_s)]
        found = cheapest(rest, leaving, lacking, hosts.loss_of, below - loss)
    if found is None or found.loss + loss >= below:
        return None
    return GiveWay(found.loss + loss, found.freed_bytes + freed, found.shrink, (*forced, *found.victims))

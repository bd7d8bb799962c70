"""Who gives way on one device, at the least expected loss. Pure.

Above it: `plan.py`, `split.py`. Below it: `hosts.py`, `room.py`, the views.

What a holder's going costs is the time that its next user will wait longer, times how soon that is to be expected:
its rate of use x its wake or load time, in the line of GreedyDual-Size-Frequency (Cherkasova 1998), whose cost per byte
comes in through the search: the *set* with the least total loss that frees enough is chosen, not one after the other.
KV caches shrink first, for that costs nearly nothing: a holder's going is weighed for what it frees beyond its spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.policy.room import Room
from orchestrator.views import HolderState, HolderView

MAX_SEARCHED = 2000
"""So many steps the search for the best set may take on one device; few models are searched to the end."""
BUSY_LOSS = 1e3
"""What closing a busy model costs beyond the rest: every idle one goes first."""
SHRINK_LOSS = 1e-12
"""What shrinking one KV cache costs: less than any going, more than nothing."""


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Who shrinks, sleeps and goes, and the expected loss in seconds of waiting a second."""

    loss: float = 0.0
    freed_bytes: int = 0
    shrink: tuple[tuple[str, int], ...] = ()
    victims: tuple[HolderView, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """One who may go: what its going frees beyond its spare, what that costs."""

    gain_bytes: int
    loss: float
    holder: HolderView


def cheapest(
    room: Room,
    leaving: Sequence[HolderView],
    lacking_bytes: int,
    loss_of: Callable[[HolderView], float],
    below: float = float("inf"),
) -> GiveWay | None:
    """Return how the device frees so much at the least loss.

    Args:
        room: the device; every ready holder on it may shrink.
        leaving: those of its holders that may go.
        lacking_bytes: what is to be freed.
        loss_of: what one holder's going costs.
        below: what costs as much or more is of no interest.

    Returns:
        None when all together do not suffice, or not below that loss.
    """
    device = room.device.id
    spare = sum(holder.spare_bytes for holder in room.holders if holder.state is HolderState.READY)
    residue = lacking_bytes - spare
    if residue <= 0:
        return _with_shrinking(room, (), lacking_bytes, 0.0)
    items = []
    for holder in leaving:
        gain = holder.bytes_on(device) - holder.spare_bytes
        if gain > 0:
            items.append(Item(gain, loss_of(holder) + (BUSY_LOSS if holder.busy else 0.0), holder))
            residue -= gain
    if residue > 0:
        return None
    residue = lacking_bytes - spare
    items.sort(key=lambda item: (item.loss / item.gain_bytes, item.holder.last_used_s, item.holder.id))
    if _bound(items, 0, residue) >= below:
        return None
    chosen = _best_set(items, residue)
    loss = sum(item.loss for item in chosen)
    return None if loss >= below else _with_shrinking(room, [item.holder for item in chosen], lacking_bytes, loss)


def _with_shrinking(room: Room, victims: Sequence[HolderView], lacking_bytes: int, loss: float) -> GiveWay:
    """Return the victims' going, and what else is lacking from the KV caches of the rest, the largest spare first."""
    freed = sum(victim.bytes_on(room.device.id) for victim in victims)
    left = lacking_bytes - freed
    shrink: list[tuple[str, int]] = []
    if left > 0:
        gone = {victim.id for victim in victims}
        staying = [h for h in room.holders if h.id not in gone and h.state is HolderState.READY and h.spare_bytes > 0]
        for holder in sorted(staying, key=lambda h: (-h.spare_bytes, h.id)):
            given = min(left, holder.spare_bytes)
            shrink.append((holder.id, given))
            left -= given
            if left <= 0:
                break
    given_bytes = sum(num_bytes for _, num_bytes in shrink)
    return GiveWay(loss + SHRINK_LOSS * len(shrink), freed + given_bytes, tuple(shrink), tuple(victims))


def _bound(items: Sequence[Item], start: int, needed_bytes: int) -> float:
    """Return the least loss that any set from `start` on could have: as if the last one could go in part."""
    loss = 0.0
    for item in items[start:]:
        if item.gain_bytes >= needed_bytes:
            return loss + item.loss * max(0, needed_bytes) / item.gain_bytes
        needed_bytes -= item.gain_bytes
        loss += item.loss
    return float("inf")


def _rank(chosen: Sequence[Item]) -> tuple[float, int]:
    return sum(item.loss for item in chosen), sum(item.gain_bytes for item in chosen)


def _greedy(items: Sequence[Item], needed_bytes: int) -> list[Item]:
    """Take the cheapest per byte until it is enough, then spare whoever is not needed; or the one best alone."""
    chosen: list[Item] = []
    freed = 0
    for item in items:
        if freed >= needed_bytes:
            break
        chosen.append(item)
        freed += item.gain_bytes
    for item in sorted(chosen, key=lambda item: -item.loss):
        if freed - item.gain_bytes >= needed_bytes:
            chosen.remove(item)
            freed -= item.gain_bytes
    alone = min((item for item in items if item.gain_bytes >= needed_bytes), key=lambda i: _rank([i]), default=None)
    return [alone] if alone is not None and _rank([alone]) < _rank(chosen) else chosen


def _best_set(items: Sequence[Item], needed_bytes: int) -> list[Item]:
    """Branch and bound over the sets, from the greedy one; the best found when `MAX_SEARCHED` steps are over."""
    best = _greedy(items, needed_bytes)
    best_rank = _rank(best)
    steps = 0

    def search(index: int, chosen: list[Item], needed: int, loss: float, gain: int) -> None:
        nonlocal best, best_rank, steps
        steps += 1
        if needed <= 0:
            if (loss, gain) < best_rank:
                best, best_rank = list(chosen), (loss, gain)
            return
        if steps > MAX_SEARCHED or index == len(items) or loss + _bound(items, index, needed) >= best_rank[0]:
            return
        item = items[index]
        chosen.append(item)
        search(index + 1, chosen, needed - item.gain_bytes, loss + item.loss, gain + item.gain_bytes)
        chosen.pop()
        search(index + 1, chosen, needed, loss, gain)

    if len(best) > 1 or len(items) > 1:
        search(0, [], needed_bytes, 0.0, 0)
    # Sets found by the search are minimal in loss, but one of no loss at all might still be there needlessly.
    freed = sum(item.gain_bytes for item in best)
    for item in sorted(best, key=lambda item: (-item.loss, item.holder.id)):
        if freed - item.gain_bytes >= needed_bytes:
            best = [other for other in best if other is not item]
            freed -= item.gain_bytes
    return best

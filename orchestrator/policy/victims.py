"""Who gives way on one device, at the least expected loss. Pure.

Above it: `plan.py`. Below it: the views, `room.py`.

What a holder's going costs is the time that its next user will wait longer, times how soon that is to be expected:
its rate of use x its wake or load time, in the line of GreedyDual-Size-Frequency (Cherkasova 1998), whose cost per byte
comes in through the search: the *set* with the least total loss that frees enough is chosen, not one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.policy.room import Room
from orchestrator.views import HolderState, HolderView, NodeView

EXACT_UP_TO = 10
"""So many candidates are searched exactly; of more, the cheapest for their bytes."""
BUSY_LOSS_S = 1e3
"""What closing a busy model costs beyond the rest: every idle one goes first."""
LEAST_RATE = 1e-9
SHRINK_LOSS_S = 1e-6


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Who shrinks, sleeps and goes, and the expected loss in seconds of waiting a second."""

    loss: float = 0.0
    freed_bytes: int = 0
    shrink: tuple[tuple[str, int], ...] = ()
    victims: tuple[HolderView, ...] = ()


def loss_of(holder: HolderView) -> float:
    """Return the expected loss when a holder goes: rate of use x seconds to bring it back."""
    back_s = holder.load_s if holder.sleep_bytes is None else holder.wake_s
    return max(holder.uses_per_s, LEAST_RATE) * back_s + (BUSY_LOSS_S if holder.busy else 0.0)


def shrinking(room: Room, lacking_bytes: int) -> GiveWay | None:
    """Return how KV caches alone can free so much: the largest spare first, none needlessly; None if they cannot."""
    chosen: list[tuple[str, int]] = []
    left = lacking_bytes
    for holder in sorted(room.holders, key=lambda h: (-h.spare_bytes, h.id)):
        if left <= 0 or holder.spare_bytes <= 0 or holder.state is not HolderState.READY:
            break
        given = min(left, holder.spare_bytes)
        chosen.append((holder.id, given))
        left -= given
    if left > 0:
        return None
    return GiveWay(SHRINK_LOSS_S * len(chosen), lacking_bytes, tuple(chosen))


def cheapest(room: Room, candidates: Sequence[HolderView], lacking_bytes: int) -> GiveWay | None:
    """Return the candidates whose going frees enough on the device at the least loss; None if all do not suffice.

    Of equal losses the one that frees less, then the one not used for longest.
    """
    device = room.device.id
    items = [(holder.bytes_on(device), loss_of(holder), holder) for holder in candidates]
    items = [item for item in items if item[0] > 0]
    if sum(item[0] for item in items) < lacking_bytes:
        return None
    items.sort(key=lambda item: (item[1] / item[0], item[2].last_used_s, item[2].id))
    chosen = _exact(items, lacking_bytes) if len(items) <= EXACT_UP_TO else _greedy(items, lacking_bytes)
    return GiveWay(sum(i[1] for i in chosen), sum(i[0] for i in chosen), (), tuple(i[2] for i in chosen))


_Item = tuple[int, float, HolderView]


def _rank(chosen: Sequence[_Item]) -> tuple[float, int, float]:
    newest = max((item[2].last_used_s for item in chosen), default=0.0)
    return round(sum(item[1] for item in chosen), 12), sum(item[0] for item in chosen), newest


def _greedy(items: Sequence[_Item], lacking_bytes: int) -> list[_Item]:
    """Take the cheapest per byte until it is enough, then give back whoever is not needed; or the one best alone."""
    chosen: list[_Item] = []
    freed = 0
    for item in items:
        if freed >= lacking_bytes:
            break
        chosen.append(item)
        freed += item[0]
    for item in sorted(chosen, key=lambda item: -item[1]):
        if freed - item[0] >= lacking_bytes:
            chosen.remove(item)
            freed -= item[0]
    alone = min((item for item in items if item[0] >= lacking_bytes), key=lambda item: _rank([item]), default=None)
    return [alone] if alone is not None and _rank([alone]) < _rank(chosen) else chosen


def _exact(items: Sequence[_Item], lacking_bytes: int) -> list[_Item]:
    """Search all subsets, leaving out what cannot beat the best one found."""
    best = _greedy(items, lacking_bytes)
    best_rank = _rank(best)
    rest = [0] * (len(items) + 1)
    for index in range(len(items) - 1, -1, -1):
        rest[index] = rest[index + 1] + items[index][0]

    def search(index: int, chosen: list[_Item], freed: int, loss: float) -> None:
        nonlocal best, best_rank
        if freed >= lacking_bytes:
            if (rank := _rank(chosen)) < best_rank:
                best, best_rank = list(chosen), rank
            return
        if index == len(items) or freed + rest[index] < lacking_bytes or loss > best_rank[0]:
            return
        search(index + 1, [*chosen, items[index]], freed + items[index][0], loss + items[index][1])
        search(index + 1, chosen, freed, loss)

    search(0, [], 0, 0.0)
    return best


def where_to(
    victims: Sequence[HolderView], sleepers: Sequence[HolderView], nodes: Sequence[NodeView]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return who of the victims sleeps and who goes, with the sleepers that make room for more valuable ones.

    Args:
        sleepers: who sleeps already, on any node.
    """
    sleep: list[str] = []
    evict: list[str] = []
    left = {node.id: node.sleep_bytes for node in nodes if node.sleep_bytes > 0}
    asleep: dict[str, list[HolderView]] = {}
    for holder in sleepers:
        if holder.node in left and holder.sleep_bytes:
            left[holder.node] -= holder.sleep_bytes
            asleep.setdefault(holder.node, []).append(holder)
    for victim in sorted(victims, key=_worth_of_sleep, reverse=True):
        room = left.get(victim.node, 0)
        if victim.sleep_bytes is None or victim.node not in left:
            evict.append(victim.id)
            continue
        going: list[HolderView] = []
        for other in sorted(asleep.get(victim.node, ()), key=_worth_of_sleep):
            if room >= victim.sleep_bytes or _worth_of_sleep(other) >= _worth_of_sleep(victim):
                break
            if not other.pinned:
                going.append(other)
                room += other.sleep_bytes or 0
        if room < victim.sleep_bytes:
            evict.append(victim.id)
            continue
        for other in going:
            asleep[victim.node].remove(other)
            evict.append(other.id)
        sleep.append(victim.id)
        left[victim.node] = room - victim.sleep_bytes
    return tuple(sleep), tuple(evict)


def _worth_of_sleep(holder: HolderView) -> float:
    """Seconds of waiting a second that sleep saves, for each byte of host memory."""
    saved_s = max(0.0, holder.load_s - holder.wake_s) * max(holder.uses_per_s, LEAST_RATE)
    return saved_s / max(1, holder.sleep_bytes or 1)

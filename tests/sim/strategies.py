"""Who gives way: hostler's policy, and those it is measured against, all within the same rules of waiting.

Above it: the world. Below it: `orchestrator.policy`, the views.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from orchestrator import policy
from orchestrator.devices import SLEEP_SHARE_BESIDE_GPUS
from orchestrator.policy.giving import can_hand_over_to, can_wake_on
from orchestrator.policy.room import Room, comfortable_bytes, kv_cache_bytes, least_bytes, may_leave, rooms_of
from orchestrator.views import ClusterView, Demand, HolderState, HolderView, Obstacle, Part, Plan, Refusal, Rules

from .traces import Trace


class Strategy(Protocol):
    """Decides where a model goes and who gives way. `sleep_share` of host memory is not page cache but for sleepers."""

    name: str
    sleep_share: float

    def seen(self, model: str, now_s: float) -> None:
        """Take notice of a request."""
        ...

    def uses_per_s(self, model: str, now_s: float, learned: float) -> float:
        """Return the rate that the views show, given the one that was learned."""
        ...

    def plan(self, view: ClusterView, demand: Demand, rules: Rules) -> Plan | Refusal:
        """Decide."""
        ...


class Hostler:
    """The policy as it runs."""

    name = "hostler"
    sleep_share = SLEEP_SHARE_BESIDE_GPUS

    def seen(self, model: str, now_s: float) -> None:
        """The world counts uses already."""

    def uses_per_s(self, model: str, now_s: float, learned: float) -> float:
        return learned

    def plan(self, view: ClusterView, demand: Demand, rules: Rules) -> Plan | Refusal:
        return policy.plan(view, demand, rules)


class Clairvoyant(Hostler):
    """The policy told the truth: a model's rate is one over the time to its next request (Belady 1966, with costs)."""

    name = "clairvoyant"

    def __init__(self, trace: Trace) -> None:
        self._arrivals_s = trace.arrivals_s

    def uses_per_s(self, model: str, now_s: float, learned: float) -> float:
        arrivals_s = self._arrivals_s[model]
        index = bisect_right(arrivals_s, now_s)
        return 1.0 / max(0.001, arrivals_s[index] - now_s) if index < len(arrivals_s) else 0.0


class _InOrder:
    """Victims one after the other in some order until it is enough, on the device where the last one matters least.

    Where host memory is set aside for it they sleep, and push sleepers out that come before them in the same order.
    """

    name = ""
    sleep_share = 0.0

    def key(self, holder: HolderView) -> float:
        """Return what the order is by; the least goes first."""
        raise NotImplementedError

    def seen(self, model: str, now_s: float) -> None:
        """Nothing to count."""

    def uses_per_s(self, model: str, now_s: float, learned: float) -> float:
        return learned

    def plan(self, view: ClusterView, demand: Demand, rules: Rules) -> Plan | Refusal:
        able = [room for room in rooms_of(view).values() if least_bytes(demand) <= room.device.usable_bytes]
        if not able:
            return Refusal(Obstacle.NEVER, least_bytes(demand), 0, "no device could hold it")
        mine = (h for h in view.holders if h.model == demand.model and h.state is HolderState.ASLEEP)
        sleeper = next(mine, None)
        tries = []
        for room in able:
            wakes = sleeper is not None and can_wake_on(sleeper, room)
            cold = sleeper is not None and not wakes
            needed = comfortable_bytes(room.device, demand)
            found = self._victims(room, needed - room.free_bytes, demand, view, rules)
            if found is not None:
                shrink, victims = found
                taken = sleeper is not None and can_hand_over_to(sleeper, room)
                worst = max((self.key(victim) for victim in victims), default=float("-inf"))
                rank = (bool(victims), cold, worst, len(shrink), room.num_busy, room.free_bytes, room.device.id)
                comes_from = sleeper.id if sleeper else ""
                tries.append((rank, room, shrink, victims, comes_from if wakes else "", comes_from if taken else ""))
        if not tries:
            return Refusal(Obstacle.BUSY, least_bytes(demand), 0, "everything is busy")
        _, room, shrink, victims, wake, take_over = min(tries, key=lambda one: one[0])
        freed = sum(num_bytes for _, num_bytes in shrink) + sum(v.bytes_on(room.device.id) for v in victims)
        kv_bytes = kv_cache_bytes(room.free_bytes + freed, demand)
        sleep, evict = self._send(view, victims, sleeper, wake or take_over)
        parts = (Part(room.device.id, demand.base_bytes + kv_bytes),)
        reason = self.__class__.__name__
        return Plan(demand.model, parts, kv_bytes, reason, wake, take_over, sleep, evict, tuple(shrink))

    def _victims(
        self, room: Room, lacking: int, demand: Demand, view: ClusterView, rules: Rules
    ) -> tuple[list[tuple[str, int]], list[HolderView]] | None:
        """Return whose KV cache shrinks and who goes; None when that is not enough."""
        victims: list[HolderView] = []
        leaving = sorted((h for h in room.holders if may_leave(h, demand, rules, view.now_s)), key=self._key_of)
        spare = sum(holder.spare_bytes for holder in room.holders)
        for holder in leaving:
            if lacking <= spare:
                break
            victims.append(holder)
            lacking -= holder.bytes_on(room.device.id)
            spare -= holder.spare_bytes
        if lacking > spare:
            return None
        shrink = []
        for holder in room.holders:
            if lacking > 0 and holder.spare_bytes and holder not in victims:
                shrink.append((holder.id, min(lacking, holder.spare_bytes)))
                lacking -= holder.spare_bytes
        return shrink, victims

    def _key_of(self, holder: HolderView) -> tuple[bool, float, str]:
        return holder.busy, self.key(holder), holder.id

    def _send(
        self, view: ClusterView, victims: Sequence[HolderView], sleeper: HolderView | None, kept: str
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        asleep = sorted((h for h in view.holders if h.state is HolderState.ASLEEP), key=self._key_of)
        left = view.nodes[0].sleep_bytes - sum(holder.sleep_bytes or 0 for holder in asleep)
        sleep, evict = [], []
        if sleeper is not None:
            asleep.remove(sleeper)
            if not kept:
                evict.append(sleeper.id)
                left += sleeper.sleep_bytes or 0
        for victim in sorted(victims, key=self._key_of, reverse=True):
            out, room = [], left
            for other in asleep:
                if (victim.sleep_bytes or 0) <= room or self.key(other) >= self.key(victim):
                    break
                out.append(other)
                room += other.sleep_bytes or 0
            if victim.sleep_bytes is None or victim.sleep_bytes > room:
                evict.append(victim.id)
                continue
            sleep.append(victim.id)
            evict.extend(other.id for other in out)
            asleep = [other for other in asleep if other not in out]
            left = room - victim.sleep_bytes
        return tuple(sleep), tuple(evict)


class LeastRecentlyUsed(_InOrder):
    """LRU as it is usually built: what is evicted is gone, and all of host memory caches files."""

    name = "LRU"

    def key(self, holder: HolderView) -> float:
        return holder.last_used_s


class LeastRecentlyUsedAsleep(LeastRecentlyUsed):
    """LRU with hostler's tiers: only the choice of who gives way differs."""

    name = "LRU, sleeping"
    sleep_share = SLEEP_SHARE_BESIDE_GPUS


class LeastFrequentlyUsed(_InOrder):
    """LFU, by all requests since the beginning; as LRU else."""

    name = "LFU"

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    def seen(self, model: str, now_s: float) -> None:
        self._count[model] += 1

    def key(self, holder: HolderView) -> float:
        return self._count[holder.model]

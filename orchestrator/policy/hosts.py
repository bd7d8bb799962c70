"""Host memory, where models sleep: who fits there, who must leave it for whom, and what that costs. Pure.

Above it: `victims.py` and `plan.py`. Below it: the views.

A model that gives way sleeps when its node has host memory for it, or when the sleepers that would have to leave are
worth less there. Worth is the waiting that sleep saves (load less wake time, times the rate of use) for each byte. The
rate is that of the next minutes: what was used a moment ago would else drive out what is used again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.views import ClusterView, HolderState, HolderView

LEAST_RATE = 1e-9
"""Uses a second of a model that nobody has used yet; what was used last still goes last."""


def rate_of(holder: HolderView, now_s: float) -> float:
    """Return the expected uses a second: never quite zero, and the less the longer ago the last use was."""
    return max(holder.uses_per_s, 0.0) + _least_rate(holder, now_s)


def _lasting_rate_of(holder: HolderView, now_s: float) -> float:
    rate = holder.uses_per_s if holder.lasting_per_s is None else holder.lasting_per_s
    return max(rate, 0.0) + _least_rate(holder, now_s)


def _least_rate(holder: HolderView, now_s: float) -> float:
    return LEAST_RATE / (1.0 + max(0.0, now_s - holder.last_used_s))


@dataclass(slots=True)
class Host:
    """One node's host memory for sleepers: what nobody holds, and who may be made to leave, least worth first."""

    left_bytes: int = 0
    sleepers: list[tuple[float, HolderView]] = field(default_factory=list)


class Hosts:
    """All nodes' host memory at one moment. A model that is about to wake keeps its own until it has woken."""

    def __init__(self, view: ClusterView, model: str) -> None:
        """Take in everybody who sleeps; those of `model` count, but never leave for others."""
        self._now_s = view.now_s
        self._by_node = {node.id: Host(node.sleep_bytes) for node in view.nodes if node.sleep_bytes > 0}
        for holder in view.holders:
            host = self._by_node.get(holder.node)
            if holder.state is not HolderState.ASLEEP or host is None or not holder.sleep_bytes:
                continue
            host.left_bytes -= holder.sleep_bytes
            if holder.model != model and not holder.pinned:
                host.sleepers.append((self.worth_of(holder), holder))
        for host in self._by_node.values():
            host.sleepers.sort(key=lambda item: (item[0], item[1].id))

    def worth_of(self, holder: HolderView) -> float:
        """Return the seconds of waiting a second that its sleep saves, for each byte of host memory."""
        return self._saved(holder) / max(1, holder.sleep_bytes or 1)

    def _saved(self, holder: HolderView) -> float:
        return max(0.0, holder.load_s - holder.wake_s) * _lasting_rate_of(holder, self._now_s)

    def _leaving(self, host: Host, holder: HolderView) -> list[tuple[float, HolderView]] | None:
        """Return the sleepers that would leave for a holder, none needlessly; None when it is not worth it."""
        lacking = (holder.sleep_bytes or 0) - host.left_bytes
        leaving: list[tuple[float, HolderView]] = []
        worth = self.worth_of(holder)
        for item in host.sleepers:
            if lacking <= 0 or item[0] >= worth:
                break
            leaving.append(item)
            lacking -= item[1].sleep_bytes or 0
        if lacking > 0:
            return None
        for item in reversed(leaving.copy()):
            if lacking + (item[1].sleep_bytes or 0) <= 0:
                leaving.remove(item)
                lacking += item[1].sleep_bytes or 0
        return leaving

    def loss_of(self, holder: HolderView) -> float:
        """Return the seconds of waiting a second that are to be expected when this holder alone gives way."""
        rate = rate_of(holder, self._now_s)
        gone = rate * holder.load_s
        host = self._by_node.get(holder.node)
        if holder.sleep_bytes is None or host is None:
            return gone
        asleep = rate * holder.wake_s
        if holder.sleep_bytes > host.left_bytes:
            leaving = self._leaving(host, holder)
            if leaving is None:
                return gone
            asleep += sum(self._saved(other) for _, other in leaving)
        return min(gone, asleep)

    def send(
        self, victims: Sequence[HolderView], without: Iterable[str] = ()
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return who of the victims sleeps and who goes for good, sleepers that leave for them included.

        Args:
            victims: who gives way on devices.
            without: sleepers that go in any case, and whose room is free.

        Changes its own account: call it once, last.
        """
        gone = set(without)
        for host in self._by_node.values():
            host.left_bytes += sum(other.sleep_bytes or 0 for _, other in host.sleepers if other.id in gone)
            host.sleepers = [item for item in host.sleepers if item[1].id not in gone]
        sleep: list[str] = []
        evict: list[str] = []
        for victim in sorted(victims, key=lambda holder: (-self.worth_of(holder), holder.id)):
            found = self._by_node.get(victim.node)
            leaving = None if found is None or victim.sleep_bytes is None else self._leaving(found, victim)
            if found is None or leaving is None or victim.load_s <= victim.wake_s:
                evict.append(victim.id)
                continue
            for item in leaving:
                found.sleepers.remove(item)
                found.left_bytes += item[1].sleep_bytes or 0
                evict.append(item[1].id)
            found.left_bytes -= victim.sleep_bytes or 0
            sleep.append(victim.id)
        return tuple(sleep), tuple(evict)

"""A plan's reason in words that people understand: where, how much, who gives way and why those. Pure.

Above it: `plan.py`, `split.py`. Below it: the views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.policy.victims import GiveWay
from orchestrator.views import ClusterView, HolderState, HolderView, in_words


def reason_of(
    view: ClusterView,
    device: str,
    free_bytes: int,
    needed_bytes: int,
    give: GiveWay,
    sleep: Iterable[str],
    evict: Iterable[str],
    *,
    wakes: bool,
    taken: bool,
) -> str:
    """Say why here and why those."""
    does = f"wakes on {device}" if wakes else f"goes to {device}"
    if taken:
        does += " from host memory"
    if not give.shrink and not give.victims:
        return f"{does}: {in_words(free_bytes)} free, {in_words(needed_bytes)} needed"
    return f"{does}: {in_words(needed_bytes)} needed; {giving(view, give, sleep, evict)}"


def giving(view: ClusterView, give: GiveWay, sleep: Iterable[str], evict: Iterable[str]) -> str:
    """Say who gives way, how much, and that little is lost by it; empty when nobody does."""
    by_id = {holder.id: holder for holder in view.holders}
    done = []
    if give.shrink:
        names = ", ".join(sorted(by_id[holder_id].model for holder_id, _ in give.shrink))
        num_bytes = sum(num_bytes for _, num_bytes in give.shrink)
        done.append(f"the KV cache of {names} gives room ({in_words(num_bytes)})")
    asleep, gone = set(sleep), set(evict)
    for verb, back, group in (
        ("sleeps", "wake_s", [v for v in give.victims if v.id in asleep]),
        ("leaves", "load_s", [v for v in give.victims if v.id not in asleep]),
    ):
        if group:
            done.append(f"{', '.join(sorted(v.model for v in group))} {verb} ({_worth(group, view.now_s, back)})")
    out = sorted(by_id[i].model for i in gone if by_id[i].state is HolderState.ASLEEP)
    if out:
        done.append(f"{', '.join(out)} leaves host memory")
    return "; ".join(done)


def _worth(group: Sequence[HolderView], now_s: float, back: str) -> str:
    freed = in_words(sum(holder.reserved_bytes for holder in group))
    idle_s = now_s - max(holder.last_used_s for holder in group)
    back_s = sum(getattr(holder, back) for holder in group)
    busy = "busy, closed to new requests" if any(holder.busy for holder in group) else f"idle for {idle_s:.0f} s"
    return f"{freed}, {busy}, back within {back_s:.1f} s"

"""Where a model goes and who makes room: a pure function over frozen views.

Above it: `loading.py`, which carries the answer out. Below it: `views.py`; no clock, no input or output.

First policy: a model that fits is placed on the device with the most room left. Else the least recently
used idle models of one device go until it fits. Busy and pinned models never go.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.views import (
    ClusterView,
    Demand,
    DeviceView,
    HolderState,
    HolderView,
    Obstacle,
    Part,
    Plan,
    Refusal,
    Rules,
    in_words,
)


def needed_on(device: DeviceView, demand: Demand) -> int:
    """Return the least that must be free: with one full context where the device can hold it at all."""
    comfortable = demand.base_bytes + demand.kv_context_bytes
    return comfortable if comfortable <= device.usable_bytes else demand.base_bytes + demand.kv_floor_bytes


def _kv_cache_bytes(free_bytes: int, demand: Demand) -> int:
    """Return a fair share of what is left, at least one context if that fits, at most what is of use."""
    left = free_bytes - demand.base_bytes
    least = demand.kv_context_bytes if demand.kv_context_bytes <= left else left
    return min(demand.kv_want_bytes, max(least, left // (1 + demand.num_others)), left)


def _plan(device: DeviceView, free_bytes: int, victims: Sequence[HolderView], demand: Demand) -> Plan:
    kv_cache_bytes = _kv_cache_bytes(free_bytes, demand)
    needed_bytes = demand.base_bytes + kv_cache_bytes
    if victims:
        names = ", ".join(sorted(v.model for v in victims))
        reason = f"{device.id} has room for {in_words(needed_bytes)} once {names} (least recently used, idle) is gone"
    else:
        reason = f"{device.id} has {in_words(free_bytes)} free, {in_words(needed_bytes)} needed"
    part = Part(device.id, needed_bytes)
    return Plan(demand.model, (part,), kv_cache_bytes, reason, evict=tuple(v.id for v in victims))


def _victims(holders: Sequence[HolderView], lacking_bytes: int) -> list[HolderView] | None:
    """Return the least recently used idle holders whose going frees `lacking_bytes`, none of them needlessly."""
    chosen: list[HolderView] = []
    freed = 0
    for holder in sorted(holders, key=lambda h: (h.last_used_s, h.id)):
        if freed >= lacking_bytes:
            break
        if holder.busy or holder.pinned or holder.state is not HolderState.READY or holder.reserved_bytes == 0:
            continue
        chosen.append(holder)
        freed += holder.reserved_bytes
    if freed < lacking_bytes:
        return None
    for holder in reversed(chosen.copy()):  # A later, larger one may have made an earlier one needless.
        if freed - holder.reserved_bytes >= lacking_bytes:
            chosen.remove(holder)
            freed -= holder.reserved_bytes
    return chosen


def plan(view: ClusterView, demand: Demand, rules: Rules = Rules()) -> Plan | Refusal:
    """Decide where `demand` goes now, who must go first, and why; or why not."""
    candidates = [d for d in view.devices if demand.device in (None, d.id)]
    least_bytes = demand.base_bytes + demand.kv_floor_bytes
    if not candidates:
        known = ", ".join(d.id for d in view.devices) or "none"
        reason = f"{demand.model} is pinned to {demand.device}, which does not exist; devices: {known}"
        return Refusal(Obstacle.NEVER, least_bytes, least_bytes, reason)
    able = [d for d in candidates if least_bytes <= d.usable_bytes]
    if not able:
        largest = max(candidates, key=lambda d: d.usable_bytes)
        lacking = least_bytes - largest.usable_bytes
        reason = (
            f"{demand.model} needs at least {in_words(least_bytes)}; {largest.id} has {in_words(largest.usable_bytes)} "
            f"even when empty, {in_words(lacking)} too little"
        )
        return Refusal(Obstacle.NEVER, least_bytes, lacking, reason)

    on = {d.id: [h for h in view.holders if h.bytes_on(d.id)] for d in able}
    free = {d.id: d.usable_bytes - sum(h.reserved_bytes for h in on[d.id]) for d in able}
    fitting = [d for d in able if needed_on(d, demand) <= free[d.id]]
    if fitting:
        best = max(fitting, key=lambda d: free[d.id])
        return _plan(best, free[best.id], (), demand)

    options: list[tuple[tuple[float, int, str], DeviceView, list[HolderView]]] = []
    for device in able:
        victims = _victims(on[device.id], needed_on(device, demand) - free[device.id])
        if victims is not None:
            newest = max(v.last_used_s for v in victims)
            options.append(((newest, len(victims), device.id), device, victims))
    if options:
        _, device, victims = min(options, key=lambda option: option[0])
        return _plan(device, free[device.id] + sum(v.reserved_bytes for v in victims), victims, demand)
    return _blocked(able, on, free, demand)


def _blocked(
    able: Sequence[DeviceView], on: dict[str, list[HolderView]], free: dict[str, int], demand: Demand
) -> Refusal:
    """Say who is in the way on the device that comes nearest."""
    nearest = min(able, key=lambda d: needed_on(d, demand) - free[d.id])
    needed = needed_on(nearest, demand)
    lacking = needed - free[nearest.id]
    for device in able:
        unpinned = sum(h.reserved_bytes for h in on[device.id] if not h.pinned)
        if needed_on(device, demand) <= free[device.id] + unpinned:
            busy = ", ".join(sorted(h.model for h in on[device.id] if h.busy and not h.pinned))
            return Refusal(Obstacle.BUSY, needed, lacking, f"waiting for {busy} on {device.id} to become idle")
    pinned = ", ".join(sorted(h.model for d in able for h in on[d.id] if h.pinned))
    reason = f"{demand.model} needs {in_words(needed)}, but pinned models ({pinned}) hold the memory; unpin one"
    return Refusal(Obstacle.PINNED, needed, lacking, reason)

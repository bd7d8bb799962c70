"""One model over several devices of one node: what each part needs, and which devices. Pure.

Above it: `plan.py`. Below it: the views. Parts are even: weights and KV heads divide by the number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.views import Demand

if TYPE_CHECKING:
    from orchestrator.policy.plan import Option

OVERHEAD_PERMILLE = 30
"""What each part needs beyond its even share: embeddings and norms that every rank keeps, buffers for the exchange."""


def share_of(demand: Demand, num_parts: int) -> Demand:
    """Return what one of so many parts asks of its device."""

    def part_of(num_bytes: int) -> int:
        return -(-num_bytes // num_parts)

    base = part_of(demand.base_bytes)
    return replace(
        demand,
        base_bytes=base + base * OVERHEAD_PERMILLE // 1000,
        kv_floor_bytes=part_of(demand.kv_floor_bytes),
        kv_context_bytes=part_of(demand.kv_context_bytes),
        kv_want_bytes=part_of(demand.kv_want_bytes),
    )


def choose(options: Sequence[Option], num_parts: int) -> list[Option]:
    """Return the cheapest so many devices of one node, of one kind of shrink and leave; none when no node has enough.

    A holder whose KV cache would be shrunk for one part must not be sent away for another; the plan drops that shrink.
    """
    by_node: dict[str, list[Option]] = {}
    for option in options:
        by_node.setdefault(option.room.device.node, []).append(option)
    enough = [sorted(o, key=lambda x: (x.loss, -x.room.free_bytes, x.room.device.id)) for o in by_node.values()]
    enough = [node[:num_parts] for node in enough if len(node) >= num_parts]
    return min(enough, key=lambda node: (sum(o.loss for o in node), node[0].room.device.node), default=[])

"""How long a decision takes: `plan` over full clusters, where somebody has to give way.

Above it: `__main__.py`. Below it: the policy.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from orchestrator import policy
from orchestrator.views import ClusterView, Demand, DeviceView, HolderState, HolderView, NodeView, Part, Plan

from .hardware import GB

SIZES = ((50, 8, 1.0), (5000, 1000, 20.0))
"""Models, devices, and the milliseconds that a decision may take."""


@dataclass(frozen=True, slots=True)
class Decided:
    """The median of decisions on clusters of one size."""

    num_models: int
    num_devices: int
    median_ms: float
    limit_ms: float


def full_cluster(num_models: int, num_devices: int, seed: int) -> ClusterView:
    """Return devices of 80 GB, eight to a machine, filled with models in turn; the rest sleep where they can."""
    chance = random.Random(seed)
    devices = tuple(DeviceView(f"n{i // 8}/gpu{i % 8}", 80 * GB, f"n{i // 8}") for i in range(num_devices))
    left = {device.id: device.usable_bytes for device in devices}
    holders = []
    for index in range(num_models):
        device, size = devices[index % num_devices], int(chance.choice((4, 8, 16, 24, 40)) * GB)
        asleep = size > left[device.id]
        left[device.id] -= 0 if asleep else size
        holders.append(
            HolderView(
                id=f"w{index}",
                model=f"m{index}",
                parts=() if asleep else (Part(device.id, size),),
                state=HolderState.ASLEEP if asleep else HolderState.READY,
                busy=not asleep and chance.random() < 0.3,
                last_used_s=1000.0 - chance.expovariate(0.01),
                sleep_bytes=size,
                load_s=1.5 + size / (2 * GB),
                wake_s=0.2 + size / (20 * GB),
                uses_per_s=chance.expovariate(200.0),
                node=device.node,
            )
        )
    nodes = tuple(NodeView(name, 400 * GB) for name in dict.fromkeys(device.node for device in devices))
    return ClusterView(devices, tuple(holders), nodes, now_s=2000.0)


def decide(num_models: int, num_devices: int, limit_ms: float, rounds: int = 25) -> Decided:
    """Time decisions on one new model of 70 GB, for which somebody has to give way, on a cluster of that size."""
    demand = Demand("new", None, 70 * GB, GB, 2 * GB, 8 * GB, load_s=30.0, uses_per_s=0.01, sleep_bytes=70 * GB)
    taken_ms = []
    for seed in range(rounds):
        view = full_cluster(num_models, num_devices, seed)
        began_s = time.process_time()  # The machine may be busy with other things.
        answer = policy.plan(view, demand)
        taken_ms.append(1e3 * (time.process_time() - began_s))
        assert not isinstance(answer, Plan) or answer.sleep or answer.evict, "nobody had to give way"
    return Decided(num_models, num_devices, statistics.median(taken_ms), limit_ms)

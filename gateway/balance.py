"""Which of several ready replicas gets a request: a pure decision. Above: `dispatch`; below: nothing.

The least loaded one, unless another most likely holds the prompt's beginning in its prefix cache and is not clearly
busier. Only this process's own requests are counted, for nobody knows all gateways' at no cost; so equals are told
apart by a hash of the prompt's beginning (highest random weight, Thaler and Ravishankar 1998): every gateway sends
the same conversation to the same one of them, and different conversations to different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.routing import ReplicaKey

# Of replicas that do not say how many requests they run at once.
USUAL_MAX_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Load:
    """One ready replica.

    Attributes:
        num_in_flight: requests of this process that it holds.
        max_running: requests that it runs at once; 0: not known.
    """

    key: ReplicaKey
    num_in_flight: int
    max_running: int = 0

    @property
    def capacity(self) -> int:
        """How many requests it runs at once."""
        return self.max_running or USUAL_MAX_RUNNING

    @property
    def is_full(self) -> bool:
        """Whether one more request would have to wait in its queue."""
        return self.num_in_flight >= self.capacity


def choose(loads: Sequence[Load], *, remembered: ReplicaKey | None = None, prefix: bytes = b"") -> ReplicaKey:
    """Return the replica for one request.

    Args:
        loads: at least one.
        remembered: the replica that most likely holds the prompt's beginning.
        prefix: stands for the prompt's beginning; it decides among equals.
    """
    least = min(loads, key=lambda load: (load.num_in_flight / load.capacity, -_weight(prefix, load.key)))
    for load in loads:
        if load.key == remembered and not _is_clearly_busier(load, least):
            return load.key
    return least.key


def _is_clearly_busier(load: Load, least: Load) -> bool:
    if load.is_full and not least.is_full:
        return True
    # A quarter of a batch: the prefix saves its prefill, and costs every step that much company at most.
    slack = max(1, load.capacity // 4)
    return load.num_in_flight - least.num_in_flight * load.capacity / least.capacity > slack


def _weight(prefix: bytes, key: ReplicaKey) -> int:
    address, generation = key
    digest = hashlib.blake2b(address.encode() + b"\0%d" % generation, key=prefix[:64], digest_size=8)
    return int.from_bytes(digest.digest())

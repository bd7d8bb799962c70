"""What is watched while the load runs: the ledger, what worker processes really hold, and what happened.

Above: the run. Below: the placement contract, on the server's own socket.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
from hostler.channel import open_channel
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1 import placement_pb2_grpc

EVERY_S = 0.25
FIRST_LOAD_WITHIN = 0.10
LATER_LOADS_WITHIN = 0.03
_SETTLED_S = 1.0


@dataclass
class Observed:
    """What was seen.

    Attributes:
        faults: rules that were broken, in words.
        worst_first, worst_later: largest share by which a worker held more or less than it was given, in its model's
            first load of this run and in later ones. The part of the KV cache's budget that was not backed by memory
            yet counts as not given.
        fullest: largest share of a device's budget that was reserved.
    """

    faults: list[str] = field(default_factory=list)
    worst_first: float = 0.0
    worst_later: float = 0.0
    fullest: float = 0.0
    num_looks: int = 0
    num_measured: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)

    def look(self, status: pb.GetStatusResponse, first_generations: dict[str, int]) -> None:
        """Judge one moment."""
        self.num_looks += 1
        for device in status.devices:
            self.fullest = max(self.fullest, device.reserved_bytes / device.budget_bytes)
            if device.reserved_bytes > device.budget_bytes:
                self.faults.append(f"{device.id}: {device.reserved_bytes} reserved of {device.budget_bytes}")
        for item in status.replicas:
            self._weigh(item, first_generations)

    def _weigh(self, item: pb.ReplicaStatus, first_generations: dict[str, int]) -> None:
        worker = item.worker
        ready = item.replica.state == pb.MODEL_STATE_READY and worker.state == life.WORKER_STATE_READY
        if not ready or not worker.device_bytes or not worker.kv_reserved_bytes:
            return
        given = item.reserved_bytes - (worker.kv_reserved_bytes - worker.kv_allocated_bytes)
        off = abs(worker.device_bytes - given) / given
        self.num_measured += 1
        is_first = first_generations.setdefault(item.model, item.replica.generation) == item.replica.generation
        if is_first:
            self.worst_first = max(self.worst_first, off)
        else:
            self.worst_later = max(self.worst_later, off)
        limit = FIRST_LOAD_WITHIN if is_first else LATER_LOADS_WITHIN
        if off > limit and item.replica.generation not in self.told:
            self.told.add(item.replica.generation)
            self.faults.append(
                f"{item.model}, generation {item.replica.generation}: holds {worker.device_bytes / 2**20:.0f} MiB, "
                f"was given {given / 2**20:.0f} MiB ({off:+.1%}, at most {limit:.0%})"
            )


async def observe(target: str, observed: Observed) -> None:
    """Look at the server every `EVERY_S` until cancelled."""
    async with open_channel(target) as channel:
        stub = placement_pb2_grpc.PlacementServiceStub(channel)
        first_generations: dict[str, int] = {}
        while True:
            observed.look(await stub.GetStatus(pb.GetStatusRequest(), timeout=10), first_generations)
            await asyncio.sleep(EVERY_S)


async def count_events(target: str, observed: Observed) -> None:
    """Count what happened, by kind."""
    async with open_channel(target) as channel:
        stub = placement_pb2_grpc.PlacementServiceStub(channel)
        try:
            async for event in stub.WatchEvents(pb.WatchEventsRequest(past_only=True), timeout=10):
                name = pb.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()
                observed.kinds[name] = observed.kinds.get(name, 0) + 1
                if event.kind in (pb.EVENT_KIND_LOST, pb.EVENT_KIND_FAILED):
                    observed.faults.append(f"{name}: {event.model}: {event.why}")
        except grpc.aio.AioRpcError as error:
            observed.faults.append(f"events could not be read: {error.details()}")

"""Open channels to workers, one for each address, and how many of our requests each holds. Above: `dispatch`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio
from hostler.channel import open_channel, worker_key
from hostler.inference.v1.inference_pb2_grpc import InferenceServiceStub
from hostler.placement.v1 import placement_pb2

from gateway.line import Line
from gateway.routing import ReplicaKey, Routes, key_of

if TYPE_CHECKING:
    from hostler.inference.v1.inference_pb2_grpc import InferenceServiceAsyncStub


@dataclass(slots=True)
class Connection:
    """An open channel to one worker: its stub, and the line that generations take."""

    channel: grpc.aio.Channel
    stub: InferenceServiceAsyncStub
    line: Line
    num_in_flight: int = 0


class WorkerChannels:
    """Opens a channel at first use and closes it when its replica has left the table and its last request has ended.

    Args:
        token: the run's, from which the keys of workers on other hosts are made.
    """

    def __init__(self, token: str = "") -> None:
        self._token = token
        self._connections: dict[ReplicaKey, Connection] = {}
        self._listed: set[ReplicaKey] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def num_in_flight(self, replica: placement_pb2.Replica) -> int:
        """Return how many requests of this process the replica holds."""
        connection = self._connections.get(key_of(replica))
        return 0 if connection is None else connection.num_in_flight

    @contextmanager
    def lease(self, replica: placement_pb2.Replica) -> Iterator[Connection]:
        """Count one request on a replica for as long as the context lasts."""
        key = key_of(replica)
        connection = self._connections.get(key)
        if connection is None:
            channel = open_channel(replica.address, worker_key(self._token, replica.id))
            stub = InferenceServiceStub(channel)
            connection = self._connections[key] = Connection(channel, stub, Line(stub))
        connection.num_in_flight += 1
        try:
            yield connection
        finally:
            connection.num_in_flight -= 1
            if not connection.num_in_flight and key not in self._listed:
                self._drop(key)

    def keep_only(self, routes: Routes) -> None:
        """Close what the new table no longer lists and nobody uses."""
        self._listed = routes.replicas()
        for key in [k for k, c in self._connections.items() if not c.num_in_flight and k not in self._listed]:
            self._drop(key)

    def _drop(self, key: ReplicaKey) -> None:
        connection = self._connections.pop(key, None)
        if connection is not None:
            task = asyncio.create_task(connection.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close everything; calls that still run are cancelled."""
        for key in list(self._connections):
            self._drop(key)
        await asyncio.gather(*self._closing, return_exceptions=True)

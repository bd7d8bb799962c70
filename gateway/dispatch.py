"""One generation, from target to events: pick a replica, or have one brought up; retry what nobody has seen yet.

Above: routes; below: `routing`, `channels`, `placement`, and the inference stubs (only here and in `channels`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import grpc.aio
from hostler.channel import call_metadata
from hostler.errors import (
    Cancelled,
    HostlerError,
    ModelLoadFailed,
    StaleGeneration,
    Unavailable,
    WorkerLost,
    from_rpc_error,
)
from hostler.inference.v1 import inference_pb2 as pb
from hostler.placement.v1 import placement_pb2

from gateway.channels import WorkerChannels
from gateway.placement import PlacementClient
from gateway.routing import ReplicaKey, RouteTable, Target, key_of, ready_replicas

log = logging.getLogger(__name__)

MAX_TRIES = 3
# A worker that dies is noticed by the orchestrator within its own time; until then the table still lists it.
GONE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being brought up for this request."""

    progress: placement_pb2.EnsureProgress


Event = Loading | pb.GenerateResponse


class Dispatcher:
    """Carries requests to workers.

    Args:
        ensure_timeout_s: longest wait for a model that is not loaded.
        gone_timeout_s: longest wait, before a retry, for the table to drop a lost replica.
    """

    def __init__(
        self,
        table: RouteTable,
        channels: WorkerChannels,
        placement: PlacementClient,
        *,
        ensure_timeout_s: float,
        gone_timeout_s: float = GONE_TIMEOUT_S,
    ) -> None:
        self._table = table
        self._channels = channels
        self._placement = placement
        self._ensure_timeout_s = ensure_timeout_s
        self._gone_timeout_s = gone_timeout_s

    async def generate(
        self, target: Target, request: pb.GenerateRequest, request_id: str, *, cache_scope: str
    ) -> AsyncGenerator[Event, None]:
        """Stream one choice. The last event is `finish`. Closing the generator cancels the worker's call at once.

        The caller's `cache_scope` (`doors.cache_scope_of`) is set in `request`: no generation goes without one. So is
        the target's adapter: no request for an adapter is answered by its base model.

        A worker that is lost before its first token costs the client nothing but time: up to three tries. After the
        first token nothing is ever repeated.

        Raises:
            HostlerError: from the worker, from the orchestrator, or for the loss of either.
        """
        request.cache_scope = cache_scope
        request.adapter = target.adapter
        model = target.route.name
        lost: set[ReplicaKey] = set()
        for attempt in range(1, MAX_TRIES + 1):
            replica = self._pick(model, lost)
            if replica is None:
                for key in lost:
                    await self._table.gone(key, self._gone_timeout_s)
                async with aclosing(self._ensure(model, request_id)) as steps:
                    async for step in steps:
                        if isinstance(step, Loading):
                            yield step
                        else:
                            replica = step
            if replica is None:
                raise ModelLoadFailed(f"The model '{target.name}' could not be brought up.")
            begun = False
            try:
                async with aclosing(self._attempt(replica, request, request_id)) as events:
                    async for event in events:
                        begun = begun or event.WhichOneof("event") != "progress"
                        yield event
                return
            except HostlerError as error:
                if begun or attempt == MAX_TRIES or not _worth_retrying(error):
                    raise
                lost.add(key_of(replica))
                log.warning(
                    "retrying elsewhere", extra={"request_id": request_id, "reason": error.reason, "attempt": attempt}
                )

    async def tokenize(self, target: Target, request: pb.TokenizeRequest, request_id: str) -> pb.TokenizeResponse:
        """Return the token ids of a prompt, from a worker of the target's model, which is brought up if need be.

        Raises:
            HostlerError: from the worker, from the orchestrator, or for the loss of either.
        """
        model = target.route.name
        replica = self._pick(model, set())
        if replica is None:
            async with aclosing(self._ensure(model, request_id)) as steps:
                async for step in steps:
                    if not isinstance(step, Loading):
                        replica = step
        if replica is None:
            raise ModelLoadFailed(f"The model '{target.name}' could not be brought up.")
        metadata = call_metadata(request_id=request_id, generation=replica.generation)
        with self._channels.lease(replica) as stub:
            try:
                return await stub.Tokenize(request, metadata=metadata)
            except grpc.RpcError as error:
                raise _worker_error(error) from None

    def _pick(self, model: str, lost: set[ReplicaKey]) -> placement_pb2.Replica | None:
        target = self._table.routes.find(model) if self._table.routes else None
        if target is None:
            return None
        return self._channels.least_loaded(
            [replica for replica in ready_replicas(target.route) if key_of(replica) not in lost]
        )

    async def _ensure(self, model: str, request_id: str) -> AsyncGenerator[Loading | placement_pb2.Replica, None]:
        steps = self._placement.ensure(model, request_id=request_id, timeout_s=self._ensure_timeout_s)
        async with aclosing(steps):
            async for step in steps:
                yield Loading(step) if isinstance(step, placement_pb2.EnsureProgress) else step

    async def _attempt(
        self, replica: placement_pb2.Replica, request: pb.GenerateRequest, request_id: str
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        metadata = call_metadata(request_id=request_id, generation=replica.generation)
        with self._channels.lease(replica) as stub:
            call = stub.Generate(request, metadata=metadata)
            try:
                async for event in call:
                    yield event
                    if event.HasField("finish"):
                        return
            except grpc.RpcError as error:
                raise _worker_error(error) from None
            finally:
                call.cancel()
        raise WorkerLost("The worker ended the reply before it was finished. Try again.")


def _worth_retrying(error: HostlerError) -> bool:
    # Plain `unavailable` is a worker that has just begun to drain.
    return type(error) in (WorkerLost, StaleGeneration, Unavailable)


def _worker_error(error: grpc.RpcError) -> HostlerError:
    problem = from_rpc_error(error)
    if isinstance(problem, Cancelled):
        # Our own cancelling never arrives here, so the worker itself broke the call off.
        return WorkerLost("The worker broke the reply off. Try again.")
    return problem


async def merge(streams: list[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of several streams as they come, each with its stream's index; the first failure ends all.

    One stream, the usual case, costs no task and no queue.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for event in stream:
                yield 0, event
        return
    # Bounded, so that a slow reader holds the workers back and not our memory.
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            index, item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

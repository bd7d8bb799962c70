"""The gateway's side of the placement contract. Above: `dispatch` and the admin routes; below: gRPC.

The only file that knows the placement stubs. The orchestrator may be away at any moment: watching goes on trying and
the last table stays; everything else says so at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from hostler.channel import call_metadata, open_channel
from hostler.errors import (
    HostlerError,
    ModelLoadFailed,
    OrchestratorAway,
    UnsupportedParameter,
    WorkerLost,
    from_rpc_error,
)
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1.placement_pb2_grpc import PlacementServiceStub

from gateway.routing import Routes, RouteTable

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 1.0
# Until a load is over of which nobody knows how long it takes.
USUAL_LOAD_S = 5.0
# Longest wait for an answer, and for running requests to end before a model moves.
ASK_S = 10.0
MOVE_S = 600.0


class PlacementClient:
    """One channel to the orchestrator."""

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self._stub = PlacementServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

    async def watch(self, table: RouteTable) -> None:
        """Keep `table` up to date, for ever. Runs as one task of the application."""
        backoff_s = _FIRST_BACKOFF_S
        connected = False
        while True:
            call = self._stub.WatchRoutes(pb.WatchRoutesRequest())
            try:
                async for response in call:
                    if not connected:
                        log.info("watching routes", extra={"version": response.version})
                    connected, backoff_s = True, _FIRST_BACKOFF_S
                    table.replace(Routes(response.models))
            except grpc.RpcError as error:
                if connected:
                    log.warning("orchestrator away", extra={"grpc_code": error.code().name})
            finally:
                call.cancel()
            connected = False
            await asyncio.sleep(backoff_s)
            backoff_s = min(_LAST_BACKOFF_S, backoff_s * 2)

    async def ensure(
        self, model: str, *, request_id: str, timeout_s: float, explicit: bool = False, batch: bool = False
    ) -> AsyncGenerator[pb.EnsureProgress | pb.Replica, None]:
        """Bring a model up: progress, and last the replica to use. Closing the generator gives the wait up.

        With `batch` it may wait behind everything that people wait for; without, the model's own priority counts.

        Raises:
            OrchestratorAway: it does not answer.
            ModelLoadFailed: the model was not up within `timeout_s`.
            HostlerError: what the orchestrator says.
        """
        call = self._stub.EnsureModel(
            pb.EnsureModelRequest(
                model=model,
                explicit=explicit,
                priority=pb.PRIORITY_BATCH if batch else pb.PRIORITY_UNSPECIFIED,
            ),
            timeout=timeout_s,
            metadata=call_metadata(request_id=request_id),
        )
        expected_at: float | None = None
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                if kind == "progress":
                    expected_at = (
                        time.monotonic() + response.progress.eta_ms / 1000 if response.progress.eta_ms else None
                    )
                    yield response.progress
                elif kind == "ready":
                    yield response.ready
                    return
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                left_s = USUAL_LOAD_S if expected_at is None else max(1.0, expected_at - time.monotonic())
                raise ModelLoadFailed(
                    f"The model '{model}' is still loading after {timeout_s:.0f} s. Try again later.",
                    retry_after_s=left_s,
                ) from None
            problem = from_rpc_error(error)
            # Without an ErrorInfo it is the transport that failed, and the far side is no worker here.
            if isinstance(problem, WorkerLost):
                raise _away(model) from None
            raise problem from None
        finally:
            call.cancel()
        raise _away(model)

    async def status(self, *, request_id: str) -> pb.GetStatusResponse:
        """Return devices, models and replicas as they are now."""
        return await _answer(self._stub.GetStatus, pb.GetStatusRequest(), request_id, ASK_S)

    async def plan(self, model: str, *, request_id: str) -> pb.PlanModelResponse:
        """Return what `ensure` would do now."""
        return await _answer(self._stub.PlanModel, pb.PlanModelRequest(model=model), request_id, ASK_S)

    async def unload(self, model: str, *, request_id: str) -> int:
        """Remove every replica once its requests have ended; return how many."""
        request = pb.UnloadModelRequest(model=model)
        return (await _answer(self._stub.UnloadModel, request, request_id, MOVE_S)).num_unloaded

    async def sleep(self, model: str, *, request_id: str) -> int:
        """Put every replica to sleep once its requests have ended; return how many."""
        request = pb.SleepModelRequest(model=model)
        return (await _answer(self._stub.SleepModel, request, request_id, MOVE_S)).num_asleep

    async def pin(self, model: str, *, pinned: bool, request_id: str) -> None:
        """Keep a model from being evicted, or let it go again."""
        await _answer(self._stub.PinModel, pb.PinModelRequest(model=model, pinned=pinned), request_id, ASK_S)

    async def events(
        self, max_past: int, *, request_id: str, past_only: bool = False
    ) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        """Yield the latest past events, oldest first, then (unless `past_only`) each new one for as long as it takes.

        Raises:
            HostlerError: the orchestrator is away, or goes away.
        """
        request = pb.WatchEventsRequest(max_past=max_past, past_only=past_only)
        call = self._stub.WatchEvents(
            request, metadata=call_metadata(request_id=request_id), timeout=ASK_S if past_only else None
        )
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise _asked_in_vain(error) from None
        finally:
            call.cancel()


Q_contra = TypeVar("Q_contra", contravariant=True)
A_co = TypeVar("A_co", covariant=True)


class _Method(Protocol[Q_contra, A_co]):
    """One unary call of the placement stub."""

    def __call__(
        self, request: Q_contra, /, *, timeout: float, metadata: tuple[tuple[str, str], ...]
    ) -> Awaitable[A_co]: ...


async def _answer(method: _Method[Q_contra, A_co], request: Q_contra, request_id: str, timeout_s: float) -> A_co:
    try:
        return await method(request, timeout=timeout_s, metadata=call_metadata(request_id=request_id))
    except grpc.RpcError as error:
        raise _asked_in_vain(error) from None


def _asked_in_vain(error: grpc.RpcError) -> HostlerError:
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return UnsupportedParameter("The orchestrator does not know this; it is of another version.")
    problem = from_rpc_error(error)
    if isinstance(problem, WorkerLost):  # the transport's own failure: there is no worker here
        return OrchestratorAway("The orchestrator does not answer; loaded models go on serving. Try again in a moment.")
    return problem


def _away(model: str) -> OrchestratorAway:
    return OrchestratorAway(f"The model '{model}' is not loaded, and the orchestrator is away. Try again in a moment.")

"""The placement contract's server: each RPC becomes a call to the scheduler, each error a status.

Above it: gateways and the command line. Below it: `scheduler.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
from hostler.channel import REQUEST_ID_KEY, metadata_value
from hostler.errors import HostlerError, Internal, abort
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1 import placement_pb2_grpc

from orchestrator.scheduler import Scheduler

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def _named(error: Exception, rpc: str) -> HostlerError:
    """Return an error with a name; log those that had none."""
    if isinstance(error, HostlerError):
        return error
    log.error("an RPC failed", exc_info=error, extra={"rpc": rpc})
    return Internal("Internal error; the orchestrator's log has the details.")


def _note_wait(request_id: str, model: str, outcome: str, waited_s: float) -> None:
    """Log how the wait for a model ended, under the id that the gateway logs the request under."""
    extra = {"request_id": request_id, "model": model, "outcome": outcome, "waited_ms": round(waited_s * 1000, 1)}
    log.info("a model was asked for", extra=extra)


class PlacementService(placement_pb2_grpc.PlacementServiceServicer):
    """Serves the scheduler on a socket."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def WatchRoutes(  # noqa: N802
        self, request: pb.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[pb.WatchRoutesResponse]:
        """Stream the route table."""
        async for table in self._scheduler.watch_routes():
            yield table

    async def EnsureModel(  # noqa: N802
        self, request: pb.EnsureModelRequest, context: Context
    ) -> AsyncIterator[pb.EnsureModelResponse]:
        """Bring a model up."""
        events = self._scheduler.ensure(
            request.model, explicit=request.explicit, batch=request.priority == pb.PRIORITY_BATCH
        )
        began, outcome = time.monotonic(), "gone"
        try:
            async for event in events:
                # The caller may hang up as soon as it has read the replica: it had what it asked for.
                outcome = "ready" if event.HasField("ready") else outcome
                yield event
        except Exception as error:
            named = _named(error, "EnsureModel")
            outcome = named.reason
            await abort(context, named)
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            _note_wait(metadata_value(context, REQUEST_ID_KEY) or "", request.model, outcome, time.monotonic() - began)

    async def PlanModel(self, request: pb.PlanModelRequest, context: Context) -> pb.PlanModelResponse:  # noqa: N802
        """Say what EnsureModel would do."""
        try:
            return await self._scheduler.plan(request.model)
        except Exception as error:
            await abort(context, _named(error, "PlanModel"))

    async def UnloadModel(  # noqa: N802
        self, request: pb.UnloadModelRequest, context: Context
    ) -> pb.UnloadModelResponse:
        """Drain and end a model's replicas."""
        try:
            return pb.UnloadModelResponse(num_unloaded=await self._scheduler.unload(request.model))
        except Exception as error:
            await abort(context, _named(error, "UnloadModel"))

    async def SleepModel(self, request: pb.SleepModelRequest, context: Context) -> pb.SleepModelResponse:  # noqa: N802
        """Put a model's replicas to sleep."""
        try:
            return pb.SleepModelResponse(num_asleep=await self._scheduler.sleep(request.model))
        except Exception as error:
            await abort(context, _named(error, "SleepModel"))

    async def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        """Stream what happened and what happens."""
        async for event in self._scheduler.watch_events(request.max_past, past_only=request.past_only):
            yield event

    async def PinModel(self, request: pb.PinModelRequest, context: Context) -> pb.PinModelResponse:  # noqa: N802
        """Pin or unpin a model."""
        try:
            await self._scheduler.pin(request.model, pinned=request.pinned)
        except Exception as error:
            await abort(context, _named(error, "PinModel"))
        return pb.PinModelResponse()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """Return devices, models and replicas."""
        try:
            return await self._scheduler.status()
        except Exception as error:
            await abort(context, _named(error, "GetStatus"))

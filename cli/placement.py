"""The command line's end of the placement contract. The only file of this room that knows gRPC.

Above stand `cli.control`, `cli.seeing` and `cli.startup`; below, `hostler.placement.v1` on the run directory's socket.
Failures leave here as `HostlerError`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

# gRPC's core writes connection failures to the terminal, where they mean nothing to anybody.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from hostler import errors
from hostler.channel import open_channel
from hostler.placement.v1 import placement_pb2 as pb
from hostler.placement.v1 import placement_pb2_grpc as pb_grpc
from hostler.rundir import RunDir

CALL_S = 10.0
_RETRIED = (errors.OrchestratorAway, errors.WorkerLost, errors.StaleGeneration)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model is. `total_bytes` and `eta_ms` 0: unknown. `num_ahead`: models that wait for memory before it."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    detail: str = ""
    num_ahead: int = 0
    eta_ms: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The model can answer."""

    replica_id: str
    generation: int


def _named(error: grpc.RpcError) -> errors.HostlerError:
    """Translate; a failure of the transport itself means that the orchestrator is away."""
    trailing: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    known = any(key == "grpc-status-details-bin" for key, _ in trailing)
    if not known and error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return errors.UnsupportedParameter("The running server does not know this command; it is of another version.")
    if not known and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return errors.OrchestratorAway(
            "The orchestrator does not answer just now; loaded models go on serving. Try again."
        )
    return errors.from_rpc_error(error)


class Placement:
    """Calls to one server's orchestrator. Use `connect`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.PlacementServiceStub(channel)

    async def status(self, timeout_s: float = CALL_S) -> pb.GetStatusResponse:
        """Return devices, models and replicas as they are now."""
        try:
            return await self._stub.GetStatus(pb.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _named(error) from None

    async def plan(self, model: str) -> pb.PlanModelResponse:
        """Return what a load would do."""
        try:
            return await self._stub.PlanModel(pb.PlanModelRequest(model=model), timeout=CALL_S)
        except grpc.RpcError as error:
            raise _named(error) from None

    async def unload(self, model: str, timeout_s: float = 600.0) -> int:
        """Drain and remove every replica; return how many."""
        try:
            return (await self._stub.UnloadModel(pb.UnloadModelRequest(model=model), timeout=timeout_s)).num_unloaded
        except grpc.RpcError as error:
            raise _named(error) from None

    async def sleep(self, model: str, timeout_s: float = 600.0) -> int:
        """Take every replica off its device, quick to wake; return how many."""
        try:
            return (await self._stub.SleepModel(pb.SleepModelRequest(model=model), timeout=timeout_s)).num_asleep
        except grpc.RpcError as error:
            raise _named(error) from None

    async def events(self, max_past: int, *, past_only: bool) -> AsyncIterator[pb.WatchEventsResponse]:
        """Yield the latest past events, oldest first, then (unless `past_only`) each new one."""
        call = self._stub.WatchEvents(
            pb.WatchEventsRequest(max_past=max_past, past_only=past_only), timeout=CALL_S if past_only else None
        )
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise _named(error) from None
        finally:
            call.cancel()

    async def pin(self, model: str, pinned: bool) -> None:
        """Keep a model from being evicted, or let it go again."""
        try:
            await self._stub.PinModel(pb.PinModelRequest(model=model, pinned=pinned), timeout=CALL_S)
        except grpc.RpcError as error:
            raise _named(error) from None

    async def load(self, model: str) -> AsyncIterator[Progress | Ready]:
        """Bring a model up; the last item is `Ready`. Closing the iterator gives the wait up."""
        call = self._stub.EnsureModel(pb.EnsureModelRequest(model=model, explicit=True))
        try:
            async for response in call:
                if response.HasField("ready"):
                    yield Ready(response.ready.id, response.ready.generation)
                    return
                p = response.progress
                yield Progress(p.stage, p.done_bytes, p.total_bytes, p.detail, p.num_ahead, p.eta_ms)
        except grpc.RpcError as error:
            raise _named(error) from None
        finally:
            call.cancel()
        raise errors.ModelLoadFailed("The orchestrator ended the load without an answer.")


@asynccontextmanager
async def connect(run_dir: RunDir) -> AsyncIterator[Placement]:
    """Open the orchestrator of one server."""
    async with open_channel(run_dir.orchestrator_target) as channel:
        yield Placement(channel)


async def _socket_of(run_dir: RunDir) -> None:
    """Wait for the socket's file. gRPC would wait for it, too, but looks ever more seldom."""
    while not run_dir.orchestrator_socket.exists():  # noqa: ASYNC110 - the event is in another process
        await asyncio.sleep(0.05)


async def wait_for_status(run_dir: RunDir, poll_s: float = 0.1) -> pb.GetStatusResponse:
    """Wait, without limit, until the orchestrator of a starting server answers; return its status."""
    while True:
        await _socket_of(run_dir)
        try:
            async with connect(run_dir) as placement:
                return await placement.status(timeout_s=2.0)
        except errors.Unavailable:
            await asyncio.sleep(poll_s)


async def load_until_known(run_dir: RunDir, model: str, retry_s: float = 0.2) -> AsyncIterator[Progress | Ready]:
    """Like `Placement.load`, but starts again while the orchestrator is not there yet or restarts.

    Raises:
        HostlerError: the orchestrator's own answer that the model cannot be loaded.
    """
    while True:
        await _socket_of(run_dir)
        try:
            async with connect(run_dir) as placement:
                async for event in placement.load(model):
                    yield event
                return
        except _RETRIED:
            await asyncio.sleep(retry_s)
        except errors.Unavailable as error:
            if type(error) is not errors.Unavailable:
                raise
            await asyncio.sleep(retry_s)

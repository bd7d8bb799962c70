"""The orchestrator's side of the lifecycle contract. The only file that knows its stubs.

Above it: `effects_ray.py`. Below it: one worker's socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio
from hostler.channel import call_metadata, open_channel
from hostler.errors import Internal, WorkerLost, from_rpc_error
from hostler.lifecycle.v1 import lifecycle_pb2, lifecycle_pb2_grpc

from orchestrator.effects import Report
from orchestrator.state import Progress

HEARTBEAT_MS = 500
CALL_SLACK_S = 5.0
SLEEP_SLACK_S = 60.0
"""Moving the weights of a large model off its device takes a while."""


class WorkerClient:
    """Calls to one worker, under its generation. With None the worker does not check (blank, or before adoption).

    `key`: what a worker on another machine wants with every call.
    """

    def __init__(self, target: str, generation: int | None, key: str = "") -> None:
        self._channel = open_channel(target, key)
        self._stub = lifecycle_pb2_grpc.LifecycleServiceStub(self._channel)
        self._metadata = call_metadata(generation=generation)

    def claim(self, generation: int) -> None:
        """Speak under this generation from now on."""
        self._metadata = call_metadata(generation=generation)

    async def connect(self, timeout_s: float) -> None:
        """Wait until the worker's server accepts.

        Raises:
            WorkerLost: it does not.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            raise WorkerLost(f"A worker did not open its socket within {timeout_s:g} s.") from None

    async def load(self, request: lifecycle_pb2.LoadRequest, report: Report) -> lifecycle_pb2.ModelInfo:
        """Have the worker load its model; report progress on the way.

        Raises:
            HostlerError: as the worker said, or `WorkerLost`.
        """
        call = self._stub.Load(request, metadata=self._metadata)
        try:
            async for event in call:
                if event.HasField("ready"):
                    return event.ready
                stage = event.progress
                report(Progress(stage.stage, "", stage.done_bytes, stage.total_bytes))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        raise Internal("A worker ended its load without a result.")

    async def watch(self) -> AsyncIterator[lifecycle_pb2.WatchResponse]:
        """Yield heartbeats until the stream ends.

        Raises:
            HostlerError: how it broke.
        """
        call = self._stub.Watch(lifecycle_pb2.WatchRequest(interval_ms=HEARTBEAT_MS), metadata=self._metadata)
        try:
            async for report in call:
                yield report
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def sleep(self, deadline_s: float) -> lifecycle_pb2.SleepResponse:
        """Have the worker free its devices once its requests have ended.

        Raises:
            HostlerError: it still has requests at the deadline, or cannot sleep.
        """
        request = lifecycle_pb2.SleepRequest(deadline_ms=int(deadline_s * 1000))
        try:
            return await self._stub.Sleep(request, metadata=self._metadata, timeout=deadline_s + SLEEP_SLACK_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def wake(self, devices: Sequence[str], kv_cache_bytes: int) -> None:
        """Have a sleeping worker serve again; cancelled when the orchestrator gives the wait up."""
        request = lifecycle_pb2.WakeRequest(devices=devices, kv_cache_bytes=kv_cache_bytes)
        try:
            await self._stub.Wake(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def resize(self, kv_cache_bytes: int) -> int:
        """Change what the KV cache may grow to; return what it is now."""
        request = lifecycle_pb2.ResizeRequest(kv_cache_bytes=kv_cache_bytes)
        try:
            reply = await self._stub.Resize(request, metadata=self._metadata, timeout=SLEEP_SLACK_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return reply.kv_cache_bytes

    async def drain(self, deadline_s: float) -> int:
        """Refuse new requests; return how many still run when it is empty or at the deadline."""
        request = lifecycle_pb2.DrainRequest(deadline_ms=int(deadline_s * 1000))
        try:
            reply = await self._stub.Drain(request, metadata=self._metadata, timeout=deadline_s + CALL_SLACK_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return reply.num_remaining

    async def unload(self) -> None:
        """Ask the worker to end itself."""
        try:
            await self._stub.Unload(lifecycle_pb2.UnloadRequest(), metadata=self._metadata, timeout=CALL_SLACK_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close(None)

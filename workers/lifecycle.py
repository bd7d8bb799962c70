"""The lifecycle servicer: what the orchestrator asks of this worker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from hostler.channel import GENERATION_KEY, metadata_value
from hostler.errors import HostlerError, Internal, abort
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.lifecycle.v1 import lifecycle_pb2_grpc as rpc

from workers import translate
from workers.host import WorkerHost

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_DEFAULT_INTERVAL_MS = 500


class LifecycleServicer(rpc.LifecycleServiceServicer):
    """Load, sleep, wake, resize, drain, unload, watch."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def Load(self, request: life.LoadRequest, context: Context) -> AsyncIterator[life.LoadResponse]:  # noqa: N802
        """Load the model, streaming progress; the last event is `ready`."""
        host = self._host
        try:
            spec = translate.load_spec(request)
            host.claim(metadata_value(context, GENERATION_KEY))
            async for stage in host.load(spec, request.engine, request.environment):
                yield life.LoadResponse(
                    progress=life.LoadProgress(
                        stage=stage.stage, done_bytes=stage.done_bytes, total_bytes=stage.total_bytes
                    )
                )
            yield life.LoadResponse(ready=translate.model_info(host.engine.facts))
        except HostlerError as error:
            await abort(context, error)

    async def Sleep(self, request: life.SleepRequest, context: Context) -> life.SleepResponse:  # noqa: N802
        """Free the device once no request runs; what makes waking quick stays."""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
            freed, host_bytes = await self._host.sleep(request.deadline_ms / 1000)
            return life.SleepResponse(freed_bytes=freed, host_bytes=host_bytes)
        except HostlerError as error:
            await abort(context, error)
        except Exception:
            # The host has logged it.
            await abort(context, Internal("The model could not be put to sleep; the worker's log has the details."))

    async def Wake(self, request: life.WakeRequest, context: Context) -> life.WakeResponse:  # noqa: N802
        """Bring the model back."""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
            await self._host.wake(tuple(request.devices), request.kv_cache_bytes)
            return life.WakeResponse()
        except HostlerError as error:
            await abort(context, error)

    async def Resize(self, request: life.ResizeRequest, context: Context) -> life.ResizeResponse:  # noqa: N802
        """Change what the KV cache may grow to, while requests run."""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
            return life.ResizeResponse(kv_cache_bytes=await self._host.resize(request.kv_cache_bytes))
        except HostlerError as error:
            await abort(context, error)

    async def Drain(self, request: life.DrainRequest, context: Context) -> life.DrainResponse:  # noqa: N802
        """Refuse new requests and wait for the running ones."""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
            return life.DrainResponse(num_remaining=await self._host.drain(request.deadline_ms / 1000))
        except HostlerError as error:
            await abort(context, error)

    async def Unload(self, request: life.UnloadRequest, context: Context) -> life.UnloadResponse:  # noqa: N802
        """Answer, then end the process."""
        try:
            self._host.check_generation(metadata_value(context, GENERATION_KEY))
        except HostlerError as error:
            await abort(context, error)
        loop = asyncio.get_running_loop()
        context.add_done_callback(lambda _: self._host.end_soon(loop))  # type: ignore[arg-type]
        return life.UnloadResponse()

    async def Watch(self, request: life.WatchRequest, context: Context) -> AsyncIterator[life.WatchResponse]:  # noqa: N802
        """Stream the worker's state: at once, on change, and as a heartbeat."""
        interval_s = (request.interval_ms or _DEFAULT_INTERVAL_MS) / 1000
        async for _ in self._host.watch(interval_s):
            yield self._snapshot()

    def _snapshot(self) -> life.WatchResponse:
        host = self._host
        held = host.memory.look()
        message = life.WatchResponse(
            state=host.state,
            generation=host.generation,
            pid=os.getpid(),
            resident_bytes=held.resident,
            device_bytes=held.device,
            peak_device_bytes=held.peak_device,
            host_bytes=held.host,
            failure=host.failure,
            keep_alive_ms=host.keep_alive_ms,
            shelf=host.shelf,
        )
        translate.fill_stats(message, host.stats())
        if host.facts is not None:
            message.info.CopyFrom(translate.model_info(host.facts))
        return message

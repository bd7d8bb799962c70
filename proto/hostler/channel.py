"""How our processes speak gRPC: options for both ends, metadata keys, channels. Used by every room's edge.

Both ends must agree on keepalive, or a server answers a patient client with GOAWAY: a client that pings a
silent stream every second needs a server that permits it. With these options a frozen peer (SIGSTOP) is
noticed in two to three seconds; gRPC's defaults take a minute.

On one host we speak over Unix sockets, which the file system guards. A worker on another host listens on TCP and
wants its key with every call: made from the run's token and the worker's id, so that what somebody sees of one
worker's calls opens no other worker, and none that later takes its port.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

REQUEST_ID_KEY = "x-request-id"
GENERATION_KEY = "hostler-generation"
WORKER_KEY_KEY = "hostler-worker-key"

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SIZE = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZE,
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(target: str, key: str = "") -> grpc.aio.Channel:
    """Open a channel to one of our own processes (`unix:/…` or `HOST:PORT`). Close it when done.

    `key` goes along with every call over TCP, and never over a Unix socket, where nobody asks for it.
    """
    channel = grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)
    return _KeyedChannel(channel, key) if key and not target.startswith("unix:") else channel


def new_server(key: str = "") -> grpc.aio.Server:
    """Return an unstarted server with our options; add servicers, a port, then start it.

    With a `key` every call without it ends UNAUTHENTICATED before any servicer sees it.
    """
    return grpc.aio.server(interceptors=(_KeyGuard(key),) if key else (), options=SERVER_OPTIONS)


def worker_key(token: str, worker_id: str) -> str:
    """Return what opens one worker of the run that has this token."""
    return hmac.new(token.encode(), worker_id.encode(), hashlib.sha256).hexdigest()


class _KeyGuard(grpc.aio.ServerInterceptor):
    """Lets calls through that carry the key."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        for name, value in handler_call_details.invocation_metadata or ():
            if name == WORKER_KEY_KEY:
                given = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
                if hmac.compare_digest(given, self._key):
                    return await continuation(handler_call_details)
        return self._refusal


async def _refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "This worker wants its key.")


class _KeyedChannel(grpc.aio.Channel):
    """A channel that adds the key to every call. Not an interceptor: those wrap the call and every message of it."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._channel = channel
        self._pair = (WORKER_KEY_KEY, key)

    def _keyed(self, start: Any) -> Any:
        def call(*request: Any, metadata: Any = (), **options: Any) -> Any:
            return start(*request, metadata=(*(metadata or ()), self._pair), **options)

        return call

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._keyed(self._channel.stream_stream(*args, **options))

    async def __aenter__(self) -> _KeyedChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close(None)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()


def call_metadata(*, request_id: str = "", generation: int | None = None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of one call."""
    pairs: list[tuple[str, str]] = []
    if request_id:
        pairs.append((REQUEST_ID_KEY, request_id))
    if generation is not None:
        pairs.append((GENERATION_KEY, str(generation)))
    return tuple(pairs)


def metadata_value(context: grpc.aio.ServicerContext, key: str) -> str | None:  # type: ignore[type-arg]
    """Return one metadata value of an incoming call, or None."""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else value.decode("latin-1")
    return None

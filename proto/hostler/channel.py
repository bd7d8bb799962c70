"""How our processes speak gRPC: options for both ends, metadata keys, channels. Used by every room's edge.

Both ends must agree on keepalive, or a server answers a patient client with GOAWAY: a client that pings a
silent stream every second needs a server that permits it. With these options a frozen peer (SIGSTOP) is
noticed in two to three seconds; gRPC's defaults take a minute.
"""

from __future__ import annotations

import grpc
import grpc.aio

REQUEST_ID_KEY = "x-request-id"
GENERATION_KEY = "hostler-generation"

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SIZE = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZE,
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


def open_channel(target: str) -> grpc.aio.Channel:
    """Open a channel to one of our own processes (`unix:/…` or `host:port`). Close it when done."""
    return grpc.aio.insecure_channel(target, options=CLIENT_OPTIONS)


def new_server() -> grpc.aio.Server:
    """Return an unstarted server with our options; add servicers, a port, then start it."""
    return grpc.aio.server(options=SERVER_OPTIONS)


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

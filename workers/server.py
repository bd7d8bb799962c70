"""One worker's gRPC server, on a Unix socket or TCP. Above: the actor shell, `python -m workers`. Below: servicers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from hostler.channel import new_server
from hostler.inference.v1 import inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2_grpc
from hostler.slices import ask_for_short_slices

from workers.host import WorkerHost
from workers.inference import InferenceServicer
from workers.lifecycle import LifecycleServicer

log = logging.getLogger(__name__)


async def serve(
    listen: str,
    generation: int,
    worker_id: str,
    *,
    key: str = "",
    on_serving: Callable[[str], object] = lambda target: None,
) -> None:
    """Serve until the worker is unloaded.

    Args:
        listen: the path of a Unix socket, which will be private to this user, or HOST:PORT (port 0: one that is free).
        key: what every call must carry; on TCP there must be one.
        on_serving: called with the gRPC target once calls are taken.

    Raises:
        RuntimeError: the address cannot be bound.
        ValueError: TCP without a key.
    """
    path = Path(listen) if listen.startswith("/") else None
    if path is None and not key:
        raise ValueError(f"{listen}: a worker that listens on TCP wants a key")
    ask_for_short_slices(inherited=False)
    host = WorkerHost(worker_id, generation)
    server = new_server(key)
    inference = InferenceServicer(host)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
    lifecycle_pb2_grpc.add_LifecycleServiceServicer_to_server(LifecycleServicer(host), server)
    if path is not None:
        path.unlink(missing_ok=True)  # A leftover of a killed worker.
        server.add_insecure_port(f"unix:{path}")
        target = f"unix:{path}"
    else:
        target = f"{listen.rpartition(':')[0]}:{server.add_insecure_port(listen)}"
    await server.start()
    if path is not None:
        path.chmod(0o600)
    log.info("worker serves", extra={"worker_id": worker_id, "generation": generation, "target": target})
    on_serving(target)
    try:
        await host.ended.wait()
    finally:
        inference.end_lines()
        await server.stop(grace=0.5)
        if path is not None:
            path.unlink(missing_ok=True)

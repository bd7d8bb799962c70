"""One worker's gRPC server on its Unix socket. Above: the Ray actor shell or `python -m workers`. Below: servicers."""

from __future__ import annotations

import logging
from pathlib import Path

from hostler.channel import new_server
from hostler.inference.v1 import inference_pb2_grpc
from hostler.lifecycle.v1 import lifecycle_pb2_grpc

from workers.host import WorkerHost
from workers.inference import InferenceServicer
from workers.lifecycle import LifecycleServicer

log = logging.getLogger(__name__)


async def serve(socket_path: str, generation: int, worker_id: str) -> None:
    """Serve until the worker is unloaded. The socket is private to this user.

    Raises:
        RuntimeError: the socket cannot be bound.
    """
    host = WorkerHost(worker_id, generation)
    server = new_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(host), server)
    lifecycle_pb2_grpc.add_LifecycleServiceServicer_to_server(LifecycleServicer(host), server)
    path = Path(socket_path)
    path.unlink(missing_ok=True)  # noqa: ASYNC240  (a leftover of a killed worker; microseconds)
    server.add_insecure_port(f"unix:{socket_path}")
    await server.start()
    path.chmod(0o600)  # noqa: ASYNC240
    log.info("worker serves", extra={"worker_id": worker_id, "generation": generation})
    try:
        await host.ended.wait()
    finally:
        await server.stop(grace=0.5)
        path.unlink(missing_ok=True)  # noqa: ASYNC240

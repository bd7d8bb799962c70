"""The Ray actor shell: a plain class that serves gRPC from a thread. Ray wraps it; this file does not know Ray.

The orchestrator names it by its entry point `workers.actor:WorkerActor`. Requests never pass through Ray: the
actor exists so that Ray starts, pins, finds and ends the process.
"""

from __future__ import annotations

import asyncio
import os
import threading


class WorkerActor:
    """One worker process.

    Args:
        worker_id: unique name.
        socket_path: Unix socket to serve on.

    It is blank, without generation or device; the load that claims it brings both.
    """

    def __init__(self, worker_id: str, socket_path: str) -> None:
        thread = threading.Thread(target=_serve_and_exit, args=(socket_path, worker_id), name="worker", daemon=True)
        thread.start()

    def ping(self) -> int:
        """Return the process id."""
        return os.getpid()


def _serve_and_exit(socket_path: str, worker_id: str) -> None:
    from hostler import logs

    from workers.server import serve

    logs.configure()
    code = 1
    try:
        asyncio.run(serve(socket_path, 0, worker_id))
        code = 0
    finally:
        # Ray's own exit path can wait for threads and for a control plane that may be gone.
        os._exit(code)

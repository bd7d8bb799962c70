"""The Ray actor shell: a plain class that serves gRPC from a thread. Ray wraps it; this file does not know Ray.

The orchestrator names it by its entry point `workers.actor:WorkerActor`. Requests never pass through Ray: the
actor exists so that Ray starts, pins, finds and ends the process.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future

LISTEN_TIMEOUT_S = 30.0


class WorkerActor:
    """One worker process.

    Args:
        worker_id: unique name.
        listen: the path of a Unix socket, or HOST:PORT (port 0: one that is free).
        key: what every call must carry; empty on a Unix socket, which the file system guards.

    It is blank, without generation or device; the load that claims it brings both.
    """

    def __init__(self, worker_id: str, listen: str, key: str = "") -> None:
        self._target: Future[str] = Future()
        thread = threading.Thread(
            target=_serve_and_exit, args=(listen, worker_id, key, self._target), name="worker", daemon=True
        )
        thread.start()

    def ping(self) -> int:
        """Return the process id."""
        return os.getpid()

    def target(self) -> str:
        """Return the gRPC target that it serves; blocks until it does."""
        return self._target.result(LISTEN_TIMEOUT_S)


def _serve_and_exit(listen: str, worker_id: str, key: str, target: Future[str]) -> None:
    from hostler import logs

    from workers.server import serve

    logs.configure()
    code = 1
    try:
        asyncio.run(serve(listen, 0, worker_id, key=key, on_serving=target.set_result))
        code = 0
    finally:
        # Ray's own exit path can wait for threads and for a control plane that may be gone.
        os._exit(code)

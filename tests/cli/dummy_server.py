"""Runs the real `hostler` with dummy children instead of the other rooms; a script, see `test_serve.py`.

dummy_server.py JOURNAL ARGUMENTS…     the command itself
dummy_server.py orchestrator RUN_DIR   serves the fake placement, after half a second
dummy_server.py gateway FD             answers 200 to everything
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def orchestrator(run_dir: Path) -> None:
    from concurrent import futures

    import grpc
    from hostler.placement.v1 import placement_pb2_grpc as pb_grpc

    from tests.cli.fakes import FakePlacement

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait(0.5)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    pb_grpc.add_PlacementServiceServicer_to_server(FakePlacement(), server)
    server.add_insecure_port(f"unix:{run_dir}/orchestrator.sock")
    server.start()
    stop.wait()
    server.stop(None)


def gateway(descriptor: int) -> None:
    listener = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        connection.close()


def command(journal: str, arguments: list[str]) -> None:
    from cli import serve
    from cli.main import app
    from cli.supervisor import Child

    def children(
        config: Any, run_dir: Any, descriptor: int, extra_env: Any, door: int | None, unix: int | None
    ) -> list[Child]:
        me = (sys.executable, __file__)
        dummy = (sys.executable, str(Path(__file__).with_name("dummy.py")), journal)
        return [
            Child("ray_head", (*dummy, "ray_head", "brood"), stop_rank=2, takes_along=("orchestrator",)),
            Child(
                "orchestrator",
                (*me, "orchestrator", str(run_dir.path)),
                stop_rank=1,
                removes=(run_dir.orchestrator_socket,),
            ),
            Child("gateway-0", (*me, "gateway", str(descriptor)), pass_fds=(descriptor,)),
        ]

    serve.children = children
    if every_s := os.environ.get("LOOK_AT_LOGS_EVERY_S"):
        from cli import startup

        startup._LOGS_EVERY_S = float(every_s)
    app(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "orchestrator":
        orchestrator(Path(sys.argv[2]))
    elif sys.argv[1] == "gateway":
        gateway(int(sys.argv[2]))
    else:
        command(sys.argv[1], sys.argv[2:])

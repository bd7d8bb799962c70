"""The Ray head as a process of its own: `python -m orchestrator.ray_head --run-dir DIR`.

Above it: `hostler serve`, which restarts it when it dies. Below it: Ray's control plane (GCS) and node daemon
(raylet), which it starts on loopback with a token, watches, and takes down with it. It writes `ray.json` once Ray
is up. With `ray_address` in the configuration it starts nothing and publishes that address.

Ray's command line is not used: it takes twice as long and always opens the client server's port.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from hostler import logs
from hostler.config import read_resolved
from hostler.rundir import RunDir

from orchestrator import ray_session

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80_000_000
"""Ray's own minimum, nearly: no tensor and no token ever goes through the object store."""

_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_IN_TEMP_DIR = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1"
_GCS_PORTS = range(6400, 10000)
"""Below 10000: Ray hands 10002-19999 to workers, and a control plane there conflicts with them."""

EXIT_RAY_DIED = 3


def _free_gcs_port() -> int:
    for _ in range(200):
        port = _GCS_PORTS[secrets.randbelow(len(_GCS_PORTS))]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {_GCS_PORTS.start} and {_GCS_PORTS.stop} for Ray's control plane")


def _temp_dir(run_dir: Path) -> Path:
    """Return an empty directory for Ray, in the run directory where Unix sockets' length limit allows it."""
    inside = run_dir / "ray"
    if len(os.fsencode(inside / _LONGEST_SOCKET_IN_TEMP_DIR)) <= _MAX_SOCKET_PATH_BYTES:
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir(mode=0o700)
        return inside
    return Path(tempfile.mkdtemp(prefix="hr-", dir="/tmp"))


def _stand_in(command: list[str]) -> list[str]:
    """Return the raylet's command line with our stand-in as each of its agents."""
    stand_in = subprocess.list2cmdline([sys.executable, "-I", "-S", str(Path(__file__).with_name("ray_agent.py"))])
    options = ("--dashboard_agent_command=", "--runtime_env_agent_command=")
    return [f"{part.partition('=')[0]}={stand_in}" if part.startswith(options) else part for part in command]


def _start_ray(temp_dir: Path) -> tuple[str, list[int]]:
    """Start GCS and raylet; return the address and the pids to watch."""
    ray_node: Any = importlib.import_module("ray._private.node")
    ray_parameter: Any = importlib.import_module("ray._private.parameter")
    services: Any = importlib.import_module("ray._private.services")
    raylet: Any = importlib.import_module("ray._raylet")

    class HeadNode(ray_node.Node):  # type: ignore[misc]
        """Ray's node without the parts that serve only the dashboard, metrics, jobs and runtime environments."""

        def start_api_server(self, **options: Any) -> None:
            """Start none: without a dashboard it serves only the jobs API, and costs 100 MB and a second."""

        def start_raylet(self, *arguments: Any, **options: Any) -> None:
            """Start the raylet with stand-ins for its agents, whose ports it would wait for (see `ray_agent.py`)."""
            for name in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT"):
                # -1 means "not in use", but the last must look like a port. It is never called: our jobs and
                # actors have no runtime environment.
                port = 1 if name == "RUNTIME_ENV_AGENT" else -1
                raylet.persist_port(self._session_dir, self._node_id, getattr(raylet, f"{name}_PORT_NAME"), port)
            real = services.start_ray_process
            services.start_ray_process = lambda command, *args, **named: real(_stand_in(command), *args, **named)
            try:
                super().start_raylet(*arguments, **options)
            finally:
                services.start_ray_process = real

    parameters = ray_parameter.RayParams(
        node_ip_address="127.0.0.1",
        gcs_server_port=_free_gcs_port(),
        include_dashboard=False,
        num_cpus=1,  # Also the number of worker processes started ahead. Actors take none of it.
        num_gpus=0,  # Placement is ours; Ray must neither count nor hide devices.
        object_store_memory=OBJECT_STORE_BYTES,
        include_log_monitor=False,
        temp_dir=str(temp_dir),
        no_monitor=True,
        ray_client_server_port=None,
    )
    parameters.update_if_absent(redis_max_clients=None)
    # No shutdown hooks: Ray's own SIGTERM handler drains for 30 s. spawn_reaper makes the kernel kill its
    # children when this process dies, however it dies; they are spawned from the main thread for that reason.
    node = HeadNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
    pids = [info.process.pid for kind in ("gcs_server", "raylet") for info in node.all_processes[kind]]
    return node.address, pids


def _kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes at once: Ray's graceful end takes half a minute, and no state of it is worth keeping."""
    victims = list(processes)
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(victims, timeout=5)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _wait(pids: list[int], stop_fd: int) -> int | None:
    """Return the first of `pids` that ended, or None when a signal arrived."""
    watched = {os.pidfd_open(pid): pid for pid in pids}
    poll = select.poll()
    for descriptor in (*watched, stop_fd):
        poll.register(descriptor, select.POLLIN)
    ready = poll.poll()
    return next((watched[fd] for fd, _ in ready if fd in watched), None)


def run(run_dir: RunDir) -> int:
    """Start Ray and stay until it dies or a signal comes; return the exit status."""
    reader, writer = os.pipe()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: os.write(writer, b"x"))
    config = read_resolved(run_dir.config)
    ray_session.path_in(run_dir.path).unlink(missing_ok=True)
    if config.ray_address:
        token = ray_session.cluster_token(os.environ)
        ray_session.write(run_dir.path, ray_session.RaySession(config.ray_address, token, 0))
        _wait([], reader)
        return 0

    if os.getpgid(0) != os.getpid() and os.getsid(0) != os.getpid():
        os.setpgid(0, 0)  # Ctrl-C in the terminal is for the supervisor alone.
    token = secrets.token_hex(32)
    os.environ.update(ray_session.RAY_ENVIRONMENT)
    if not config.models or any(model.engine != "scripted" for model in config.models):
        os.environ.update(ray_session.preload_environment())  # Scripted models alone need no torch.
    os.environ[ray_session.TOKEN_VARIABLE] = token
    temp_dir = _temp_dir(run_dir.path)
    status = EXIT_RAY_DIED
    family: list[psutil.Process] = []
    try:
        address, pids = _start_ray(temp_dir)
        ray_session.write(run_dir.path, ray_session.RaySession(address, token, os.getpid()))
        log.info("Ray is up", extra={"address": address, "pids": pids})
        family = _descendants()
        dead = _wait(pids, reader)
        if dead is None:
            status = 0
        else:
            log.error("a Ray process died", extra={"pid": dead})
    finally:
        ray_session.path_in(run_dir.path).unlink(missing_ok=True)
        _kill({*family, *_descendants()})
        shutil.rmtree(temp_dir, ignore_errors=True)
    return status


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.ray_head", description="Run Ray for one hostler.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory of the server")
    options = parser.parse_args()
    logs.configure()
    try:
        return run(RunDir(options.run_dir))
    except Exception:
        log.exception("Ray could not be started")
        return 1


if __name__ == "__main__":
    # Without atexit hooks: Ray registers some that wait for a control plane that was just killed.
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)

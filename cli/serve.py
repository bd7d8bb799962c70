"""`hostler serve`: starts the processes of a server, shows how far they are, and stops them in order.

Above stands `cli.main`; below, `cli.settings` (what to serve), `cli.supervisor` (processes) and `cli.placement`
(following loads). The children are started before anything slow is imported: their start-up is the wait.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from hostler import rundir
from hostler.config import HostlerConfig, write_resolved
from hostler.rundir import RunDir

from cli import janitor, reloading, restarts, servers, settings, tunnel
from cli.exits import CliError
from cli.supervisor import Child, Supervisor

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

BACKLOG = 2048
SEND_BUFFER_BYTES = 128 * 1024
_ORCHESTRATOR_GRACE_S = 15.0
_RAY_GRACE_S = 10.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Return the listening socket that all gateways share.

    Raises:
        CliError: the address is not ours, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise CliError(f"cannot listen on {host}: {error.strerror}") from None
    found.sort(key=lambda item: item[0] != socket.AF_INET)  # localhost is 127.0.0.1 first: not every client tries ::1
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit it; it bounds what a reader that has stalled can hold in the kernel.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CliError(f"port {port} is taken by another program; choose another with {flag} {port + 1}") from None
        raise CliError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def bind_unix(path: Path) -> socket.socket:
    """Return a second listening socket of the gateways, for this user alone (0600). The run directory is 0700."""
    listener = socket.socket(socket.AF_UNIX)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


def children(
    config: HostlerConfig,
    run_dir: RunDir,
    descriptor: int,
    extra_env: dict[str, str],
    door: int | None = None,
    unix: int | None = None,
) -> list[Child]:
    """Return the processes of one server. The slowest to start comes first.

    `door`: the public listening socket; `unix`: the listening Unix socket.
    """
    python = (sys.executable, "-P", "-m")
    where = ("--run-dir", str(run_dir.path))
    # A gateway is one busy thread; libraries that count cores would only start idle ones.
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    ray_head = Child(
        "ray_head",
        (*python, "orchestrator.ray_head", *where),
        env=extra_env,
        stop_rank=2,
        stop_grace_s=_RAY_GRACE_S,
        death_signal=signal.SIGTERM,  # so that it takes Ray's daemons along; the janitor sees to what it leaves
        removes=(run_dir.path / "ray.json",),
        takes_along=("orchestrator",),
    )
    orchestrator = Child(
        "orchestrator",
        (*python, "orchestrator", *where),
        env=extra_env,
        stop_rank=1,
        stop_grace_s=_ORCHESTRATOR_GRACE_S,
        removes=(run_dir.orchestrator_socket,),
    )
    others = {"--public-fd": door, "--unix-fd": unix}
    given = {flag: number for flag, number in others.items() if number is not None}
    outside = [word for flag, number in given.items() for word in (flag, str(number))]
    gateways = [
        Child(
            f"gateway-{number}",
            (*python, "gateway", *where, "--fd", str(descriptor), *outside),
            env={**extra_env, **single},
            pass_fds=(descriptor, *given.values()),
            stop_grace_s=config.drain_s + 5.0,
            has_successors=True,
        )
        for number in range(config.gateways)
    ]
    if not config.public.ngrok:
        return [ray_head, orchestrator, *gateways]
    # It goes before the gateways do: nobody new comes in while they drain.
    tunnel = Child("tunnel", (*python, "cli.tunnel", *where), env=extra_env, removes=(run_dir.tunnel,))
    return [ray_head, orchestrator, *gateways, tunnel]


def child_environment(as_json: bool, verbose: bool) -> dict[str, str]:
    """Return our environment for children: without the key (they read it from the 0600 file), with log settings."""
    ours = {"HOSTLER_API_KEY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}  # the last three: cli.notify
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    environment.setdefault("GRPC_VERBOSITY", "ERROR")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if as_json:
        environment["HOSTLER_LOG_FORMAT"] = "json"
    if verbose:
        environment.setdefault("HOSTLER_LOG_LEVEL", "DEBUG")
    return environment


def _clean(run_dir: RunDir) -> None:
    """End what an earlier supervisor of this directory could not, and what only it could use. Holding the lock."""
    janitor.clear(janitor.of_earlier_runs(str(run_dir.path)), grace_s=0.0)
    left = (
        run_dir.path / "ray.json",
        run_dir.token_file,
        run_dir.tunnel,
        run_dir.orchestrator_socket,
        *run_dir.path.glob("w-*.sock"),
    )
    for path in left:
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir.metrics, ignore_errors=True)
    restarts.clear(run_dir)


def serve(flags: settings.Flags, *, as_json: bool, verbose: bool, started_at: float) -> None:
    """Serve until a signal. Raises CliError or ConfigError when it cannot start; returns when all has ended.

    `started_at` is `time.time()` when the command began, for the elapsed time.
    """
    config, path = settings.resolve(flags)
    asked = reloading.Signals()
    try:
        run_dir = rundir.create(config.port)
    except ValueError as error:
        raise CliError(str(error)) from None
    tunnel.refuse_without_ngrok(config)
    servers.take_lock(run_dir)
    listener = bind(config.host, config.port)
    public = config.public
    door = bind(public.host, public.port, "--public-port") if public.enabled else None
    _clean(run_dir)
    unix = bind_unix(run_dir.gateway_socket)
    write_resolved(config, run_dir.config)
    early: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        early.append(number)

    signals = [*_STOP_SIGNALS, signal.SIGHUP] if asked.hangup_stops else [*_STOP_SIGNALS]
    for number in signals:
        signal.signal(number, remember)

    def make_children(config: HostlerConfig) -> list[Child]:
        return children(config, run_dir, listener.fileno(), {}, door.fileno() if door else None, unix.fileno())

    supervisor = Supervisor(
        make_children(config),
        run_dir.logs,
        f"{run_dir.path}#{os.getpid()}-{time.time_ns()}",
        env=child_environment(as_json, verbose),
    )
    try:
        supervisor.start()
        # Only now what takes long to import: asyncio, grpc, rich.
        import asyncio

        from cli.startup import Screen

        reloader = reloading.Reloader(
            lambda: settings.resolve(flags)[0], config, run_dir, supervisor, make_children, asked
        )
        screen = Screen(config, path, run_dir, supervisor, listener, door, as_json=as_json, verbose=verbose)
        screen.unix = unix
        asyncio.run(screen.run(signals, early, started_at, reloader))
    except BaseException:
        supervisor.abandon()
        raise
    finally:
        listener.close()
        unix.close()
        if door is not None:
            door.close()
        for left in (run_dir.orchestrator_socket, run_dir.gateway_socket):
            left.unlink(missing_ok=True)

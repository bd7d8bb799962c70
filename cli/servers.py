"""Finds the running server of this user: by --port, by $HOSTLER_PORT, or because there is only one.

Above stand all commands that ask a server something; below, only the run directories. A server lives when
its lock is held; a run directory alone proves nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostler import rundir
from hostler.rundir import RunDir

from cli.exits import CliError, UsageError

NOT_RUNNING = "no hostler is running; start one with `hostler serve`"


@dataclass(frozen=True, slots=True)
class Server:
    """A live server."""

    port: int
    run_dir: RunDir
    pid: int | None


def _held_by(lock: Path) -> tuple[bool, int | None]:
    """Return (is the lock held, pid of its holder)."""
    try:
        with lock.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return True, int(text) if text.isdigit() else None
    except FileNotFoundError:
        pass
    return False, None


def take_lock(run_dir: RunDir) -> int:
    """Lock the run directory for the life of this process; return the descriptor, to be kept open.

    Raises:
        CliError: another server has it.
    """
    descriptor = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT, 0o600)
    for attempts_left in range(5, -1, -1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not attempts_left:
                os.close(descriptor)
                _, pid = _held_by(run_dir.lock)
                port = run_dir.path.name
                stop = f"stop it with `kill {pid}`, " if pid else ""
                raise CliError(
                    f"hostler is already serving on port {port} (pid {pid or 'unknown'}): add a model with "
                    f"`hostler load`, {stop}or choose another port with --port"
                ) from None
            time.sleep(0.02)  # a command may be testing the lock just now
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def live() -> list[Server]:
    """Return every live server of this user."""
    found = []
    for port, run_dir in rundir.existing():
        held, pid = _held_by(run_dir.lock)
        if held:
            found.append(Server(port, run_dir, pid))
    return found


def find(port: int | None) -> Server:
    """Return the server to talk to.

    Raises:
        UsageError: $HOSTLER_PORT is not a number.
        CliError: none, or more than one and no port was given.
    """
    if port is None and (text := os.environ.get("HOSTLER_PORT")):
        if not text.isdigit():
            raise UsageError(f"HOSTLER_PORT is {text!r}; it should be a port number")
        port = int(text)
    servers = live()
    if port is not None:
        for server in servers:
            if server.port == port:
                return server
        elsewhere = f" (but on {', '.join(str(s.port) for s in servers)})" if servers else ""
        raise CliError(f"no hostler is running on port {port}{elsewhere}; start one with `hostler serve --port {port}`")
    if not servers:
        raise CliError(NOT_RUNNING)
    if len(servers) > 1:
        raise CliError(f"several are running (ports {', '.join(str(s.port) for s in servers)}); say which with --port")
    return servers[0]


def unit_of(pid: int | None, proc: Path = Path("/proc")) -> str | None:
    """Return the systemd unit whose main process this is, e.g. "hostler.service"; None: it is nobody's."""
    try:
        environment = (proc / str(pid) / "environ").read_bytes().split(b"\0")
        if f"SYSTEMD_EXEC_PID={pid}".encode() not in environment:  # inherited by whoever a service starts
            return None
        groups = (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = (line.rpartition("/")[2] for line in groups)
    return next((name for name in names if name.endswith(".service")), None)


def read_config(run_dir: RunDir) -> dict[str, Any]:
    """Return the resolved configuration as plain values (no pydantic: this is on the completion path)."""
    with suppress(OSError, ValueError):
        values = json.loads(run_dir.config.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def base_url(host: str, port: int) -> str:
    """Return the URL under which a server that listens on `host` is reached from this machine."""
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def names_of(run_dir: RunDir) -> list[str]:
    """Return every name that a server's configuration gives its models, aliases after names."""
    models = read_config(run_dir).get("models", ())
    return [model["name"] for model in models] + [alias for model in models for alias in model.get("aliases", ())]


def complete_model(incomplete: str) -> list[str]:
    """Shell completion: names of the models that live servers know, whatever the letters' case."""
    names = {name for server in live() for name in names_of(server.run_dir)}
    return sorted(name for name in names if name.casefold().startswith(incomplete.casefold()))

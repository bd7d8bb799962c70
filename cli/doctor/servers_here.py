"""Checks of the configuration and of the servers that run here. Above: `report`; below: `settings`, `listening`."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from hostler import rundir
from hostler.config import ConfigError, HostlerConfig
from hostler.rundir import RunDir

from cli import janitor, servers, settings
from cli.doctor.finding import Finding, bad, note, ok
from cli.doctor.listening import Listener, listeners
from cli.exits import CliError
from cli.servers import Server

_PRIVATE_FILES = ("config.json", "token", "ray.json", "responses.db")


def configuration(file: Path | None) -> tuple[HostlerConfig | None, list[Finding]]:
    """Is hostler.yaml valid, and does it keep its key to itself?"""
    try:
        config, path = settings.resolve(settings.Flags(config=file))
    except (CliError, ConfigError) as error:
        return None, [bad("config", " ".join(str(error).split()), "`hostler config` shows more.")]
    found = [ok("config", str(path) if path else "none; defaults and the environment")]
    if path is not None and config.api_key and path.stat().st_mode & 0o077 and not os.environ.get("HOSTLER_API_KEY"):
        found.append(bad("config", f"others may read {path}, which holds the key", f"chmod 600 {path}"))
    return config, found


def run_directories() -> list[Finding]:
    """Can nobody else reach into the run directories?"""
    found = [problem for _, run_dir in rundir.existing() for problem in _open_doors(run_dir)]
    return found or [ok("run directories", f"{rundir.base_dir()}: this user's alone")]


def _open_doors(run_dir: RunDir) -> list[Finding]:
    problems = []
    for path, allowed in ((run_dir.path.parent, 0o700), (run_dir.path, 0o700)):
        info = path.stat()
        if info.st_uid != os.getuid():
            problems.append(bad("run directories", f"{path} belongs to another user", "Set HOSTLER_RUN_DIR elsewhere."))
        elif info.st_mode & 0o777 & ~allowed:
            problems.append(bad("run directories", f"others may enter {path}", f"chmod 700 {path}"))
    for name in _PRIVATE_FILES:
        path = run_dir.path / name
        if path.exists() and path.stat().st_mode & 0o077:
            problems.append(bad("run directories", f"others may read {path}", f"chmod 600 {path}"))
    return problems


def sockets(server: Server) -> list[Finding]:
    """Does anything of a server listen beyond this machine that should not?"""
    processes = janitor.find(janitor.of_earlier_runs(str(server.run_dir.path)))
    pids = {process.pid for process in processes} | ({server.pid} if server.pid else set())
    found = listeners(pids)
    name = f"sockets of :{server.port}"
    if found is None:
        return [note(name, "this system does not tell")]
    host = str(servers.read_config(server.run_dir).get("host", "127.0.0.1"))
    return judge_sockets(name, found, server.port, settings.is_loopback(host))


def judge_sockets(name: str, found: list[Listener], own_port: int, is_loopback: bool) -> list[Finding]:
    """Return what to say of the sockets of one server, which listens on `own_port`."""
    wide = [listener for listener in found if not listener.is_loopback]
    asked = [listener for listener in wide if listener.port == own_port and not is_loopback]
    others = [listener for listener in wide if listener not in asked]
    told = [note(name, f"{each.address}:{each.port} is open to others, as its host says, with a key") for each in asked]
    advice = "Ray opens these on every interface and demands its token there; close them with a firewall."
    told += [note(name, f"{each.address}:{each.port}, {each.command} ({each.pid})", advice) for each in others]
    return told or [ok(name, f"{len(found)}, all on loopback")]


def health(server: Server) -> Finding:
    """Does a server that has the lock also answer?"""
    config = servers.read_config(server.run_dir)
    url = servers.base_url(str(config.get("host", "127.0.0.1")), server.port)
    name = f"server on :{server.port}"
    key = config.get("api_key")
    try:
        with httpx.Client(timeout=5.0, trust_env=False, headers={"x-api-key": key} if key else {}) as http:
            ready = http.get(f"{url}/ready")
    except httpx.HTTPError as error:
        return bad(name, f"{url} does not answer ({type(error).__name__})", f"Look at {server.run_dir.logs}.")
    models = ready.json().get("models", {}) if ready.headers.get("content-type") == "application/json" else {}
    up = [model for model, is_ready in models.items() if is_ready]
    if ready.is_success:
        return ok(name, f"answers; loaded: {', '.join(up) or 'none yet'}")
    return bad(name, "answers, but is not ready", f"`hostler ps --port {server.port}` and `hostler events` say why.")

"""How the Ray head and the orchestrator meet: the environment both need, and `ray.json` in the run directory.

Above it: `ray_head.py` (writes) and `effects_ray.py` (reads). Below it: nothing; it does not import Ray, whose
environment must be complete first.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

NAMESPACE = "hostler"

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # With this off Ray takes 127.0.0.1 as it is; else it looks for an outside address and listens there.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "false",
    # Ray runs its workers at niceness 15; ours answer people and must not wait for every other program.
    "RAY_worker_niceness": "0",
    # Must stand before torch is imported, so not with the rest of a worker's environment. A thread spins some 30 µs at
    # a barrier, then sleeps: endless spinning made two threads up to 10 times slower than one whenever another
    # program used the other core; sleeping at once cost a third of the speed of one stream.
    "GOMP_SPINCOUNT": "10000",
}
"""Ray reads these when it is imported. The token may follow later, before the first connection."""

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class RaySession:
    """Where Ray is.

    Attributes:
        address: of the control plane.
        token: that every client must show; empty when we joined a cluster without one.
        pid: of the process that owns Ray; 0 when we joined somebody else's cluster.
    """

    address: str
    token: str
    pid: int


def environment(*, in_cluster: bool) -> dict[str, str]:
    """Return what Ray must find when it is imported; in a cluster every machine has an address of its own."""
    return RAY_ENVIRONMENT | ({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} if in_cluster else {})


def path_in(run_dir: Path) -> Path:
    """Return the path of `ray.json`."""
    return run_dir / "ray.json"


def read(run_dir: Path) -> RaySession | None:
    """Return the session whose owner is alive; None while there is none."""
    try:
        session = RaySession(**json.loads(path_in(run_dir).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return session if not session.pid or Path(f"/proc/{session.pid}").exists() else None


def write(run_dir: Path, session: RaySession) -> None:
    """Publish the session, readable by this user alone, whole or not at all."""
    write_private(path_in(run_dir), json.dumps(asdict(session)))


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically with one that only this user can read."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def cluster_token(environ: Mapping[str, str]) -> str:
    """Return the token of a cluster that we join, from where Ray's own commands take it; empty without one."""
    if token := environ.get(TOKEN_VARIABLE):
        return token
    path = Path(environ.get(TOKEN_PATH_VARIABLE) or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def preload_environment() -> dict[str, str]:
    """Return what makes Ray start one worker process ahead, with torch and transformers imported already."""
    if importlib.util.find_spec("workers") is None or importlib.util.find_spec("workers.preload") is None:
        return {}
    return {"RAY_preload_python_modules": "workers.preload", "RAY_enable_worker_prestart": "true"}

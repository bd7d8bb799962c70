"""The run directory: where the processes of one server meet. One per port, 0700, on this host only.

    <base>/<port>/
        lock                flock held by `hostler serve` for its life; its text is the pid
        config.json         the resolved configuration (0600), read by every process at start
        orchestrator.sock   placement service
        gateway.sock        HTTP for this user alone (0600): what `ssh -L` forwards to
        w-<id>.sock         one per worker on this host
        token               of this run (0600), from which the keys of workers on other hosts are made
        responses.db        stored responses, if the configuration puts them nowhere else; files beside it are SQLite's
                            and the gateways' locks
        metrics/            what the gateways count, in files that they share
        tunnel.json         the public address (0600), while a tunnel is up
        logs/               one file per process

`<base>` is $HOSTLER_RUN_DIR, else $XDG_RUNTIME_DIR/hostler, else /tmp/hostler-<uid>; a service of the machine has
/run/<name of its unit>. Socket paths are
limited to 107 bytes by the kernel, so the base must stay short.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME = "w-0123456789abcdef.sock"
_TOKEN_BYTES = 32
SERVICES_DIR = Path("/run")
"""Where systemd makes the run directories of the machine's services."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one server's run directory."""

    path: Path

    @property
    def lock(self) -> Path:
        """The flocked pid file."""
        return self.path / "lock"

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def logs(self) -> Path:
        """Directory of log files."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """Directory of the gateways' counters; emptied when a new run begins."""
        return self.path / "metrics"

    @property
    def config_taken(self) -> Path:
        """Holds the `stamp` of the configuration that the orchestrator goes by."""
        return self.path / "config.taken"

    @property
    def tunnel(self) -> Path:
        """Where the tunnel tells its address (0600, JSON with `url`); not there while it is down."""
        return self.path / "tunnel.json"

    @property
    def orchestrator_socket(self) -> Path:
        """The placement service's socket."""
        return self.path / "orchestrator.sock"

    @property
    def gateway_socket(self) -> Path:
        """The gateways' Unix socket, beside their TCP port."""
        return self.path / "gateway.sock"

    @property
    def orchestrator_target(self) -> str:
        """gRPC target of the placement service."""
        return f"unix:{self.orchestrator_socket}"

    def worker_socket(self, worker_id: str) -> Path:
        """The socket of one worker."""
        return self.path / f"w-{worker_id}.sock"

    @property
    def token_file(self) -> Path:
        """The run's token; removed when a new run begins."""
        return self.path / "token"

    def token(self) -> str:
        """Return the run's token. The first process that asks makes it; all get the same."""
        if not self.token_file.exists():
            draft = self.path / f".token.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(_TOKEN_BYTES))
            with contextlib.suppress(FileExistsError):  # Another process was quicker: its token is the one.
                os.link(draft, self.token_file)
            draft.unlink()
        return self.token_file.read_text(encoding="ascii")


def base_dir() -> Path:
    """Return the directory that holds every run directory of this user."""
    if override := os.environ.get("HOSTLER_RUN_DIR"):
        return Path(override)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "hostler"
    return Path(tempfile.gettempdir()) / f"hostler-{os.getuid()}"


def run_dir(port: int) -> RunDir:
    """Return the run directory of the server on `port`, created or not."""
    return RunDir(base_dir() / str(port))


def create(port: int) -> RunDir:
    """Create the run directory of the server on `port`, private to this user.

    Raises:
        PermissionError: somebody else owns it, or others may enter it.
        ValueError: its path is too long for a Unix socket.
    """
    directory = run_dir(port)
    for path in (directory.path.parent, directory.path, directory.logs):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
        if info.st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to user {info.st_uid}, not to you. Set HOSTLER_RUN_DIR elsewhere.")
        if stat.S_IMODE(info.st_mode) & 0o077:
            path.chmod(0o700)
    longest = len(os.fsencode(directory.path / _LONGEST_SOCKET_NAME))
    if longest > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"{directory.path} is too long for Unix sockets. Set HOSTLER_RUN_DIR to a shorter path.")
    return directory


def existing() -> list[tuple[int, RunDir]]:
    """Return (port, run directory) of every server this user has started here, dead or alive.

    Services of the machine that run as this user are among them, unless $HOSTLER_RUN_DIR names another place.
    """
    bases = [base_dir()]
    if not os.environ.get("HOSTLER_RUN_DIR"):
        bases += [path for path in sorted(SERVICES_DIR.glob("hostler*")) if path.stat().st_uid == os.getuid()]
    found = {
        p: int(p.name) for base in bases if base.is_dir() for p in base.iterdir() if p.name.isdigit() and p.is_dir()
    }
    return sorted(((port, RunDir(path)) for path, port in found.items()), key=lambda item: item[0])

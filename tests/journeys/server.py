"""A real `hostler serve` for tests: its own port, run directory and processes; nothing of it outlives the test.

Above: the journeys and README tests, through the `hostler_server` fixture. Below: the operating system only;
the server is spoken to over HTTP and looked at through its processes, as any user could.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTLER = Path(sys.executable).with_name("hostler")
READY_WITHIN_S = 90.0
STOP_WITHIN_S = 30.0
_TAIL_LINES = 60

SCRIPTED_CONFIG = """\
models:
  - name: scripted
    engine: scripted
    preload: true
gateways: 1
"""


class ServerFailed(RuntimeError):
    """The server did not do what the test harness needs; the message holds the tail of its output."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], within_s: float, what: str, every_s: float = 0.05) -> float:
    """Poll `condition` until it holds; return the seconds it took.

    Raises:
        ServerFailed: it did not hold in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise ServerFailed(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)
    return time.monotonic() - began


def _tail(path: Path, lines: int = _TAIL_LINES) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({error})"


@dataclass
class Server:
    """One running `hostler serve` and everything it started.

    Attributes:
        port: where it listens on 127.0.0.1.
        base: value of HOSTLER_RUN_DIR; also what marks its processes.
        process: the supervisor.
        started_in_s: seconds from the command to the first ready answer.
    """

    port: int
    base: Path
    process: subprocess.Popen[bytes]
    started_in_s: float = 0.0
    leftovers: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Root of the HTTP server, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def run_dir(self) -> Path:
        """The run directory, with sockets and logs."""
        return self.base / str(self.port)

    @property
    def output(self) -> Path:
        """What `hostler serve` printed."""
        return self.base / "serve.out"

    def environment(self) -> dict[str, str]:
        """Return the environment in which other `hostler` commands find this server."""
        return {**os.environ, "HOSTLER_RUN_DIR": str(self.base)}

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of this server, whatever group, session or parent they have by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOSTLER_RUN_DIR") == str(self.base) and process.pid != os.getpid():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def pids(self, *words: str) -> list[int]:
        """Return the pids of this server's processes whose command line holds every one of `words`."""
        found = []
        for process in self.processes():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if all(word in line for word in words):
                found.append(process.pid)
        return found

    def is_ready(self, model: str | None = None) -> bool:
        """Ask /ready once."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, params={"model": model} if model else None).is_success
        except httpx.HTTPError:
            return False

    def hostler(self, *args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run another `hostler` command against this server."""
        command = [str(HOSTLER), *args]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def stop(self, within_s: float = STOP_WITHIN_S) -> int:
        """Ask it to stop, wait, then end by pid whatever is left (kept in `leftovers`). Return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(within_s)
            except subprocess.TimeoutExpired:
                self.leftovers.append(f"hostler serve did not stop within {within_s:g} s")
        status = self.process.poll()
        deadline = time.monotonic() + 3
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in alive:
            try:
                self.leftovers.append(f"{process.pid} {' '.join(process.cmdline())[:160]}")
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=5)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        return -signal.SIGKILL if status is None else status

    def log_sections(self) -> list[tuple[str, str]]:
        """Return (title, tail) of the output and of every log file."""
        files = [self.output, *sorted((self.run_dir / "logs").glob("*"))]
        return [(f"hostler :{self.port} {path.name}", _tail(path)) for path in files if path.is_file()]


class Servers:
    """Starts servers and remembers them, so that the fixture can stop them all.

    Use: `server = hostler_server(config=SCRIPTED_CONFIG)`.
    """

    def __init__(self) -> None:
        self._servers: list[Server] = []

    def __call__(
        self,
        *args: str,
        config: str | None = None,
        env: Mapping[str, str] | None = None,
        wait_ready: bool = True,
        ready_within_s: float = READY_WITHIN_S,
        port: int | None = None,
    ) -> Server:
        """Start `hostler serve ARGS` and wait until it is ready.

        Args:
            config: text of a hostler.yaml for it.
            env: added to the environment.
            wait_ready: False returns as soon as the process runs.

        Raises:
            ServerFailed: it ended or was not ready in time; the message holds its output.
        """
        port = free_port() if port is None else port
        base = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))  # short: Unix socket paths end at 107 bytes
        command: list[str] = [str(HOSTLER), "serve", "--port", str(port), *args]
        if config is not None:
            (base / "hostler.yaml").write_text(config, encoding="utf-8")
            command += ["--config", str(base / "hostler.yaml")]
        environment = {**os.environ, "HOSTLER_RUN_DIR": str(base), "PYTHONUNBUFFERED": "1", **(env or {})}
        began = time.monotonic()
        with (base / "serve.out").open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(port=port, base=base, process=process)
        self._servers.append(server)
        if wait_ready:
            self._wait_ready(server, ready_within_s)
            server.started_in_s = time.monotonic() - began
        return server

    def _wait_ready(self, server: Server, within_s: float) -> None:
        def ready_or_gone() -> bool:
            if server.process.poll() is not None:
                raise ServerFailed(f"hostler serve ended with {server.process.returncode}:\n{_tail(server.output)}")
            return server.is_ready()

        try:
            wait_until(ready_or_gone, within_s, "ready")
        except ServerFailed as error:
            raise ServerFailed(f"{error}\n{self._logs(server)}") from None

    @staticmethod
    def _logs(server: Server) -> str:
        return "\n".join(f"--- {title}\n{text}" for title, text in server.log_sections())

    def log_sections(self) -> Sequence[tuple[str, str]]:
        """Return the logs of all servers, for the report of a failed test."""
        return [section for server in self._servers for section in server.log_sections()]

    def stop_all(self) -> None:
        """Stop every server and remove its directory."""
        for server in self._servers:
            server.stop()
            shutil.rmtree(server.base, ignore_errors=True)
        self._servers.clear()


@pytest.fixture
def hostler_server() -> Iterator[Servers]:
    """Start servers for one test; all are gone after it."""
    servers = Servers()
    try:
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="module")
def module_servers() -> Iterator[Servers]:
    """Start servers for the tests of one file; all are gone after it, so that they cost the next one nothing."""
    servers = Servers()
    try:
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="session")
def shared_servers() -> Iterator[Servers]:
    """Start servers that many tests only read from; all are gone after the session."""
    servers = Servers()
    try:
        yield servers
    finally:
        servers.stop_all()


@pytest.fixture(scope="session")
def scripted_server(shared_servers: Servers) -> Server:
    """One server with the scripted model, shared by tests that do it no harm."""
    return shared_servers(config=SCRIPTED_CONFIG)


@pytest.fixture(scope="session")
def real_server(shared_servers: Servers) -> Server:
    """One server with the embedded default model, shared by tests that do it no harm."""
    return shared_servers(ready_within_s=240)


@pytest.fixture(scope="session")
def coder_server(shared_servers: Servers, qwen_coder: Path) -> Server:
    """One server of Qwen2.5-Coder-0.5B-Instruct, called `coder`, shared by tests that do it no harm."""
    config = f"models:\n  - name: coder\n    source: {qwen_coder}\n    preload: true\ngateways: 1\n"
    return shared_servers(config=config, ready_within_s=400)

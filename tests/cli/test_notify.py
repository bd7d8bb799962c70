"""What the service manager is told: through a real datagram socket, by the protocol alone and by `hostler serve`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cli.notify import ServiceManager

from .test_serve import Served, start  # noqa: F401  (a fixture)


class Listener:
    """Stands in for systemd: the socket that it would listen on."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(15)
        self.heard: list[str] = []

    def until(self, line: str) -> list[str]:
        """Return what was said up to and with `line`."""
        while line not in self.heard:
            self.heard += self._socket.recv(4096).decode().splitlines()
        return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(place: Path) -> Iterator[Listener]:
    found = Listener(Path(os.environ["HOSTLER_RUN_DIR"]))
    yield found
    found.close()


def test_what_the_manager_put_into_the_environment_is_taken_out() -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "x"}
    manager = ServiceManager.take(environ)
    assert environ == {"PATH": "x"}
    assert manager.watchdog_s == 3.0
    manager.ready()  # to a socket that is not there: nothing happens


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    assert ServiceManager.take({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


def test_without_a_manager_nothing_is_told_or_awaited() -> None:
    manager = ServiceManager.take({})
    manager.ready()
    manager.stopping(1.0)
    asyncio.run(asyncio.wait_for(manager.show_life(), 5))


def test_a_reload_is_told_only_once_we_serve(listener: Listener) -> None:
    manager = ServiceManager(str(listener.path))
    manager.reloading()
    manager.ready()
    manager.reloading()
    manager.reloaded(False)
    heard = listener.until("STATUS=a reload failed; the old configuration is in force")
    assert [line.split("=")[0] for line in heard] == [
        "READY",
        "MAINPID",
        "STATUS",
        "RELOADING",
        "MONOTONIC_USEC",
        "READY",
        "STATUS",
    ]


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0hostler-test-{os.getpid()}")
        heard.settimeout(5)
        ServiceManager(f"@hostler-test-{os.getpid()}").status("one\nline")
        assert heard.recv(100) == b"STATUS=one line"


def test_a_server_tells_that_it_is_ready_lives_and_stops(
    start: Callable[..., Served],  # noqa: F811
    listener: Listener,
) -> None:
    served = start("tiny", env={"NOTIFY_SOCKET": str(listener.path), "WATCHDOG_USEC": "300000"})
    listener.until("READY=1")
    listener.until(f"MAINPID={served.process.pid}")
    serving = f"STATUS=serving on http://127.0.0.1:{served.port}/v1, 1 of 1 models loaded at start"
    listener.until(serving)
    for word in ("orchestrator", "gateway"):
        environment = Path(f"/proc/{served.pid(word)}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environment
        assert b"WATCHDOG_USEC" not in environment
    listener.heard.clear()
    listener.until("WATCHDOG=1")
    listener.heard.clear()
    served.process.send_signal(signal.SIGTERM)
    listener.until("STOPPING=1")
    heard = listener.until("STATUS=finishing running requests")
    (most,) = [int(line.split("=")[1]) for line in heard if line.startswith("EXTEND_TIMEOUT_USEC=")]
    assert most == (10 + 10 + 10 + 10) * 1_000_000  # three ranks of the dummies' grace, and what collecting may take
    assert served.process.wait(15) == 0


def test_a_supervisor_that_hangs_shows_no_life(
    start: Callable[..., Served],  # noqa: F811
    listener: Listener,
) -> None:
    served = start("tiny", env={"NOTIFY_SOCKET": str(listener.path), "WATCHDOG_USEC": "300000"})
    listener.until("READY=1")
    os.kill(served.process.pid, signal.SIGSTOP)
    listener._socket.settimeout(1.0)
    num_heard = 0
    with suppress(TimeoutError):
        while num_heard < 50:  # what was sent before
            listener._socket.recv(4096)
            num_heard += 1
    assert num_heard < 50

"""What `hostler serve` tells a service manager: through a real datagram socket, in sd_notify's protocol."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from cli import notify, serve
from tests.cli.test_serve import Served


def test_the_manager_is_nobody_else_s_to_talk_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "1")
        assert name not in serve.child_environment(False, False)


class Manager:
    """The end of the socket that systemd would hold."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(0.2)
        self.heard: list[str] = []

    def wait_for(self, line: str, times: int = 1, within_s: float = 20.0) -> None:
        deadline = time.monotonic() + within_s
        while self.heard.count(line) < times and time.monotonic() < deadline:
            try:
                self.heard += self.socket.recv(4096).decode().split("\n")
            except TimeoutError:
                continue
        assert self.heard.count(line) >= times, self.heard


def test_a_service_manager_hears_that_it_is_ready_alive_and_stopping(place: Path, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "n")
    served = Served(place, env={"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "400000"})
    try:
        manager.wait_for("READY=1")
        manager.wait_for("WATCHDOG=1", times=3)
        manager.wait_for(f"STATUS=serves on http://127.0.0.1:{served.port}/v1; 0 of 1 models loaded at the start")
        assert "STOPPING=1" not in manager.heard
        served.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        # Three ranks of the dummies' grace, and what collecting may take: the unit's own limit need not know.
        manager.wait_for("EXTEND_TIMEOUT_USEC=40000000")
        assert served.process.wait(30) == 0
    finally:
        manager.socket.close()
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


def test_a_service_manager_hears_of_a_reload(place: Path, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "n")
    served = Served(place, env={"NOTIFY_SOCKET": str(tmp_path / "n")})
    try:
        manager.wait_for("READY=1")
        served.process.send_signal(signal.SIGUSR1)
        manager.wait_for("RELOADING=1")
        manager.wait_for("READY=1", times=2, within_s=90.0)
    finally:
        served.process.terminate()
        served.process.wait(30)
        manager.socket.close()


def test_a_frozen_server_no_longer_says_that_it_lives(place: Path, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "n")
    served = Served(place, env={"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "400000"})
    try:
        manager.wait_for("READY=1")
        served.process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        manager.socket.setblocking(False)
        while True:
            try:
                manager.socket.recv(4096)
            except BlockingIOError:
                break
        manager.socket.settimeout(1.5)
        with pytest.raises(TimeoutError):
            manager.socket.recv(4096)
    finally:
        served.process.send_signal(signal.SIGCONT)
        served.process.terminate()
        served.process.wait(30)
        manager.socket.close()


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0hostler-test-{os.getpid()}")
        heard.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@hostler-test-{os.getpid()}")
        notify.serving("http://x", 1, 2)
        assert heard.recv(200) == b"STATUS=serves on http://x/v1; 1 of 2 models loaded at the start"


def test_a_watchdog_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_period_s() is None
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert notify.watchdog_period_s() == 1.5

"""`hostler service`: the units, judged by systemd's own checker, and what `hostler serve` tells a service manager."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli import serve
from cli.exits import CliError, UsageError
from cli.service import control, unit
from tests.cli.test_serve import Served

ANALYZE = shutil.which("systemd-analyze")
needs_systemd_analyze = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def wish(account: str | None = None, *words: str, **more: Any) -> unit.Wish:
    command = (sys.executable, "-P", "-m", "cli.main", "serve", *words)
    return unit.Wish("hostler", command, Path("/srv/ada"), account, 20.0, **more)


@needs_systemd_analyze
@pytest.mark.parametrize("account", [None, "daemon"])
def test_systemd_takes_every_line_of_the_units(tmp_path: Path, account: str | None) -> None:
    file = tmp_path / "hostler.service"
    file.write_text(unit.text_of(wish(account, "--port", "9000", memory_high="70%", memory_max="48G")))
    done = subprocess.run([str(ANALYZE), "verify", "--man=no", str(file)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "hostler.service" in line]
    assert ours == []


@needs_systemd_analyze
def test_the_checker_sees_a_planted_fault(tmp_path: Path) -> None:
    file = tmp_path / "hostler.service"
    file.write_text(unit.text_of(wish()).replace("KillMode=mixed", "KillMode=sometimes"))
    done = subprocess.run([str(ANALYZE), "verify", "--man=no", str(file)], capture_output=True, text=True, check=False)
    assert "hostler.service" in done.stderr


@needs_systemd_analyze
def test_the_system_unit_is_exposed_no_more_than_it_must_be(tmp_path: Path) -> None:
    file = tmp_path / "hostler.service"
    file.write_text(unit.text_of(wish("daemon")))
    command = [str(ANALYZE), "security", "--offline=true", "--threshold=50", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:]


def test_words_mean_to_systemd_what_they_say() -> None:
    assert unit.quoted("100%$HOME") == "100%%$$HOME"
    assert unit.quoted('my "model"') == '"my \\"model\\""'
    assert unit.quoted("A=$x", is_command=False) == "A=$x"
    with pytest.raises(UsageError, match="control character"):
        unit.quoted("x\nExecStartPre=/bin/evil")


@pytest.mark.parametrize("size", ["48 G", "-1", "1G\nUser=root"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        unit.text_of(wish(memory_max=size))


def test_the_key_does_not_get_into_a_unit() -> None:
    with pytest.raises(UsageError, match="HOSTLER_API_KEY"):
        control.wish_for("hostler", ["--api-key=secret"], False, None, None, None)


def test_a_stop_may_take_longer_than_the_drain(place: Path) -> None:
    (place / "my.yaml").write_text("drain_s: 300\n")
    found = control.wish_for("hostler", ["--config", "my.yaml"], False, None, None, None)
    assert "TimeoutStopSec=345\n" in unit.text_of(found)


def test_where_systemd_does_not_run_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="foreground"):
        control.require_systemd(tmp_path / "absent")


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
        assert "STOPPING=1" not in manager.heard
        served.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
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

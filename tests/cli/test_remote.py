"""`hostler remote` with an `ssh` of our own that really forwards, and ends when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cli import remote
from cli.exits import CliError, UsageError

FAKE_SSH = """#!{python}
import os, socket, sys, threading
words = sys.argv[1:]
if "fails" in words: sys.exit(255)
_, here, _, there = words[words.index("-L") + 1].split(":")
open({pids!r}, "a").write(str(os.getpid()) + "\\n")
listener = socket.create_server(("127.0.0.1", int(here)))
def pump(a, b):
    while data := a.recv(65536): b.sendall(data)
    b.shutdown(socket.SHUT_WR)
while True:
    a, _ = listener.accept()
    try: b = socket.create_connection(("127.0.0.1", int(there)))
    except OSError: a.close(); continue
    for pair in ((a, b), (b, a)): threading.Thread(target=pump, args=pair, daemon=True).start()
"""


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def far_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def start(place: Path, *args: str) -> subprocess.Popen[str]:
    ssh = place / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH.format(python=sys.executable, pids=str(place / "pids")))
    ssh.chmod(0o755)
    root = str(Path(remote.__file__).parent.parent)
    env = os.environ | {"PATH": f"{ssh.parent}:{os.environ['PATH']}", "PYTHONPATH": f"{root}:{root}/proto"}
    words = [sys.executable, "-m", "cli.main", "remote", *args]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_cut_connection_comes_back_and_ctrl_c_leaves_no_ssh(place: Path, far_port: int) -> None:
    process = start(place, "box", "--remote-port", str(far_port))
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        url = process.stdout.readline().split()[0]
        port = int(url.split(":")[2].split("/")[0])
        assert port != far_port
        assert remote.health(port) == 200
        os.kill(int((place / "pids").read_text().split()[0]), signal.SIGKILL)
        assert "again in 1 s" in process.stderr.readline()
        assert "box is back" in process.stderr.readline()
        assert remote.health(port) == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert remote.health(port) is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_a_first_connection_that_fails_is_one_line(place: Path) -> None:
    process = start(place, "fails")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == "hostler: ssh ended with code 255 before the forward was open; try `ssh fails true`\n"


@pytest.mark.parametrize("host", ["", "-oProxyCommand=x", "me@-oX", "a b", "a\nb"])
def test_what_is_no_host_never_reaches_ssh(host: str) -> None:
    with pytest.raises(UsageError):
        remote.check_host(host)


def test_waits_double_to_half_a_minute_and_a_minute_of_life_forgives() -> None:
    waits = [0.0]
    for _ in range(7):
        waits.append(remote.next_delay_s(waits[-1], 0.1))
    assert waits[1:] == [1, 2, 4, 8, 16, 30, 30]
    assert remote.next_delay_s(30, 61) == 1


def test_a_taken_port_is_refused_if_asked_for_and_passed_over_if_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CliError, match="is taken"):
            remote.choose_port(port, 8000)
        assert remote.choose_port(None, port) > port

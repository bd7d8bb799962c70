"""`hostler remote` through a real sshd: a server at another account is started, used, cut off and found again."""

from __future__ import annotations

import json
import os
import queue
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.journeys import sshd
from tests.journeys.server import HOSTLER, ROOT, free_port, wait_until
from tests.journeys.sshd import Sshd

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

KEY = "sesame-of-the-far-side-0123456789"


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """End every `hostler remote` of a test that failed halfway."""
    yield
    while _started:
        process = _started.pop()
        process.terminate()
        process.wait(20)


class Remote:
    """One `hostler remote --json`, its news read as they come."""

    def __init__(self, far: Sshd, *args: str) -> None:
        command = [str(HOSTLER), "remote", far.destination, "--json", *far.options(), *args]
        environment = {name: value for name, value in os.environ.items() if name != "HOSTLER_API_KEY"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        _started.append(self.process)
        self.text = ""
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.text += line
            self._news.put(json.loads(line))
        self._news.put(None)

    def wait_for(self, event: str, within_s: float = 120.0) -> dict[str, Any]:
        """Return the next piece of news of that kind."""
        deadline = time.monotonic() + within_s
        while True:
            news = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            assert news is not None, f"it ended before {event}: {self.text}"
            if news["event"] == event:
                return news

    def ssh(self) -> list[psutil.Process]:
        """Return its ssh."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def far() -> Iterator[Sshd]:
    with sshd.running() as running:
        yield running


def ask(url: str) -> str:
    """Stream an answer with OpenAI's SDK, through the forward."""
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)
    messages: list[Any] = [{"role": "user", "content": "Hello there"}]
    stream = client.chat.completions.create(model="scripted", messages=messages, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_a_far_server_is_started_used_and_found_again_after_a_cut(far: Sshd) -> None:
    port = free_port()
    config = (
        f"port: {port}\napi_key: {KEY}\nmodels: [{{name: scripted, engine: scripted, preload: true}}]\ngateways: 1\n"
    )
    sshd.install_hostler(far, config)
    remote = Remote(far, "--start")
    try:
        assert remote.wait_for("starting")["how"] == "detached"
        stop = remote.wait_for("started")["stop"]
        up = remote.wait_for("up")
        assert (up["models"], up["needs_key"]) == (["scripted"], True)
        assert KEY not in remote.text
        assert httpx.get(f"{up['url']}/models").status_code == 401
        assert ask(up["url"])

        (ssh,) = remote.ssh()
        socket = far.run_dir / str(port) / "gateway.sock"
        assert f":{socket}" in " ".join(ssh.cmdline())
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert socket.stat().st_uid == far.home.stat().st_uid

        assert far.cut() >= 1
        assert remote.wait_for("lost")["again_in_s"] == 1
        assert remote.wait_for("up")["port"] == int(up["url"].split(":")[2].removesuffix("/v1"))
        assert ask(up["url"])
        assert remote.ssh() != [ssh]
    finally:
        children = remote.ssh()
        remote.process.send_signal(signal.SIGINT)
        assert remote.process.wait(20) == 0
    assert not any(child.is_running() for child in children)

    # The server went on by itself. The user's own option counts: a dead line is noticed sooner than by ours.
    again = Remote(far, "--with-key", "--remote-port", str(port), "--ssh-option", "ServerAliveInterval=1")
    up = again.wait_for("up")
    assert up["api_key"] == KEY
    assert ask(up["url"])
    far.freeze()
    again.wait_for("lost", within_s=60)
    again.wait_for("up")
    assert ask(up["url"])
    pid = int(stop.split()[-1])
    os.kill(pid, signal.SIGTERM)
    again.wait_for("server_gone", within_s=60)
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(20) == 0
    wait_until(lambda: not socket.exists(), 30, "the socket is removed")


def fails(far: Sshd, destination: str, *args: str) -> str:
    """Return the one line with which a command fails."""
    done = subprocess.run(
        [str(HOSTLER), "remote", destination, *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,  # no terminal, at which ssh would ask
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_is_wrong_is_told_in_one_line_that_says_what_to_do(far: Sshd) -> None:
    place = far.destination
    closed = str(free_port())
    assert "cannot be reached" in fails(far, place, *far.options(Port=closed))
    assert "is not found" in fails(far, "ada@nowhere.invalid", *far.options())
    unknown = fails(far, place, *far.options(UserKnownHostsFile=str(far.folder / "none")))
    assert "the host key" in unknown
    assert "connect once with `ssh" in unknown
    stranger = fails(far, place, *far.options(IdentityFile=str(far.folder / "stranger")))
    assert "does not let you in" in stranger
    assert "no program /nowhere/hostler" in fails(far, place, *far.options(), "--hostler", "/nowhere/hostler")
    (far.home / ".local/bin/hostler").unlink(missing_ok=True)
    assert "hostler is not on" in fails(far, place, *far.options())
    sshd.install_hostler(far, "port: 8000\n")
    assert "--start" in fails(far, place, *far.options())


def test_an_sshd_that_forbids_sockets_is_reached_by_port_and_one_that_forbids_all_is_told() -> None:
    port = free_port()
    config = f"port: {port}\nmodels: [{{name: scripted, engine: scripted, preload: true}}]\ngateways: 1\n"
    with sshd.running(AllowStreamLocalForwarding="no") as far:
        sshd.install_hostler(far, config)
        remote = Remote(far, "--start")
        assert ask(remote.wait_for("up")["url"])
        assert f":127.0.0.1:{port} " in " ".join(remote.ssh()[0].cmdline())
        remote.process.send_signal(signal.SIGINT)
        assert remote.process.wait(20) == 0
    with sshd.running(AllowStreamLocalForwarding="no", AllowTcpForwarding="no") as far:
        sshd.install_hostler(far, config)
        assert "forbids forwarding" in fails(far, far.destination, *far.options(), "--start")

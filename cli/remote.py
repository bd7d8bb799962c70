"""`hostler remote`: the server of another machine on a port of this one, through the system's ssh, kept open.

Above stands `cli.main`; below, the `ssh` program, which reads its own configuration, agents and jump hosts. What to
run and how long to wait are pure functions; only `_Forward` and `run` have effects. ssh's own words (questions,
refusals) go straight to the user's terminal.
"""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing

import typer

from cli.exits import CliError, UsageError

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0
FORGIVEN_AFTER_S = 60.0
LOOK_EVERY_S = 0.2
PORTS_TRIED = 100


def check_host(host: str) -> str:
    """Return `host` if ssh takes it for a host.

    Raises:
        UsageError: it is empty, looks like an option, or holds blanks or control characters.
    """
    if not host or host.startswith("-") or "@-" in host or not host.isprintable() or " " in host:
        raise UsageError(f"{host!r} is no host; give [user@]host or a name of your ~/.ssh/config")
    return host


def command(ssh: str, host: str, local_port: int, remote_port: int, options: Sequence[str]) -> list[str]:
    """Return the ssh command that only forwards. The user's options come first: ssh keeps the first value it reads."""
    ours = ("ExitOnForwardFailure=yes", "ServerAliveInterval=10", "ServerAliveCountMax=3")
    words = [word for option in (*options, *ours) for word in ("-o", option)]
    return [ssh, "-N", "-T", *words, "-L", f"127.0.0.1:{local_port}:127.0.0.1:{remote_port}", "--", host]


def next_delay_s(delay_s: float, lived_s: float) -> float:
    """Return the wait before the next try, after a connection of `lived_s` and a wait of `delay_s` (0: none)."""
    if delay_s == 0 or lived_s >= FORGIVEN_AFTER_S:
        return FIRST_DELAY_S
    return min(delay_s * 2, LONGEST_DELAY_S)


def is_free(port: int) -> bool:
    """Return whether a port of 127.0.0.1 can be listened on."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose_port(asked: int | None, remote_port: int) -> int:
    """Return the local port: the one asked for, else the far one's number or the next that is free.

    Raises:
        CliError: the port asked for is taken, or none is free.
    """
    if asked is not None:
        if not is_free(asked):
            raise CliError(f"port {asked} is taken on this machine; leave --port out and a free one is chosen")
        return asked
    for port in range(remote_port, min(remote_port + PORTS_TRIED, 65536)):
        if is_free(port):
            return port
    raise CliError(f"no free port from {remote_port} on; choose one with --port")


def health(port: int) -> int | None:
    """Return the status of GET /health on a local port; 0 if it is open and nothing answers, None if closed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with closing(connection):
        try:
            connection.connect()
        except OSError:
            return None
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


class _Forward:
    """One ssh process."""

    def __init__(self, words: list[str]) -> None:
        self._began = time.monotonic()
        self._process = subprocess.Popen(words)

    def until_open(self, port: int) -> int | None:
        """Wait until the forward is open; return what `health` says, or None if ssh ended first."""
        while self._process.poll() is None:
            if (status := health(port)) is not None:
                return status
            time.sleep(LOOK_EVERY_S)
        return None

    def wait(self) -> tuple[int, float]:
        """Wait for ssh's end; return its exit code and how long it lived in seconds."""
        return self._process.wait(), time.monotonic() - self._began

    def close(self) -> None:
        """End ssh if it runs."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _say(text: str) -> None:
    typer.echo(f"hostler: {text}", err=True)


def _announce(host: str, port: int, remote_port: int, status: int, as_json: bool) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    if as_json:
        values = {"base_url": url, "host": host, "remote_port": remote_port, "healthy": status == 200}
        typer.echo(json.dumps(values))
    else:
        typer.echo(f"{url}   is port {remote_port} of {host}; Ctrl-C ends it")
    if status != 200:
        what = f"its /health says {status}" if status else "nothing answers"
        _say(f"the forward is open, but {what} there; start one with `hostler serve --port {remote_port}` on {host}")


def _stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def run(host: str, port: int | None, remote_port: int, options: Sequence[str], as_json: bool) -> None:
    """Open the forward and keep it open until Ctrl-C or SIGTERM.

    Raises:
        UsageError: `host` is none.
        CliError: no ssh here, no port, or the first connection failed.
    """
    check_host(host)
    if (ssh := shutil.which("ssh")) is None:
        raise CliError("there is no `ssh` on this machine; install OpenSSH's client")
    local_port = choose_port(port, remote_port)
    words = command(ssh, host, local_port, remote_port, options)
    signal.signal(signal.SIGTERM, _stop)
    opened, delay_s = False, 0.0
    try:
        while True:
            forward = _Forward(words)
            try:
                status = forward.until_open(local_port)
                if status is not None and not opened:
                    _announce(host, local_port, remote_port, status, as_json)
                elif status is not None:
                    _say(f"{host} is back")
                opened = opened or status is not None
                code, lived_s = forward.wait()
            finally:
                forward.close()
            if not opened:
                raise CliError(f"ssh ended with code {code} before the forward was open; try `ssh {host} true`")
            delay_s = next_delay_s(delay_s, lived_s)
            _say(f"the connection to {host} ended (ssh's code {code}); again in {delay_s:.0f} s")
            time.sleep(delay_s)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None

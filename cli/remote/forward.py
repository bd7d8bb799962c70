"""Keeps a forward up: runs ssh, watches whether a server answers through it, runs ssh again when it has ended.

Above: `remote`; below: `ssh` (what to run, what its words mean) and the two effects `Effects` stands for, which tests
replace. A connection that ends is news; so is a server that goes away at the far end of one that stays.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Protocol

from cli.exits import CliError
from cli.remote import ssh
from cli.report import Reporter
from cli.supervisor import Backoff

BACKOFF = Backoff(first_s=1.0, most_s=30.0, reset_s=60.0)
LOOK_EVERY_S = 10.0
_COMING_UP_LOOK_S = 0.25
_ANSWER_WITHIN_S = 5.0
_END_WITHIN_S = 3.0
_LAUNCH = str(Path(__file__).parents[1] / "launch.py")


class Answer(Enum):
    """What a request to the local port met."""

    SERVER = "server"
    SILENCE = "silence"
    CLOSED = "closed"


class Link(Protocol):
    """One run of ssh. Above stands the keeper, below a process."""

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status, or None if it still runs after that time."""

    def errors(self) -> str:
        """Return the last lines of its standard error."""

    def stop(self) -> None:
        """End it and wait; does nothing if it has ended."""


class Effects(Protocol):
    """What the keeper does to the world. Above stands the keeper, below the operating system."""

    def dial(self, command: list[str]) -> Link:
        """Run ssh."""

    def ask(self, port: int) -> Answer:
        """Send GET /health to a local port."""

    def is_free(self, port: int) -> bool:
        """Return whether a local port can be listened on."""

    def sleep(self, time_s: float) -> None:
        """Wait."""

    def now_s(self) -> float:
        """Return a monotonic time."""


class _NoWay(Exception):
    """Nothing is to be had at that far end, and there is another to try."""


class Keeper:
    """Keeps one forward. `run` returns only by an exception: the user's Ctrl-C, or a failure that no retry mends.

    Args:
        route: how ssh reaches the far side.
        local_port: where to listen on 127.0.0.1.
        targets: the far ends, see `ssh.targets_of`; the next one if nothing is had by the first.
        report: where news go.
        on_first_up: called once, when a server has answered for the first time.
        may_ask: somebody is there who can type a password; a reconnect that needs one asks, else it is the end.
    """

    def __init__(
        self,
        route: ssh.Route,
        local_port: int,
        targets: tuple[str, ...],
        report: Reporter,
        *,
        on_first_up: Callable[[], None],
        may_ask: bool,
        effects: Effects | None = None,
        backoff: Backoff = BACKOFF,
    ) -> None:
        self._route = route
        self._port = local_port
        self._targets = targets
        self._report = report
        self._on_first_up = on_first_up
        self._may_ask = may_ask
        self._effects = effects or Real()
        self._backoff = backoff
        self._has_been_up = False

    def run(self) -> None:
        """Keep the forward up.

        Raises:
            CliError: ssh failed in a way that trying again does not mend.
        """
        num_short_lives = 0
        asking = True  # the first time ssh may ask for a password or about a host key
        while True:
            began_s = self._effects.now_s()
            try:
                failure = self._live(asking)
            except _NoWay:
                self._targets = self._targets[1:]
                continue
            if self._effects.now_s() - began_s >= self._backoff.reset_s:
                num_short_lives = 0
            num_short_lives += 1
            if failure.kind is ssh.Kind.DENIED and not asking and self._may_ask:
                self._report.say("asking", f"{self._route.destination} wants a password again", "warn")
                asking = True
                continue
            if failure.is_final or (failure.kind is ssh.Kind.PORT_TAKEN and not self._has_been_up):
                raise CliError(failure.text)
            asking = not self._has_been_up
            wait_s = self._backoff.delay_s(num_short_lives)
            text = f"no connection to {self._route.destination}: {failure.text}; trying again in {wait_s:g} s"
            fields = {"reason": failure.kind.value, "again_in_s": wait_s}
            self._report.say("lost", text, "warn", **fields)
            self._effects.sleep(wait_s)

    def _live(self, asking: bool) -> ssh.Failure:
        """Run ssh once, and follow it to its end."""
        # Another program's answer at that port must not be taken for the server's.
        if not self._effects.is_free(self._port):
            text = f"port {self._port} of this machine is taken by another program; choose another with --port"
            return ssh.Failure(ssh.Kind.PORT_TAKEN, text)
        command = ssh.forward_command(self._route, self._port, self._targets[0], batch=not asking)
        link = self._effects.dial(command)
        try:
            return self._follow(link)
        finally:
            link.stop()

    def _follow(self, link: Link) -> ssh.Failure:
        before: Answer | None = None
        look_s = _COMING_UP_LOOK_S
        while (status := link.wait(look_s)) is None:
            answer = self._effects.ask(self._port)
            if answer is Answer.CLOSED and before is None:
                continue  # ssh is still connecting, or waits for its user
            if answer is not Answer.SERVER and not self._has_been_up:
                self._look_for_another_way(link)
            if answer is not before:
                self._tell(answer)
            before = answer
            look_s = LOOK_EVERY_S if answer is Answer.SERVER else max(1.0, look_s)
        return ssh.failure_of(self._route, status, link.errors())

    def _look_for_another_way(self, link: Link) -> None:
        # An sshd that forbids sockets says the same as one that finds no server there.
        if len(self._targets) > 1:
            raise _NoWay
        if "administratively prohibited" in link.errors():
            raise CliError(
                f"the sshd of {self._route.destination} forbids forwarding; AllowTcpForwarding or "
                "AllowStreamLocalForwarding in its sshd_config would allow it"
            )

    def _tell(self, answer: Answer) -> None:
        host = self._route.destination
        if answer is not Answer.SERVER:
            text = f"connected to {host}, but no server answers there now; the forward stays"
            self._report.say("server_gone", text, "warn")
        elif self._has_been_up:
            self._report.say("up", f"connected again: http://127.0.0.1:{self._port}/v1", "good", port=self._port)
        else:
            self._has_been_up = True
            self._on_first_up()


class Process:
    """A run of ssh. It stays in our process group, for it asks for passwords at our terminal."""

    def __init__(self, command: list[str]) -> None:
        if sys.platform == "linux":  # so that it ends with us even if we are killed
            command = [sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()), "15", *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._lines: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = self._process.stderr
        if stream is not None:
            for line in stream:
                self._lines.append(line.decode("utf-8", "replace"))

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit status, or None if it still runs after that time."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(1.0)
        return status

    def errors(self) -> str:
        """Return the last lines of its standard error."""
        return "".join(list(self._lines))

    def stop(self) -> None:
        """End it and wait."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(1.0)
        if self._process.stderr is not None:
            self._process.stderr.close()


class Real:
    """The effects on this machine."""

    def dial(self, command: list[str]) -> Link:
        """Run ssh."""
        return Process(command)

    def ask(self, port: int) -> Answer:
        """Send GET /health to a local port. Any HTTP reply is a server's."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_WITHIN_S)
        try:
            connection.connect()
        except OSError:
            return Answer.CLOSED
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health", headers={"Connection": "close"})
            connection.getresponse().read()
            connection.close()
            return Answer.SERVER
        connection.close()
        return Answer.SILENCE

    def is_free(self, port: int) -> bool:
        """Return whether a local port can be listened on."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    def sleep(self, time_s: float) -> None:
        """Wait."""
        time.sleep(time_s)

    def now_s(self) -> float:
        """Return a monotonic time."""
        return time.monotonic()

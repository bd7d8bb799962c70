"""Tells the service manager how the server is: ready, reloading, stopping, alive (systemd's `sd_notify` protocol).

Above stands `cli.startup`; below, the datagram socket that $NOTIFY_SOCKET names. Without one nothing is told, so that
whoever calls need not ask who started us. The protocol is lines of KEY=VALUE in one datagram; see sd_notify(3).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_PER_WATCHDOG = 3.0
"""So many signs of life in the time after which the manager takes us for hung."""


class ServiceManager:
    """Who started us, if it wants to be told. Lives in the supervisor's loop and main thread.

    Args:
        address: the socket's path; a leading @ stands for the abstract namespace. Empty: nobody wants to know.
        watchdog_s: after so long without a sign of life we are taken for hung; 0: never.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self.watchdog_s = watchdog_s
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if address else None
        self._is_serving = False

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> ServiceManager:
        """Read what the manager put into our environment, and take it out: it is meant for no child of ours."""
        found = {name: environ.pop(name, "") for name in _VARIABLES}
        microseconds, pid = found["WATCHDOG_USEC"], found["WATCHDOG_PID"]
        is_watched = microseconds.isdigit() and pid in ("", str(os.getpid()))
        return cls(found["NOTIFY_SOCKET"], int(microseconds) / 1e6 if is_watched else 0.0)

    def tell(self, *lines: str) -> None:
        """Send lines in one datagram. A manager that does not listen is no reason to stop serving."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)

    def status(self, text: str) -> None:
        """Say in one line how we are, for `systemctl status`."""
        self.tell(f"STATUS={' '.join(text.split())}")

    def ready(self) -> None:
        """Requests are answered from now on."""
        self._is_serving = True
        self.tell("READY=1", f"MAINPID={os.getpid()}", "STATUS=answering; models may still be loading")

    def reloading(self) -> None:
        """A reload begins. Before we were ready there is nothing to tell: the manager waits for that."""
        if self._is_serving:
            self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self, is_in_force: bool) -> None:
        """A reload is over."""
        if self._is_serving:
            outcome = "reloaded" if is_in_force else "a reload failed; the old configuration is in force"
            self.tell("READY=1", f"STATUS={outcome}")

    def stopping(self, at_most_s: float) -> None:
        """A stop begins, and may take so long: the unit's own limit need not know what the configuration says."""
        self._is_serving = False
        self.tell("STOPPING=1", "STATUS=finishing running requests", f"EXTEND_TIMEOUT_USEC={round(at_most_s * 1e6)}")

    async def show_life(self) -> None:
        """Tell that our loop turns, until cancelled."""
        import asyncio  # not above: children start before it is imported

        while self._socket is not None and self.watchdog_s:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / _PER_WATCHDOG)

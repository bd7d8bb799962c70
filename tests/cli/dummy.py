"""A child for supervisor tests, run as a script: writes what happens to it into a journal.

    dummy.py JOURNAL NAME [crash] [stubborn] [brood] [mute] [lingers] [--ready-fd N]

crash: ends at once with code 3. stubborn: ignores SIGTERM. brood: starts a grandchild in a session of its own.
mute: never says that it is ready. lingers: does not end on SIGUSR1 either, as one that has a long stream.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any


def note(event: str) -> None:
    descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{sys.argv[2]} {event} {os.getpid()}\n".encode())
    os.close(descriptor)


def main() -> None:
    manners = sys.argv[3:]
    stop = threading.Event()

    def on_term(*_: Any) -> None:
        note("term")
        if "stubborn" not in manners:
            stop.set()

    def on_retire(*_: Any) -> None:
        note("retire")
        if "lingers" not in manners:
            stop.set()

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGUSR1, on_retire)
    note("up")
    if "crash" in manners:
        sys.exit(3)
    if "brood" in manners:
        subprocess.Popen(
            [sys.executable, __file__, sys.argv[1], f"{sys.argv[2]}-child", "stubborn"], start_new_session=True
        )
    if "--ready-fd" in manners and "mute" not in manners:
        os.write(int(manners[manners.index("--ready-fd") + 1]), b"1")
    while not stop.wait(0.05):
        pass
    note("down")


if __name__ == "__main__":
    main()

"""One process, told from a later one of the same number by its start time; how a worker is ended without Ray.

Above it: `effects_ray.py`. Below it: the kernel (`/proc`, pidfd). Nothing here needs the process to cooperate.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATE, _START_TICKS = 0, 19
"""Fields of /proc/PID/stat, counted from the one after the command's closing bracket."""


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process, for as long as numbers are reused.

    Attributes:
        pid: its number.
        start_ticks: when it started, in clock ticks since the machine did. Not wall-clock time, which differs between
            two readers whenever the clock is set, and must agree between one orchestrator and the next.
    """

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Return the process that has this number now."""
        fields = _stat(pid)
        return cls(pid, int(fields[_START_TICKS])) if fields else None

    @property
    def is_alive(self) -> bool:
        """True until it has ended; a process that only waits to be collected has."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[_START_TICKS]) == self.start_ticks and fields[_STATE] not in "ZX"

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """Yield a pidfd of the process, or None when it has ended. A pidfd cannot come to mean another process."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            yield descriptor if self.is_alive else None
        finally:
            os.close(descriptor)

    def wait(self, timeout_s: float) -> bool:
        """Wait (blocking) until it has ended; return whether it has."""
        with self._opened() as descriptor:
            return descriptor is None or _ended(descriptor, timeout_s)

    def end(self, timeout_s: float) -> bool:
        """Kill it and wait (blocking) until it has ended; return whether it has."""
        with self._opened() as descriptor:
            if descriptor is None:
                return True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return _ended(descriptor, timeout_s)


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))

"""Finds and ends every process of one run, however deep and in whatever session. Stdlib only, Linux.

Two users: `cli.supervisor` calls the functions; and the file runs as a script (`python -I -S janitor.py
RUN_ID GRACE_S`), a process of its own that waits for its standard input to close, which happens when the
supervisor dies, even by SIGKILL. Ray's daemons and workers are nobody's direct children then, so neither a
parent-death signal nor a process group finds them all.

A process belongs to a run when its environment has `HOSTLER_RUN_ID` of that run, or when it descends from
one that does (Ray's workers overwrite their environment with their process title).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

RUN_ID = "HOSTLER_RUN_ID"
CHILD = "HOSTLER_CHILD"


@dataclass(frozen=True)
class Process:
    """One process; the start time tells it from a later one with the same pid."""

    pid: int
    parent_pid: int
    start_ticks: int


def _processes() -> dict[int, Process]:
    found: dict[int, Process] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return found  # not Linux: process groups have to do
    for name in names:
        if not name.isdigit():
            continue
        try:
            text = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it ended meanwhile
        fields = text[text.rindex(")") + 2 :].split()
        if fields[0] not in "ZX":
            found[int(name)] = Process(int(name), int(fields[1]), int(fields[19]))
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return {}  # ended meanwhile, or another user's
    pairs = (item.decode("utf-8", "replace").partition("=") for item in raw.split(b"\0"))
    return {key: value for key, _, value in pairs}


def find(matches: Callable[[dict[str, str]], bool]) -> set[Process]:
    """Return the processes whose environment matches, and all their descendants, without ourselves."""
    processes = _processes()
    found = {process for pid, process in processes.items() if matches(_environment(pid))}
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent_pid, []).append(process)
    frontier = list(found)
    while frontier:
        for child in children.get(frontier.pop().pid, ()):
            if child not in found:
                found.add(child)
                frontier.append(child)
    return {process for process in found if process.pid not in (os.getpid(), os.getppid())}


def of_run(run_id: str) -> Callable[[dict[str, str]], bool]:
    """Match the processes of one run."""
    return lambda environment: environment.get(RUN_ID) == run_id


def of_child(run_id: str, child: str) -> Callable[[dict[str, str]], bool]:
    """Match one supervised child of a run and what it started."""
    return lambda environment: environment.get(RUN_ID) == run_id and environment.get(CHILD) == child


def of_earlier_runs(run_directory: str) -> Callable[[dict[str, str]], bool]:
    """Match every run of this run directory; for a new supervisor that holds the lock and has no children yet."""
    return lambda environment: environment.get(RUN_ID, "").startswith(run_directory + "#")


def alive(victims: Iterable[Process]) -> set[Process]:
    """Return those that still run."""
    now = _processes()
    return {victim for victim in victims if (p := now.get(victim.pid)) and p.start_ticks == victim.start_ticks}


def kill(victims: Iterable[Process]) -> None:
    """SIGKILL each that still is the process we mean."""
    for victim in alive(victims):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(victim.pid, signal.SIGKILL)


def clear(matches: Callable[[dict[str, str]], bool], grace_s: float, deadline_s: float = 15.0) -> int:
    """Give the matching processes `grace_s` to end, then SIGKILL them. Blocks; returns how many are left."""
    start = time.monotonic()
    victims = find(matches)
    while True:
        victims = alive(victims) | find(matches)
        elapsed_s = time.monotonic() - start
        if not victims or elapsed_s > deadline_s:
            return len(victims)
        if elapsed_s >= grace_s:
            kill(victims)
        time.sleep(0.05)


def main() -> None:
    """Wait until the supervisor is gone, then clear its run."""
    run_id, grace_s = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    clear(of_run(run_id), grace_s)


if __name__ == "__main__":
    main()

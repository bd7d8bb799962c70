"""Who is struck, and how. Above: `run`. Below: the journeys' server, signals to its processes by their ids."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.journeys.server import Server

KINDS: dict[str, float] = {
    "kill a worker": 5,
    "freeze a worker": 2,
    "kill the orchestrator": 2,
    "kill a gateway": 2,
    "kill the raylet": 1,
    "kill the GCS": 1,
}
"""What happens, and how often in comparison."""


@dataclass
class Struck:
    """What was done.

    Attributes:
        gateways_s: when gateways were killed.
        frozen: pids of workers that were stopped; they are killed by the server, or let go in the end.
    """

    counts: Counter[str] = field(default_factory=Counter)
    gateways_s: list[float] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)


def strike(server: Server, chance: random.Random, struck: Struck) -> str:
    """Strike one process of the server; return what was done in words."""
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    pids = _targets(server)[kind]()
    if not pids:
        return f"{kind}: there is none"
    pid = chance.choice(pids)
    if kind == "kill a gateway":
        struck.gateways_s.append(time.monotonic())
    try:
        os.kill(pid, signal.SIGSTOP if kind == "freeze a worker" else signal.SIGKILL)
    except ProcessLookupError:
        return f"{kind}: it is gone already"
    if kind == "freeze a worker":
        struck.frozen.append(pid)
    struck.counts[kind] += 1
    return f"{kind}: {pid}"


def _targets(server: Server) -> dict[str, Callable[[], list[int]]]:
    return {
        "kill a worker": lambda: workers(server),
        "freeze a worker": lambda: workers(server),
        "kill the orchestrator": lambda: orchestrators(server),
        "kill a gateway": lambda: server.pids("-m", "gateway"),
        "kill the raylet": lambda: server.pids("raylet/raylet"),
        "kill the GCS": lambda: server.pids("gcs_server"),
    }


def workers(server: Server) -> list[int]:
    """Return the pids of worker processes: loading, serving, asleep, blank, or on their way out."""
    return server.pids("ray::WorkerActor")


def orchestrators(server: Server) -> list[int]:
    """Return the orchestrator's pid."""
    return [pid for pid in server.pids("-m", "orchestrator", "--run-dir") if pid not in server.pids("ray_head")]

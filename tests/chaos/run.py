"""The run: a server whose models do not all fit, clients, and somebody who kills and freezes its processes.

Above: `__main__` and the short form in the journeys. Below: `clients`, `faults`, the journeys' server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from tests.chaos import faults
from tests.chaos.clients import Verdicts, ask, wish
from tests.chaos.faults import Struck
from tests.journeys.server import Server, ServerFailed, Servers, wait_until

MODELS = ("one", "two", "three", "four", "five")
CONFIG = """\
models:
{models}
devices: [{{id: cpu0, budget: 200MiB}}, {{id: cpu1, budget: 100MiB}}]
gateways: 2
min_residency: 1s
max_wait: 5s
"""
CALM_WITHIN_S = 90.0
_RESET_SLACK_S = 1.0


@dataclass
class Outcome:
    """What came of it."""

    verdicts: Verdicts = field(default_factory=Verdicts)
    struck: Struck = field(default_factory=Struck)
    calm_after_s: float = 0.0
    further: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Everything that should not have been."""
        alone = [
            f"a connection broke off {began_s:.1f}-{ended_s:.1f} s, and no gateway was killed meanwhile"
            for began_s, ended_s in self.verdicts.resets_s
            if not any(began_s - _RESET_SLACK_S <= at_s <= ended_s for at_s in self.struck.gateways_s)
        ]
        return [*self.verdicts.faults, *alone, *self.further]


def chaos(
    *,
    num_requests: int,
    seed: int,
    num_clients: int = 16,
    every_s: tuple[float, float] = (3.0, 8.0),
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Send requests while processes are struck; then be calm, and look whether everything is as it should be."""
    entry = "  - {{name: {}, engine: scripted, kv_cache: 95MiB, max_running: 8}}"
    config = CONFIG.format(models="\n".join(entry.format(name) for name in MODELS))
    outcome = Outcome()
    servers = Servers()
    try:
        server = servers(config=config)
        asyncio.run(_storm(server, outcome, num_requests, num_clients, every_s, seed, say))
        _calm(server, outcome, say)
        server.stop()
        outcome.further += [f"did not end by itself: {line}" for line in server.leftovers]
        if outcome.faults:
            outcome.further += [f"{title}\n{text}" for title, text in server.log_sections() if "gateway" not in title]
    finally:
        servers.stop_all()
    return outcome


async def _storm(
    server: Server,
    outcome: Outcome,
    num_requests: int,
    num_clients: int,
    every_s: tuple[float, float],
    seed: int,
    say: Callable[[str], None],
) -> None:
    numbers = iter(range(num_requests))
    chance = random.Random(seed)

    async def client() -> None:
        limits = httpx.Limits(max_keepalive_connections=0)  # A connection kept to a dead gateway proves nothing.
        async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as http:
            for number in numbers:
                wished = wish(random.Random(seed * 1_000_003 + number), MODELS, number)
                end = await ask(http, wished, outcome.verdicts)
                if number % 1000 == 999:
                    say(f"    {number + 1} requests, {dict(outcome.verdicts.ends)}, {len(outcome.faults)} faults")
                # Who is refused or cut off comes back a little later, as clients do.
                await asyncio.sleep(chance.random() * (0.05 if end in ("served", "left") else 2.0))

    async def striker() -> None:
        while True:
            before = outcome.verdicts.ends["served"]
            await asyncio.sleep(chance.uniform(*every_s))
            # Most faults find a server that serves, however slow the machine is; some find one that recovers.
            while outcome.verdicts.ends["served"] < before + 5 and chance.random() > 0.02:
                await asyncio.sleep(0.25)
            say(await asyncio.to_thread(faults.strike, server, chance, outcome.struck))

    striking = asyncio.create_task(striker())
    await asyncio.gather(*(client() for _ in range(num_clients)))
    striking.cancel()
    await asyncio.gather(striking, return_exceptions=True)


def _calm(server: Server, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Every model answers again, and every worker process is one that the server knows."""
    for pid in outcome.struck.frozen:  # Those that it has not killed were blank, or not ours any more.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    began_s = time.monotonic()
    for model in MODELS:
        try:
            wait_until(lambda model=model: _answers(server, model), CALM_WITHIN_S, f"{model} answers again", 0.2)
        except ServerFailed as error:
            outcome.further.append(str(error))
    outcome.calm_after_s = time.monotonic() - began_s
    say(f"every model answered {outcome.calm_after_s:.1f} s after the last fault")
    try:
        wait_until(lambda: not _unknown(server), CALM_WITHIN_S, "no worker that nobody knows", 0.5)
    except ServerFailed as error:
        outcome.further.append(f"{error}: {_unknown(server)}")


def _answers(server: Server, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "there?"}]}
    try:
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).is_success
    except httpx.HTTPError:
        return False


def _unknown(server: Server) -> list[int]:
    """Return worker processes that are neither a replica nor counted as a blank one."""
    said = server.hostler("ps", "--json")
    try:
        status = json.loads(said.stdout)
    except ValueError:
        return faults.workers(server) or [0]
    known = {int(replica["pid"]) for replica in status["replicas"]}
    strangers = [pid for pid in faults.workers(server) if pid not in known]
    num_blank = sum(int(node["num_blank_workers"]) for node in status["nodes"])
    return strangers if len(strangers) > num_blank else []

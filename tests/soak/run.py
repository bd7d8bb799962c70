"""The run: a server on two virtual devices that hold three of five models, a random trace against it, a verdict.

Above: `__main__` and the short form in the tests. Below: the journeys' server, `trace`, `observe`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.journeys.server import Server, Servers
from tests.soak.observe import Observed, count_events, observe
from tests.soak.trace import Arrival, make_trace

MAX_TOKENS = 12
PROMPTS = (
    "Say hello.",
    "Name three rivers and what grows beside them.",
    "What is a lighthouse for?",
    "Count to five, slowly.",
)
_WITHIN_S = 300.0
_KV_CACHE = "24MiB"


@dataclass
class Outcome:
    """What came of the trace."""

    num_requests: int = 0
    failures: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    observed: Observed = field(default_factory=Observed)
    took_s: float = 0.0
    budgets: dict[str, int] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Everything that should not have been."""
        return [*self.failures, *self.observed.faults]


def config_text(models: Mapping[str, Path], budgets: Mapping[str, int], sleep: str) -> str:
    """Return the text of a hostler.yaml."""
    entries = [
        f"  - {{name: {name}, source: {path}, kv_cache: {_KV_CACHE}, max_running: 4, num_threads: 1}}"
        for name, path in models.items()
    ]
    devices = ", ".join(f"{{id: '{name}', budget: {num_bytes}}}" for name, num_bytes in budgets.items())
    rest = [f"devices: [{devices}]", f"sleep_memory: {sleep}", "min_residency: 1s", "max_wait: 10s", "gateways: 1"]
    return "\n".join(["models:", *entries, *rest, ""])


def needs(models: Mapping[str, Path]) -> dict[str, int]:
    """Return what each model needs, as the server itself plans it."""
    servers = Servers()
    try:
        server = servers(config=config_text(models, {"cpu0": 64 * 2**30}, "0"))
        found = {}
        for name in models:
            plan = json.loads(server.hostler("plan", name, "--json").stdout)
            found[name] = int(plan["needed_bytes"])
        return found
    finally:
        servers.stop_all()


def budgets_for_three(needed: Mapping[str, int]) -> dict[str, int]:
    """Return two devices: one holds the largest model, or two others; the other one holds one of the others."""
    largest, second, *_ = sorted(needed.values(), reverse=True)
    return {"cpu0": int(1.02 * max(largest, 2 * second)), "cpu1": int(1.02 * second)}


def body(model: str, prompt: str, *, stream: bool) -> dict[str, Any]:
    """Return a greedy request, so that each model has one right answer to it."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": stream,
    }


async def ask(client: httpx.AsyncClient, model: str, prompt: str, *, stream: bool) -> tuple[str, str]:
    """Return the model that answered, as the reply says, and the text.

    Raises:
        RuntimeError: anything but a whole reply.
    """
    response = await client.post("/v1/chat/completions", json=body(model, prompt, stream=stream))
    if response.status_code != 200:
        raise RuntimeError(f"{model}: HTTP {response.status_code}: {response.text[:300]}")
    if not stream:
        document = response.json()
        return document["model"], document["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if lines[-1:] != ["[DONE]"]:
        raise RuntimeError(f"{model}: the stream ended with {lines[-1:]}")
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return chunks[0]["model"], text


async def expected_replies(client: httpx.AsyncClient, models: Mapping[str, Path]) -> dict[tuple[str, int], str]:
    """Return each model's answer to each prompt, asked one at a time.

    Raises:
        RuntimeError: two models give the same answers, so that a mix-up could not be seen.
    """
    found = {}
    for name in models:
        for number, prompt in enumerate(PROMPTS):
            _, found[name, number] = await ask(client, name, prompt, stream=False)
    for name in models:
        for other in models:
            if name < other and all(found[name, n] == found[other, n] for n in range(len(PROMPTS))):
                raise RuntimeError(f"{name} and {other} cannot be told apart")
    return found


async def replay(
    server: Server, models: Mapping[str, Path], trace: list[Arrival], outcome: Outcome, say: Callable[[str], None]
) -> None:
    """Send every request at its time and judge each reply."""
    target = f"unix:{server.run_dir / 'orchestrator.sock'}"
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=_WITHIN_S, limits=limits) as client:
        expected = await expected_replies(client, models)
        looking = asyncio.create_task(observe(target, outcome.observed))
        began_s = time.monotonic()

        async def one(arrival: Arrival) -> None:
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.monotonic()))
            sent_s = time.monotonic()
            try:
                name, text = await ask(client, arrival.model, PROMPTS[arrival.prompt], stream=arrival.stream)
            except (RuntimeError, httpx.HTTPError, json.JSONDecodeError, KeyError) as error:
                outcome.failures.append(f"at {sent_s - began_s:.1f} s: {type(error).__name__}: {error}")
                return
            outcome.waits_s.append(time.monotonic() - sent_s)
            if name != arrival.model or text != expected[arrival.model, arrival.prompt]:
                outcome.failures.append(f"{arrival.model} answered as {name}: {text!r}")

        tasks = [asyncio.create_task(one(arrival)) for arrival in trace]
        try:
            for number, task in enumerate(tasks):
                await task
                if number % 200 == 199:
                    say(f"    {number + 1} of {len(trace)} requests, {len(outcome.faults)} faults")
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        if not looking.cancelled() and (error := looking.exception()) is not None:
            outcome.observed.faults.append(f"the server could not be watched: {error}")
        outcome.took_s = time.monotonic() - began_s
        await count_events(target, outcome.observed)


def soak(
    models: Mapping[str, Path],
    *,
    num_requests: int,
    duration_s: float,
    seed: int,
    sleep: str = "2GiB",
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run the whole thing.

    Args:
        models: by public name.
        duration_s: over which the requests arrive.
        sleep: host memory for sleeping models.
    """
    budgets = budgets_for_three(needs(models))
    say(f"budgets: {', '.join(f'{name} {num_bytes / 2**20:.0f} MiB' for name, num_bytes in budgets.items())}")
    names = list(models)
    random.Random(seed).shuffle(names)
    trace = make_trace(names, num_requests, duration_s, len(PROMPTS), seed)
    outcome = Outcome(num_requests=num_requests, budgets=budgets)
    servers = Servers()
    try:
        server = servers(config=config_text(models, budgets, sleep))
        asyncio.run(replay(server, models, trace, outcome, say))
    finally:
        servers.stop_all()
    return outcome

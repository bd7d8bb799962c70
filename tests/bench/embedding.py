"""What company is worth to embeddings: `python -m tests.bench.embedding [--rounds N]`.

Above: people. Below: a served all-MiniLM-L6-v2 over HTTP. Each round embeds 64 single texts, one request after another,
then 64 others, all requests at once; connections are there already in both cases. Texts are of one sentence.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

import httpx
import uvloop
from rich.console import Console

from tests.journeys.server import Servers
from tests.models.real import EMBEDDING_MODEL, pulled

REQUESTS = 64
GOAL = 4.0
_CONFIG = f"models:\n  - name: {EMBEDDING_MODEL}\n    preload: true\n"


def text(number: int) -> str:
    """Return a sentence that no other number gives."""
    return f"Entry {number}: the keeper of the light noted wind, cloud and {number * 7 % 89} ships before breakfast."


async def embed(client: httpx.AsyncClient, number: int) -> None:
    """Embed one sentence."""
    reply = await client.post("/v1/embeddings", json={"model": EMBEDDING_MODEL, "input": text(number)})
    reply.raise_for_status()


async def measure(url: str, rounds: int) -> list[tuple[float, float]]:
    """Return for each round the requests a second: one after the other, all at once."""
    limits = httpx.Limits(max_connections=REQUESTS, max_keepalive_connections=REQUESTS)
    found = []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        await asyncio.gather(*(embed(client, -number) for number in range(1, REQUESTS + 1)))
        for first in range(0, 2 * rounds * REQUESTS, 2 * REQUESTS):
            began = time.perf_counter()
            for number in range(first, first + REQUESTS):
                await embed(client, number)
            apart_s = time.perf_counter() - began
            began = time.perf_counter()
            await asyncio.gather(*(embed(client, number) for number in range(first + REQUESTS, first + 2 * REQUESTS)))
            found.append((REQUESTS / apart_s, REQUESTS / (time.perf_counter() - began)))
    return found


def main() -> int:
    """Measure, print; fail when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    pulled(EMBEDDING_MODEL)
    servers = Servers()
    try:
        found = uvloop.run(measure(servers(config=_CONFIG, ready_within_s=240).url, rounds))
    finally:
        servers.stop_all()
    apart, together = (statistics.median(values) for values in zip(*found, strict=True))
    gain = statistics.median(many / one for one, many in found)
    mark = "✓" if gain >= GOAL else "✗"
    console = Console(highlight=False)
    console.print(f"{REQUESTS} texts, medians of {rounds}: one after the other {apart:.0f}/s, at once {together:.0f}/s")
    console.print(f"{mark} at once: {gain:.1f}× (goal at least {GOAL:g}×)")
    return 0 if gain >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

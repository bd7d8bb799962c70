"""What company is worth to embeddings: `python -m tests.bench.embedding [--rounds N]`.

Above: people. Below: a served all-MiniLM-L6-v2 over HTTP. Each round embeds single texts for one caller, then for 64 at
once, each of whom sends its next text as soon as it has its answer. Connections are there already in both cases. The
client is as light as can be, for it takes its share of the same cores. Texts are of one sentence.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import orjson
import uvloop
from rich.console import Console

from tests.journeys.server import Servers
from tests.models.real import EMBEDDING_MODEL, pulled

CALLERS = 64
TEXTS_ALONE = 64
TEXTS_OF_EACH = 4
GOAL = 4.0
_CONFIG = f"models:\n  - name: {EMBEDDING_MODEL}\n    preload: true\n"
_LENGTH = b"\r\ncontent-length:"


def text(number: int) -> str:
    """Return a sentence that no other number gives."""
    return f"Entry {number}: the keeper of the light noted wind, cloud and {number * 7 % 89} ships before breakfast."


class Caller:
    """One kept connection."""

    def __init__(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connected(cls, url: str) -> Caller:
        """Connect to a server."""
        address = urlsplit(url)
        return cls(address.netloc, *await asyncio.open_connection(address.hostname, address.port))

    async def embed(self, texts: Iterator[str]) -> None:
        """Embed each text once the one before is answered.

        Raises:
            RuntimeError: a reply that is no vector.
        """
        for wanted in texts:
            body = orjson.dumps({"model": EMBEDDING_MODEL, "input": wanted})
            self._writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            reply = await self._reader.readexactly(int(head.split(_LENGTH)[1].split(b"\r\n")[0]))
            if not head.startswith(b"http/1.1 200 ") or b'"embedding":[' not in reply:
                raise RuntimeError(f"no vector: {reply[:300]!r}")

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


async def measure(url: str, rounds: int) -> list[tuple[float, float]]:
    """Return for each round the texts a second: of one caller, of all at once."""
    texts = map(text, itertools.count())
    callers = [await Caller.connected(url) for _ in range(CALLERS)]

    async def all_at_once() -> None:
        await asyncio.gather(*(caller.embed(itertools.islice(texts, TEXTS_OF_EACH)) for caller in callers))

    await all_at_once()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        await callers[0].embed(itertools.islice(texts, TEXTS_ALONE))
        alone_s = time.perf_counter() - began
        began = time.perf_counter()
        await all_at_once()
        found.append((TEXTS_ALONE / alone_s, CALLERS * TEXTS_OF_EACH / (time.perf_counter() - began)))
    for caller in callers:
        caller.close()
    return found


def main() -> int:
    """Measure, print; fail when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    pulled(EMBEDDING_MODEL)
    servers = Servers()
    try:
        found = uvloop.run(measure(servers(config=_CONFIG, ready_within_s=240).url, rounds))
    finally:
        servers.stop_all()
    alone, together = (statistics.median(values) for values in zip(*found, strict=True))
    gains = sorted(many / one for one, many in found)
    gain = statistics.median(gains)
    mark = "✓" if gain >= GOAL else "✗"
    console = Console(highlight=False)
    console.print(f"medians of {rounds}: one caller {alone:.0f} texts a second, {CALLERS} at once {together:.0f}")
    console.print(f"{mark} at once {gain:.1f}×, {gains[0]:.1f} to {gains[-1]:.1f} (goal at least {GOAL:g}×)")
    return 0 if gain >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

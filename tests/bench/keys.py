"""What keys cost a request, and how soon a wrong one is turned away.

    python -m tests.bench.keys [--keys N]

Above: a reader at a terminal. Below: `gateway.keys`, and a whole gateway on a loopback port. The first two figures are
the best of several runs without sockets, in µs a request. The others are ms from the first byte sent to the first byte
of the 401, over TCP, each time on a connection of its own, the body of 100 MB never sent.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import multiprocessing
import select
import socket
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hostler.keys import KeyFile

from gateway.keys.limits import KeyLimits
from gateway.keys.ring import KeyRing
from tests.gateway.fakes import world

RUNS, REQUESTS = 7, 2000
AMPLE = 10**6
REFUSALS = 100
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\nAuthorization: Bearer "
WRONG = {
    "1 MB": b"k" * 10**6,
    "15 KB": b"k" * 15_000,
    "NUL": b"a\0b",
    "not ASCII": "schlüssel".encode(),
    "SQL": b"x' OR '1'='1",
}


def best_us(request: Callable[[], object]) -> float:
    """Return the time of one call in µs."""
    return min(timeit.repeat(request, number=REQUESTS, repeat=RUNS)) / REQUESTS * 1e6


def refusal_ms(port: int, key: bytes) -> float:
    """Return how long a wrong key waits for its answer."""
    data = memoryview(HEAD + key + b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setblocking(False)
        began = time.perf_counter()
        while True:
            answered, may_send, _ = select.select([connection], [connection] if data else [], [], 5)
            if answered:
                took = (time.perf_counter() - began) * 1e3
                answer = connection.recv(64)
                if b" 401 " not in answer:
                    raise SystemExit(f"not refused: {answer!r}")
                return took
            if not may_send:
                raise SystemExit("no answer within 5 s")
            data = data[connection.send(data) :]


def refusals_ms(port: int, key: bytes) -> list[float]:
    """Return how long each of `REFUSALS` wrong keys waits."""
    return [refusal_ms(port, key) for _ in range(REFUSALS)]


async def print_refusals(keys_file: Path) -> None:
    """Serve, and have every kind of wrong key turned away."""
    loop, spawn = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as client:  # in the gateway's process it would wait for the interpreter, too
        async with world(config={"keys_file": keys_file, "require_key": True}) as here:
            gc.collect()
            gc.freeze()  # as the gateway does before it serves
            port = int(here.url.rpartition(":")[2])
            for name, key in WRONG.items():
                took = await loop.run_in_executor(client, refusals_ms, port, key)
                print(f"a wrong key ({name}): 401 after {statistics.median(took):.2f} ms, at most {max(took):.2f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100, help="in the key file (default 100)")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # which has a line for each wrong key with a NUL
    num_keys = parser.parse_args().keys
    with tempfile.TemporaryDirectory() as place:
        file = KeyFile(Path(place) / "keys.json")
        for number in range(num_keys):
            key, text = file.add(
                f"key-{number}", requests_per_minute=AMPLE, tokens_per_minute=AMPLE * 1000, max_streams=100
            )
        ring = KeyRing(None, file.path, demands=True)
        limits = KeyLimits(Path(place) / "limits")
        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer " + text.encode())]

        def keep_account() -> None:
            limits.enter(key)
            limits.charge(key, 1)
            limits.leave(key)

        print(f"finding the caller among {num_keys} keys: {best_us(lambda: ring.caller(headers)):.1f} µs")
        print(f"a limited key's account: {best_us(keep_account):.1f} µs")
        limits.close()
        asyncio.run(print_refusals(file.path))


if __name__ == "__main__":
    main()

"""What keys cost a request, without sockets: finding the caller, and keeping a limited key's account.

    python -m tests.bench.keys [--keys N]

Above: a reader at a terminal. Below: `gateway.keys`. Each figure is the best of several runs, in µs a request.
"""

from __future__ import annotations

import argparse
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

from hostler.keys import KeyFile

from gateway.keys.limits import KeyLimits
from gateway.keys.ring import KeyRing

RUNS, REQUESTS = 7, 2000
AMPLE = 10**6


def best_us(request: Callable[[], object]) -> float:
    """Return the time of one call in µs."""
    return min(timeit.repeat(request, number=REQUESTS, repeat=RUNS)) / REQUESTS * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100, help="in the key file (default 100)")
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


if __name__ == "__main__":
    main()

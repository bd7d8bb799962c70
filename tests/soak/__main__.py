"""`make soak`: 2,000 requests for five models on two devices that hold three. `--minutes`, `--requests`, `--seed`."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from tests.models import real, tiny
from tests.soak.run import soak

ARCHITECTURES = 4


def models() -> dict[str, Path]:
    """Return five models: four tiny ones of different architectures and the real default one."""
    names = sorted(tiny.ARCHITECTURES)[:ARCHITECTURES]
    return {f"tiny-{name}": tiny.tiny_model(name) for name in names} | {"smollm2": real.smollm2()}


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=8.0, help="over which they arrive (default 8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sleep", default="2GiB", help="host memory for sleeping models; 0: none sleeps")
    chosen = parser.parse_args()
    outcome = soak(
        models(),
        num_requests=chosen.requests,
        duration_s=chosen.minutes * 60,
        seed=chosen.seed,
        sleep=chosen.sleep,
        say=lambda text: print(text, flush=True),
    )
    seen, waits = outcome.observed, sorted(outcome.waits_s) or [0.0]
    print(f"{outcome.num_requests} requests in {outcome.took_s:.0f} s, {len(outcome.failures)} failed")
    print(f"waits: median {statistics.median(waits):.2f} s, p99 {waits[int(0.99 * (len(waits) - 1))]:.2f} s")
    print(f"fullest device: {seen.fullest:.1%} of its budget in {seen.num_looks} looks")
    print(
        f"memory against what was given, {seen.num_measured} times: {seen.worst_first:.1%} off at most in first loads, "
        f"{seen.worst_later:.1%} in later ones"
    )
    print(f"events: {', '.join(f'{kind} {number}' for kind, number in sorted(seen.kinds.items()))}")
    for fault in outcome.faults[:40]:
        print(f"FAULT {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make chaos`: clients check every byte while workers, gateways, the orchestrator and Ray are killed and frozen."""

from __future__ import annotations

import argparse
import statistics
import sys

from tests.chaos.run import chaos


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, nargs=2, default=(3.0, 8.0), metavar="S", help="a fault every S to S s")
    chosen = parser.parse_args()
    outcome = chaos(
        num_requests=chosen.requests,
        seed=chosen.seed,
        num_clients=chosen.clients,
        every_s=tuple(chosen.every),
        say=lambda text: print(text, flush=True),
    )
    waits = sorted(outcome.verdicts.waits_s) or [0.0]
    print(f"struck: {', '.join(f'{kind} {number}' for kind, number in outcome.struck.counts.items())}")
    print(f"requests: {', '.join(f'{end} {number}' for end, number in outcome.verdicts.ends.items())}")
    print(f"first byte: median {statistics.median(waits):.2f} s, p99 {waits[int(0.99 * (len(waits) - 1))]:.2f} s")
    print(f"every model answered {outcome.calm_after_s:.1f} s after the last fault")
    for fault in outcome.faults[:60]:
        print(f"FAULT {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())

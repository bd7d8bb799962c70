"""`make prove`: the scheduler through a million random steps. `--steps`, `--seed`; a failing run is told by number."""

from __future__ import annotations

import argparse
import sys
import time

from .shrink import carry_out, run_of, shrink

STEPS_PER_RUN = 60
_TELL_EVERY_S = 20.0


def main() -> int:
    """Run, tell, and show the first failure made short."""
    parser = argparse.ArgumentParser(prog="make prove", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, to go on from")
    chosen = parser.parse_args()
    began_s = told_s = time.monotonic()
    num_steps, num_events, number = 0, 0, chosen.first
    while num_steps < chosen.steps:
        run = run_of(chosen.seed, number, STEPS_PER_RUN)
        outcome = carry_out(run)
        num_steps, num_events = num_steps + outcome.num_steps, num_events + outcome.num_events
        if outcome.breach is not None:
            print(f"run {number} of seed {chosen.seed}: {outcome.breach}")
            print("\n".join(carry_out(shrink(run, outcome.breach), trace=True).trace[-80:]))
            return 1
        number += 1
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            print(
                f"{num_steps:,} steps, {num_events:,} events, {num_steps / (told_s - began_s):.0f} steps/s", flush=True
            )
    print(f"{num_steps:,} steps, {num_events:,} events, nothing broken, {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

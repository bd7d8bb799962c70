"""Runs from seeds, and a failing run made short: the fewest steps that still break the same invariant.

Above it: the tests and `make prove`. Below it: the walk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .callers import Breach
from .walk import Walk


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a shape by its number, the seed of each step, and whether the world comes to rest in the end."""

    shape: int
    seeds: tuple[int, ...]
    rests: bool = True


def run_of(seed: int, number: int, num_steps: int) -> Run:
    """Return the run of this number under a seed."""
    chance = random.Random(f"{seed}/{number}")
    return Run(number, tuple(chance.getrandbits(32) for _ in range(num_steps)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: what broke, if anything, and after how many steps and events."""

    breach: Breach | None
    num_steps: int
    num_events: int
    trace: tuple[str, ...] = ()


def carry_out(run: Run, trace: bool = False) -> Outcome:
    """Carry a run out until it ends or an invariant breaks."""
    walk, num_steps, breach = Walk(run.shape, trace), 0, None
    try:
        for seed in run.seeds:
            num_steps += 1
            walk.step(seed)
        if run.rests:
            walk.rest()
    except Breach as found:
        breach = found
    finally:
        walk.close()
    return Outcome(breach, num_steps, walk.truth.num_events, tuple(walk.world.trace or ()))


def shrink(run: Run, breach: Breach, max_runs: int = 600) -> Run:
    """Return a shorter run that breaks the same invariant: pieces are left out, ever smaller ones, while it does."""
    num_runs = 0

    def still_breaks(candidate: Run) -> bool:
        nonlocal num_runs
        num_runs += 1
        found = carry_out(candidate).breach
        return found is not None and found.invariant == breach.invariant

    if run.rests and still_breaks(replace(run, rests=False)):
        run = replace(run, rests=False)
    run = replace(run, seeds=run.seeds[: carry_out(run).num_steps])
    size = max(1, len(run.seeds) // 2)
    while num_runs < max_runs:
        shorter = _without_a_piece(run, size, still_breaks, max_runs - num_runs)
        if shorter is not None:
            run = shorter
        elif size == 1:
            break
        else:
            size = max(1, size // 2)
    return run


def _without_a_piece(run: Run, size: int, still_breaks, max_runs: int) -> Run | None:  # type: ignore[no-untyped-def]
    found = None
    start = len(run.seeds)
    while start > 0 and max_runs > 0:
        start -= size
        candidate = replace(run, seeds=_cut(run.seeds, max(0, start), size))
        max_runs -= 1
        if candidate.seeds != run.seeds and still_breaks(candidate):
            run = found = candidate
    return found


def _cut(seeds: Sequence[int], start: int, size: int) -> tuple[int, ...]:
    return (*seeds[:start], *seeds[start + size :])

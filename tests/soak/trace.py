"""A random trace of requests: who wants which model, when. Pure.

Above: the run. Below: nothing. Popularity follows Zipf's law and turns round in the middle; arrivals come in bursts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

BURST_SHARE = 0.3
BURST_LENGTH = 6
BURST_GAP_S = 0.05


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, which model it wants, which of the prompts it asks, and whether it streams."""

    at_s: float
    model: str
    prompt: int
    stream: bool


def make_trace(
    models: Sequence[str], num_requests: int, duration_s: float, num_prompts: int, seed: int
) -> list[Arrival]:
    """Return `num_requests` arrivals over about `duration_s`, in order."""
    chance = random.Random(seed)
    shares = [1 / (rank + 1) for rank in range(len(models))]
    mean_gap_s = duration_s / num_requests
    arrivals: list[Arrival] = []
    now_s, burst_left, burst_model = 0.0, 0, ""
    while len(arrivals) < num_requests:
        half = 2 * len(arrivals) >= num_requests
        ranked = list(reversed(models)) if half else list(models)
        if burst_left:
            burst_left -= 1
            now_s += BURST_GAP_S
            model = burst_model
        else:
            now_s += chance.expovariate(1 / mean_gap_s) * (1 + BURST_SHARE)
            model = chance.choices(ranked, shares)[0]
            if chance.random() < BURST_SHARE / BURST_LENGTH:
                burst_left, burst_model = BURST_LENGTH, model
        arrivals.append(Arrival(now_s, model, chance.randrange(num_prompts), chance.random() < 0.5))
    return arrivals

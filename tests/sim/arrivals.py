"""How requests come, in the manner of real ones: people talk in sessions, days have nights, bursts come in bursts.

Above it: the catalog. Below it: `traces.py`. All chance comes from the generator that is handed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from .traces import Asked, Served

SIZES_GB = (0.5, 1.0, 1.5, 2.5, 3.2, 4.1, 5.5, 7.6, 8.5, 13.5, 15.2, 16.1, 20.0, 28.0, 36.0, 48.0, 65.0, 70.0)
"""Files as they are: from an embedding model to 70 billion weights in eight bits."""


def served(chance: random.Random, num_models: int, largest_gb: float, smallest_gb: float = 0.5) -> tuple[Served, ...]:
    """Return models with sizes drawn from those that files have; popularity is by position, sizes are not."""
    sizes = [size for size in SIZES_GB if smallest_gb <= size <= largest_gb]
    drawn = [sizes[i % len(sizes)] for i in range(num_models)]
    chance.shuffle(drawn)
    return tuple(Served(f"m{i:02d}-{size:g}", size) for i, size in enumerate(drawn))


def zipf(num_models: int, exponent: float) -> list[float]:
    """Return weights by rank (Breslau 1999 found exponents of 0.6 to 0.9 for the web; models are more skewed)."""
    return [1.0 / (rank + 1) ** exponent for rank in range(num_models)]


def runs_s(chance: random.Random, median_s: float = 4.0) -> float:
    """Return how long an answer takes: lognormal, with a long tail, a minute at most."""
    return min(60.0, chance.lognormvariate(math.log(median_s), 0.8))


def session(
    chance: random.Random, at_s: float, model: str, turns: float = 4.0, think_s: float = 25.0
) -> Iterator[Asked]:
    """Yield one conversation: some turns, with time to read and think between them."""
    while True:
        took_s = runs_s(chance)
        yield Asked(at_s, model, took_s)
        if chance.random() < 1.0 / turns:
            return
        at_s += took_s + chance.lognormvariate(math.log(think_s), 0.7)


def poisson(
    chance: random.Random, per_s: Callable[[float], float], most_per_s: float, until_s: float
) -> Iterator[float]:
    """Yield the moments of an inhomogeneous Poisson process, by thinning (Lewis and Shedler 1979)."""
    at_s = 0.0
    while (at_s := at_s + chance.expovariate(most_per_s)) < until_s:
        if chance.random() * most_per_s < per_s(at_s):
            yield at_s


def sessions(
    chance: random.Random,
    models: Sequence[Served],
    weights: Callable[[float], Sequence[float]],
    per_s: float,
    until_s: float,
    rate: Callable[[float], float] = lambda at_s: 1.0,
    **kind: float,
) -> Iterator[Asked]:
    """Yield conversations, each with a model drawn by the weights of its moment; `rate` says how busy it is, 0 to 1."""
    for at_s in poisson(chance, lambda s: per_s * rate(s), per_s, until_s):
        (model,) = chance.choices(models, weights(at_s))
        yield from session(chance, at_s, model.name, **kind)


def on_off(
    chance: random.Random, model: str, per_s: float, on_s: float, off_s: float, until_s: float
) -> Iterator[Asked]:
    """Yield a Markov-modulated Poisson process: bursts of mean length `on_s`, silences of mean length `off_s`."""
    at_s = chance.expovariate(1.0 / off_s)
    while at_s < until_s:
        end_s = min(until_s, at_s + chance.expovariate(1.0 / on_s))
        while (at_s := at_s + chance.expovariate(per_s)) < end_s:
            yield Asked(at_s, model, runs_s(chance))
        at_s = end_s + chance.expovariate(1.0 / off_s)


def in_order(asked: Iterable[Asked], most: int) -> tuple[Asked, ...]:
    """Return requests in the order in which they come, the first so many."""
    return tuple(sorted(asked, key=lambda one: (one.at_s, one.model))[:most])

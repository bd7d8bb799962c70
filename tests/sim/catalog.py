"""The traces, each with why it is there. Generated from a seed; the same for the same seed.

Above it: `__main__.py`, the tests. Below it: `arrivals.py`. A new one: a function and its place in `CATALOG`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

from .arrivals import in_order, on_off, runs_s, served, sessions, zipf
from .traces import Asked, Served, Trace

HOUR_S = 3600.0
NUM_ASKED = 3000


def workstation(chance: random.Random) -> Trace:
    """One 24 GB card, a dozen models, people in sessions."""
    models = served(chance, 12, 16.1)
    weights = zipf(12, 0.9)
    asked = sessions(chance, models, lambda s: weights, 1 / 60, 30 * HOUR_S)
    says = "12 models, Zipf 0.9, sessions"
    return Trace("workstation", says, (24,), 64, models, in_order(asked, NUM_ASKED))


def team(chance: random.Random) -> Trace:
    """A team's server: forty models on four 48 GB cards."""
    models = served(chance, 40, 36.0)
    weights = zipf(40, 0.8)
    asked = sessions(chance, models, lambda s: weights, 1 / 30, 20 * HOUR_S)
    says = "40 models, Zipf 0.8, sessions"
    return Trace("team", says, (48,) * 4, 256, models, in_order(asked, NUM_ASKED))


def house(chance: random.Random) -> Trace:
    """A large house: a hundred models to 70 GB on eight 80 GB cards."""
    models = served(chance, 100, 70.0)
    weights = zipf(100, 0.8)
    asked = sessions(chance, models, lambda s: weights, 1 / 20, 20 * HOUR_S)
    says = "100 models, Zipf 0.8, sessions"
    return Trace("house", says, (80,) * 8, 512, models, in_order(asked, NUM_ASKED))


def diurnal(chance: random.Random) -> Trace:
    """Days and nights: people by day, other models' jobs by night."""
    models = served(chance, 30, 48.0)
    day, night = zipf(15, 0.9) + [0.02] * 15, [0.02] * 15 + zipf(15, 0.9)

    def light(at_s: float) -> float:
        return 0.5 + 0.5 * math.sin(2 * math.pi * at_s / (24 * HOUR_S))

    def weights(at_s: float) -> list[float]:
        share = light(at_s)
        return [share * d + (1 - share) * n for d, n in zip(day, night, strict=True)]

    asked = sessions(chance, models, weights, 1 / 120, 72 * HOUR_S, lambda s: 0.15 + 0.85 * light(s))
    says = "30 models; other ones by day than by night, 3 days"
    return Trace("diurnal", says, (80, 80), 192, models, in_order(asked, NUM_ASKED))


def bursty(chance: random.Random) -> Trace:
    """Each model in bursts of its own, silent between them."""
    models = served(chance, 24, 20.0)
    asked: list[Asked] = []
    for rank, model in enumerate(models):
        asked += on_off(chance, model.name, 0.1, 120.0, 600.0 * (1 + rank / 2), 20 * HOUR_S)
    says = "24 models, each in bursts (Markov-modulated)"
    return Trace("bursty", says, (24,) * 4, 128, models, in_order(asked, NUM_ASKED))


def thrash(chance: random.Random) -> Trace:
    """A-B-A-C: one that is asked for every other time, the rest in turn; no two of them fit together."""
    models = (Served("a", 13.5), *(Served(name, 14.0) for name in "bcde"))

    def turns() -> Iterator[Asked]:
        at_s = 0.0
        for turn in range(NUM_ASKED // 2):
            at_s += chance.expovariate(1 / 6.0)
            yield Asked(at_s, "a" if turn % 2 == 0 else "bcde"[turn // 2 % 4], runs_s(chance, 1.5))

    return Trace(
        "thrash", "A-B-A-C-A-D…, only one fits, one every 6 s", (24,), 64, models, in_order(turns(), NUM_ASKED)
    )


def scan(chance: random.Random) -> Trace:
    """A few that people use, and now and then one pass over everything there is: an evaluation, a crawler."""
    models = served(chance, 50, 28.0)
    weights = zipf(10, 0.8) + [0.0] * 40
    asked = list(sessions(chance, models, lambda s: weights, 1 / 90, 24 * HOUR_S))
    for start in range(1, 24, 3):
        for index, model in enumerate(models):
            asked.append(Asked(start * HOUR_S + index * 12.0 + chance.random(), model.name, runs_s(chance, 2.0)))
    return Trace(
        "scan", "10 hot models; every 3 h one pass over all 50", (48, 48), 128, models, in_order(asked, NUM_ASKED)
    )


def agents(chance: random.Random) -> Trace:
    """Agents: embed, rerank, then several chat calls, with another chat model for each kind of agent."""
    small = (Served("embed-a", 0.7), Served("embed-b", 1.3), Served("rerank", 1.1), Served("rerank-b", 2.3))
    chats = served(chance, 10, 16.1, 5.5)
    asked: list[Asked] = []
    weights, at_s = zipf(10, 0.9), 0.0
    while len(asked) < NUM_ASKED:
        at_s += chance.expovariate(1 / 50.0)
        (chat,) = chance.choices(chats, weights)
        step_s = at_s
        for _ in range(1 + int(chance.expovariate(1 / 3.0))):
            pair = 0 if chance.random() < 0.7 else 1
            for tool in (small[pair], small[2 + pair]):
                took_s = 0.05 + 0.2 * chance.random()
                asked.append(Asked(step_s, tool.name, took_s))
                step_s += took_s + 0.05
            took_s = runs_s(chance, 6.0)
            asked.append(Asked(step_s, chat.name, took_s))
            step_s += took_s + chance.expovariate(1 / 3.0)
    return Trace(
        "agents",
        "embed, rerank, chat in turn; 10 chat models",
        (24, 24),
        96,
        (*small, *chats),
        in_order(asked, NUM_ASKED),
    )


def shifting(chance: random.Random) -> Trace:
    """What is popular changes: each hour the ranks move on by three."""
    models = served(chance, 40, 48.0)
    base = zipf(40, 1.1)

    def weights(at_s: float) -> list[float]:
        moved = 3 * int(at_s / HOUR_S) % 40
        return base[-moved:] + base[:-moved] if moved else base

    asked = sessions(chance, models, weights, 1 / 35, 20 * HOUR_S)
    return Trace(
        "shifting", "40 models, Zipf 1.1, ranks move on every hour", (80, 80), 192, models, in_order(asked, NUM_ASKED)
    )


def giant(chance: random.Random) -> Trace:
    """One model that fills the card, now and then, among many small ones."""
    models = (Served("giant", 70.0), *served(chance, 24, 15.2))
    weights = [1.2, *zipf(24, 0.8)]
    asked = sessions(chance, models, lambda s: weights, 1 / 60, 40 * HOUR_S)
    return Trace(
        "giant", "70 GB on one 80 GB card, among 24 small ones", (80,), 128, models, in_order(asked, NUM_ASKED)
    )


CATALOG: tuple[Callable[[random.Random], Trace], ...] = (
    workstation, team, house, diurnal, bursty, thrash, scan, agents, shifting, giant,
)  # fmt: skip


def make(which: Callable[[random.Random], Trace], seed: int) -> Trace:
    """Return a trace as its seed has it."""
    return which(random.Random(f"{which.__name__}-{seed}"))

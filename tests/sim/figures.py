"""What is measured of each trace, over all its seeds, and whether the goal is met. Pure but for the running.

Above it: `__main__.py`, the tests. Below it: the world, the strategies, the bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .bound import least_reload_s
from .catalog import make
from .ollama import OllamaWorld
from .strategies import Clairvoyant, Hostler, LeastFrequentlyUsed, LeastRecentlyUsed, LeastRecentlyUsedAsleep
from .traces import Trace
from .world import Outcome, World

NEAR_OPTIMUM = 1.15
BELOW_LRU = 0.70
WAIT_SLACK_S = 0.05
"""Two waits that differ by less are the same."""
STRATEGIES = ("hostler", "LRU", "LRU, sleeping", "LFU", "Ollama", "clairvoyant")


@dataclass(frozen=True, slots=True)
class Figures:
    """One strategy on one trace: means over the seeds; waits over all requests of all seeds."""

    reload_s: float
    num_loads: float
    num_wakes: float
    num_evicted: float
    wait_p50_s: float
    wait_p99_s: float
    num_failed: int


@dataclass(frozen=True, slots=True)
class Result:
    """One trace. `bound_s`: no one who serves in order can do with less; a mean, too."""

    trace: str
    says: str
    memory: str
    num_asked: int
    bound_s: float
    by_strategy: dict[str, Figures] = field(default_factory=dict)

    def to(self, strategy: str) -> float:
        """Return hostler's reload seconds over another strategy's."""
        return self.by_strategy["hostler"].reload_s / max(1e-9, self.by_strategy[strategy].reload_s)

    @property
    def reloads_little(self) -> bool:
        """Whether it is near the clairvoyant, or far below LRU."""
        return self.to("clairvoyant") <= NEAR_OPTIMUM or self.to("LRU") <= BELOW_LRU

    @property
    def waits_no_longer(self) -> bool:
        """Whether the 99th percentile of waits is no worse than LRU's, and nobody failed who would not have."""
        mine, lru = self.by_strategy["hostler"], self.by_strategy["LRU"]
        return mine.wait_p99_s <= lru.wait_p99_s + WAIT_SLACK_S and mine.num_failed <= lru.num_failed

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the verdicts."""
        ratios = {strategy: round(self.to(strategy), 3) for strategy in self.by_strategy if strategy != "hostler"}
        goals = {"reloads_little": self.reloads_little, "waits_no_longer": self.waits_no_longer}
        return {**asdict(self), "hostler_over": ratios, "goals": goals}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share of all is no larger than; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def runs(trace: Trace, only: Sequence[str] = STRATEGIES) -> list[Outcome]:
    """Run every strategy over a trace."""
    worlds: dict[str, Callable[[], World]] = {
        "hostler": lambda: World(trace, Hostler()),
        "LRU": lambda: World(trace, LeastRecentlyUsed()),
        "LRU, sleeping": lambda: World(trace, LeastRecentlyUsedAsleep()),
        "LFU": lambda: World(trace, LeastFrequentlyUsed()),
        "Ollama": lambda: OllamaWorld(trace),
        "clairvoyant": lambda: World(trace, Clairvoyant(trace)),
    }
    return [worlds[name]().run() for name in only]


def measure(which: Callable[[random.Random], Trace], seeds: Sequence[int], only: Sequence[str] = STRATEGIES) -> Result:
    """Run a kind of trace with each seed, and return the figures."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in only}
    bounds_s = []
    for seed in seeds:
        trace = make(which, seed)
        bounds_s.append(least_reload_s(trace))
        for outcome in runs(trace, only):
            outcomes[outcome.strategy].append(outcome)
    devices = f"{len(trace.device_gb)} × {trace.device_gb[0]:g}"
    memory = f"{devices} GB, host {trace.host_gb:g} GB, models {sum(m.weight_gb for m in trace.models):.0f} GB"
    result = Result(trace.name, trace.says, memory, len(trace.asked), sum(bounds_s) / len(seeds))
    for name, several in outcomes.items():
        result.by_strategy[name] = _figures(several)
    return result


def _figures(several: Sequence[Outcome]) -> Figures:
    waits_s = [wait_s for outcome in several for wait_s in outcome.waits_s]

    def mean(of: Callable[[Outcome], float]) -> float:
        return sum(map(of, several)) / len(several)

    return Figures(
        reload_s=mean(lambda o: o.reload_s),
        num_loads=mean(lambda o: o.num_loads),
        num_wakes=mean(lambda o: o.num_wakes),
        num_evicted=mean(lambda o: o.num_evicted),
        wait_p50_s=percentile(waits_s, 0.5),
        wait_p99_s=percentile(waits_s, 0.99),
        num_failed=sum(outcome.num_failed for outcome in several),
    )

"""What a run found, as data: rounds of contestants, the metrics read from them, and ratios between contestants.

Above: `goals` and `report`. Below: `load` for one level's numbers. Ratios are taken within a round and their median
is given: figures drift with the machine, ratios of neighbours less so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .load import Level


@dataclass(frozen=True, slots=True)
class StepPart:
    """One part of the engine's own decode step of so many rows, and the mean milliseconds that it takes."""

    name: str
    ms: float
    rows: int = 1


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """One scenario's figure: a ratio that must not be above `at_most`.

    Attributes:
        key: its short name in the results.
        label: what was done and what the ratio is of.
        detail: the absolute figures behind it.
    """

    key: str
    label: str
    ratio: float
    at_most: float
    detail: str

    @property
    def is_met(self) -> bool:
        """Whether the goal holds."""
        return self.ratio <= self.at_most


@dataclass(frozen=True, slots=True)
class Round:
    """One start of one contestant: how long until it answered, each level of load, and its scenarios.

    `step_parts` is where the engine's time in a decode step goes, for contestants that tell.
    """

    peer: str
    number: int
    first_reply_s: float
    levels: tuple[Level, ...]
    scenarios: tuple[ScenarioResult, ...] = ()
    step_parts: tuple[StepPart, ...] = ()

    def level(self, streams: int) -> Level | None:
        """Return what was measured with `streams` at once, if it was."""
        return next((level for level in self.levels if level.streams == streams), None)


def show_s(value_s: float) -> str:
    """Return seconds as a reader wants them: milliseconds below ten seconds."""
    if value_s < 0.01:
        return f"{value_s * 1e3:,.1f} ms"
    return f"{value_s * 1e3:,.0f} ms" if value_s < 10 else f"{value_s:,.1f} s"


def show_gib(value: float) -> str:
    """Return bytes as GiB."""
    return f"{value / 2**30:.2f} GiB"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table: how to read it from a level, how to print it, and whether more is better."""

    key: str
    label: str
    read: Callable[[Level], float]
    show: Callable[[float], str] = show_s
    more_is_better: bool = False


START = "start"
METRICS = (
    Metric("tokens_per_s", "tokens/s, all streams", lambda level: level.tokens_per_s, lambda v: f"{v:,.1f}", True),
    Metric("ttft_p50", "first token p50", lambda level: level.ttft_p50_s),
    Metric("ttft_p95", "first token p95", lambda level: level.ttft_p95_s),
    Metric("inter_token_p50", "between tokens p50", lambda level: level.inter_token_p50_s),
    Metric("max_gap", "longest gap", lambda level: level.max_gap_s),
    Metric("memory", "memory, all processes", lambda level: float(level.memory_bytes), show_gib),
)
METRIC_OF = {metric.key: metric for metric in METRICS}


def figure(item: Round, metric: str, streams: int) -> float:
    """Return one figure of one round, 0 where it was not measured. `streams` is ignored for "start"."""
    if metric == START:
        return item.first_reply_s
    level = item.level(streams)
    return METRIC_OF[metric].read(level) if level else 0.0


def median_figure(rounds: Sequence[Round], peer: str, metric: str, streams: int) -> float | None:
    """Return the median over the peer's rounds, or None where nothing was measured."""
    values = [value for item in rounds if item.peer == peer and (value := figure(item, metric, streams)) > 0]
    return statistics.median(values) if values else None


def ratio(rounds: Sequence[Round], ours: str, theirs: str, metric: str, streams: int) -> float | None:
    """Return figure(ours) / figure(theirs), the median over rounds that both ran; None where there is none."""
    by_number = {item.number: item for item in rounds if item.peer == theirs}
    ratios = []
    for item in rounds:
        if item.peer != ours or item.number not in by_number:
            continue
        a, b = figure(item, metric, streams), figure(by_number[item.number], metric, streams)
        if a > 0 and b > 0:
            ratios.append(a / b)
    return statistics.median(ratios) if ratios else None

"""What hostler promises beside its peers: a table of goals, and whether a run met them.

Above: `report`. Below: `results`. A goal's factor bounds hostler's figure divided by the peer's, from below where
more is better and from above elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import METRIC_OF, START, Round, ratio


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise: `metric` of `ours` with `streams` at once, as a multiple of what `peer` shows."""

    metric: str
    streams: int
    ours: str
    peer: str
    factor: float

    @property
    def more_is_better(self) -> bool:
        """Whether the factor is a lower bound."""
        return self.metric != START and METRIC_OF[self.metric].more_is_better

    @property
    def label(self) -> str:
        """The promise in words, without its outcome."""
        if self.metric == START:
            what = "start to first text"
        else:
            what = f"{METRIC_OF[self.metric].label}, {self.streams} stream{'s' if self.streams > 1 else ''}"
        return f"{self.ours}: {what}, against {self.peer}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal and the measured ratio; None where this run did not measure both."""

    goal: Goal
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal holds; None where it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.goal.factor if self.goal.more_is_better else self.measured <= self.goal.factor

    @property
    def mark(self) -> str:
        """One sign for the outcome."""
        return {True: "✓", False: "✗", None: "·"}[self.is_met]

    @property
    def line(self) -> str:
        """The outcome in words."""
        bound = f"{'≥' if self.goal.more_is_better else '≤'} {self.goal.factor:.3g}×"
        found = "not measured" if self.measured is None else f"{self.measured:.2f}×"
        return f"{self.mark} {self.goal.label}: {found}, goal {bound}"


GOALS = (
    Goal("tokens_per_s", 1, "hostler", "vllm", 1.0),
    Goal("tokens_per_s", 4, "hostler", "vllm", 1.2),
    Goal("tokens_per_s", 16, "hostler", "vllm", 1.3),
    Goal("tokens_per_s", 16, "hostler", "llama-bf16", 1.0),
    Goal("ttft_p50", 1, "hostler", "vllm", 1.0),
    Goal("ttft_p50", 16, "hostler", "vllm", 0.4),
    Goal("ttft_p50", 16, "hostler", "llama-bf16", 0.6),
    Goal("tokens_per_s", 1, "hostler-int8", "vllm", 1.8),
    Goal("tokens_per_s", 1, "hostler-int8", "llama-q8", 0.9),
    Goal(START, 0, "hostler", "vllm", 1 / 8),
    Goal("memory", 16, "hostler", "vllm", 1 / 3),
    Goal("tokens_per_s", 16, "hostler", "transformers-cb", 2.0),
    Goal("ttft_p50", 16, "hostler", "transformers-cb", 1 / 4),
)


def judge(rounds: Sequence[Round], goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """Return every goal's outcome in this run, in the table's order."""
    return [Outcome(goal, ratio(rounds, goal.ours, goal.peer, goal.metric, goal.streams)) for goal in goals]

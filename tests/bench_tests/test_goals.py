"""Goals are judged by the ratio of paired rounds, from the side that the metric asks for."""

from __future__ import annotations

import pytest

from tests.bench.goals import GOALS, Goal, judge
from tests.bench.lineup import lineup
from tests.bench.peers import StoredModel
from tests.bench.results import METRIC_OF, START

from .rounds import level, one_round


def outcome(goal: Goal, *rounds):  # type: ignore[no-untyped-def]
    (found,) = judge(rounds, [goal])
    return found


def test_more_tokens_than_promised_meets_the_goal_and_fewer_miss_it() -> None:
    goal = Goal("tokens_per_s", 16, "hostler", "vllm", 1.3)
    ours = one_round("hostler", 0, 5.0, level(16, tokens_per_s=140.0))
    assert outcome(goal, ours, one_round("vllm", 0, 9.0, level(16, tokens_per_s=100.0))).mark == "✓"
    assert outcome(goal, ours, one_round("vllm", 0, 9.0, level(16, tokens_per_s=110.0))).mark == "✗"


def test_a_later_first_token_than_promised_misses_the_goal() -> None:
    goal = Goal("ttft_p50", 16, "hostler", "vllm", 0.4)
    theirs = one_round("vllm", 0, 9.0, level(16, ttft_p50_s=1.0))
    assert outcome(goal, one_round("hostler", 0, 5.0, level(16, ttft_p50_s=0.4)), theirs).is_met is True
    assert outcome(goal, one_round("hostler", 0, 5.0, level(16, ttft_p50_s=0.41)), theirs).is_met is False


def test_the_start_is_compared_without_regard_to_streams() -> None:
    goal = Goal(START, 0, "hostler", "vllm", 1 / 8)
    found = outcome(goal, one_round("hostler", 0, 5.0), one_round("vllm", 0, 50.0))
    assert found.is_met is True
    assert found.line == "✓ hostler: start to first text, against vllm: 0.10×, goal ≤ 0.125×"


@pytest.mark.parametrize("missing", ["hostler", "vllm"])
def test_a_goal_without_both_sides_is_neither_met_nor_missed(missing: str) -> None:
    rounds = [one_round(peer) for peer in ("hostler", "vllm") if peer != missing]
    found = outcome(Goal("tokens_per_s", 1, "hostler", "vllm", 1.0), *rounds)
    assert (found.is_met, found.mark) == (None, "·")
    assert "not measured" in found.line


def test_a_load_that_one_side_did_not_run_is_not_judged() -> None:
    goal = Goal("tokens_per_s", 16, "hostler", "vllm", 1.0)
    assert outcome(goal, one_round("hostler", 0, 5.0, level(16)), one_round("vllm")).is_met is None


def test_rounds_are_paired_by_number_so_that_a_failed_round_shifts_nothing() -> None:
    goal = Goal("tokens_per_s", 1, "hostler", "vllm", 1.0)
    rounds = [
        one_round("hostler", 0, 5.0, level(1, tokens_per_s=1000.0)),
        one_round("hostler", 1, 5.0, level(1, tokens_per_s=30.0)),
        one_round("vllm", 1, 9.0, level(1, tokens_per_s=60.0)),
    ]
    assert outcome(goal, *rounds).measured == pytest.approx(0.5)


def test_every_goal_names_a_metric_and_contestants_that_exist(tmp_path) -> None:  # type: ignore[no-untyped-def]
    known = {peer.short for peer in lineup(StoredModel("m", tmp_path), 2)}
    for goal in GOALS:
        assert {goal.ours, goal.peer} <= known, goal
        assert goal.metric == START or goal.metric in METRIC_OF, goal
        assert goal.ours.startswith("hostler"), goal
        assert not goal.peer.startswith("hostler"), goal

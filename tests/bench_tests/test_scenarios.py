"""Scenarios turn arrival times into one ratio, and refuse to where nothing was seen."""

from __future__ import annotations

import pytest

from tests.bench.client import StreamResult
from tests.bench.scenarios import ScenarioFailed, gaps_s, judge_gaps, judge_turns, long_text


def stream(began_s: float, *arrivals_s: float, error: str = "") -> StreamResult:
    return StreamResult(began_s, arrivals_s[-1] if arrivals_s else began_s, list(arrivals_s), error=error)


def steady(until: int) -> list[float]:
    return [index / 10 for index in range(1, until)]


def test_the_longest_gap_beside_the_long_prompt_is_held_against_the_median_before_it() -> None:
    held_up = stream(0.0, *steady(21), 2.5, 2.6)  # 0.1 s a token until 2.0 s, then a silence of 0.5 s
    found = judge_gaps([held_up, stream(0.0, *steady(30))], stream(2.0, 2.5))
    assert found.ratio == pytest.approx(5.0)
    assert not found.is_met


def test_gaps_after_the_long_prompts_first_token_do_not_count() -> None:
    late = stream(0.0, *steady(26), 9.0)
    assert judge_gaps([stream(0.0, *steady(40)), late], stream(2.0, 2.3)).ratio == pytest.approx(1.0)


def test_a_gap_that_spans_the_whole_time_counts() -> None:
    assert gaps_s([stream(0.0, 1.0, 5.0)], 2.0, 3.0) == [4.0]
    assert gaps_s([stream(0.0, 1.0, 1.5)], 2.0, 3.0) == []


def test_streams_that_ended_before_the_long_prompt_give_no_figure() -> None:
    with pytest.raises(ScenarioFailed, match="did not run beside"):
        judge_gaps([stream(0.0, *steady(5))], stream(2.0, 2.5))


def test_a_failed_stream_gives_no_figure() -> None:
    with pytest.raises(ScenarioFailed, match="HTTP 500"):
        judge_gaps([stream(0.0, error="HTTP 500")], stream(2.0, 2.5))
    with pytest.raises(ScenarioFailed, match="HTTP 500"):
        judge_turns([(stream(0.0, 1.0), stream(2.0, error="HTTP 500"))])


def test_turns_are_compared_within_their_own_chat() -> None:
    chats = [(stream(0.0, 1.0), stream(5.0, 5.2)), (stream(0.0, 4.0), stream(5.0, 5.4)), (stream(0, 2), stream(5, 6))]
    found = judge_turns(chats)
    assert found.ratio == pytest.approx(0.2)
    assert found.is_met


def test_long_texts_differ_from_their_beginning_so_that_no_cache_serves_two() -> None:
    first, second = long_text(1000, 7), long_text(1000, 8)
    assert first[:12] != second[:12]
    assert len(long_text(1500, 7)) > 1.4 * len(first)

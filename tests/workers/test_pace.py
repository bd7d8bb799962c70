"""How many prompt tokens a step may take, learned from steps whose times are given."""

from __future__ import annotations

import pytest

from workers.text.pace import ALONE, LONGEST_S, MIN_CHUNK, Pace


def taught(base_s: float, token_s: float, fixed_s: float = 0.0, chunks: tuple[int, ...] = (64,)) -> Pace:
    pace = Pace()
    for _ in range(40):
        pace.observe(8, 0, base_s)
        for chunk in chunks:
            pace.observe(8, chunk, base_s + fixed_s + chunk * token_s)
    return pace


def test_a_newcomer_stretches_the_steps_of_running_streams_only_so_far() -> None:
    chunk = taught(0.040, 0.001).chunk_tokens(8, 1, 8)
    assert chunk == pytest.approx(ALONE * 40, abs=1)


def test_what_prompt_tokens_cost_whatever_their_number_is_not_taken_for_each_ones_cost() -> None:
    pace = taught(0.060, 0.001, fixed_s=0.010, chunks=(8, 24))
    assert pace.chunk_tokens(8, 1, 8) == pytest.approx(ALONE * 60 - 10, abs=1.5)


def test_a_chunk_that_was_dear_by_chance_does_not_make_all_that_follow_small() -> None:
    pace = taught(0.025, 0.001, fixed_s=0.005, chunks=(16,))
    usual = pace.chunk_tokens(8, 1, 8)
    pace.observe(8, 16, 0.080)
    for _ in range(30):
        chunk = pace.chunk_tokens(8, 1, 8)
        pace.observe(8, chunk, 0.025 + 0.005 + chunk * 0.001)
    assert pace.chunk_tokens(8, 1, 8) >= usual - 3


def test_what_prompts_cost_alone_tells_what_they_cost_beside_streams() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe(1, 0, 0.008)
        pace.observe(8, 0, 0.010)
        pace.observe(0, 90, 0.008 + 90 * 0.0003)
    assert pace.chunk_tokens(8, 1, 8) == pytest.approx(ALONE * 10 / 0.3, abs=2)


def test_a_step_of_more_sequences_than_were_ever_seen_is_not_taken_for_a_short_one() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe(1, 0, 0.012)
        pace.observe(4, 0, 0.015)
        pace.observe(0, 90, 0.012 + 90 * 0.0002)
    assert pace.expected_s(12) == pytest.approx(0.023)
    pace.observe(12, 60, 0.023 + 60 * 0.0002)
    assert pace.chunk_tokens(12, 1, 12) == pytest.approx(ALONE * 23 / 0.2, abs=5)


def test_one_step_that_lost_its_cores_changes_little() -> None:
    pace = taught(0.060, 0.001, fixed_s=0.005, chunks=(8, 24))
    usual = pace.chunk_tokens(8, 1, 8)
    pace.observe(8, 16, 1.0)
    assert pace.chunk_tokens(8, 1, 8) > usual / 2
    pace.observe(8, 16, 0.001)
    pace.observe(8, 16, 0.001)
    assert pace.chunk_tokens(8, 1, 8) < usual * 2


def test_the_more_newcomers_the_longer_a_step() -> None:
    pace = taught(0.010, 0.001)
    chunks = [pace.chunk_tokens(8, waiting, 8) for waiting in range(1, 10)]
    assert chunks == sorted(chunks)
    assert chunks[-1] > 3 * chunks[-2] > 2 * 3 * chunks[0]
    assert pace.chunk_tokens(8, 4000, 8) * 0.001 <= LONGEST_S * 1.05


def test_streams_that_began_while_others_waited_are_not_spared() -> None:
    pace = taught(0.010, 0.0002)
    assert pace.chunk_tokens(8, 1, 0) == pace.chunk_tokens(0, 9, 0) > 5 * pace.chunk_tokens(8, 1, 8)
    assert pace.chunk_tokens(12, 1, 8) == pace.chunk_tokens(8, 5, 8), "whoever came together counts until all are in"


def test_a_slow_machine_still_takes_a_few_prompt_tokens_each_step() -> None:
    assert taught(0.010, 0.5).chunk_tokens(8, 1, 8) == MIN_CHUNK

"""The rate of use: it rises with use, fades with time, and remembers on several time scales."""

from __future__ import annotations

from itertools import pairwise

from orchestrator.reuse import AHEAD_S, Reuse

HOUR_S = 3600.0


def used(*moments_s: float) -> Reuse:
    reuse = Reuse()
    for moment_s in moments_s:
        reuse.seen(moment_s)
    return reuse


def test_what_was_never_used_has_no_rate() -> None:
    assert Reuse().per_s(100.0) == 0.0


def test_the_rate_fades_with_time_and_never_rises_by_itself() -> None:
    reuse = used(0.0)
    rates = [reuse.per_s(10.0 * 2**i) for i in range(16)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[-1] > 0.0


def test_of_two_that_were_last_used_at_the_same_time_the_one_used_more_often_has_the_higher_rate() -> None:
    assert used(0.0, 500.0, 900.0).per_s(1000.0) > used(900.0).per_s(1000.0)


def test_right_after_its_use_a_model_is_expected_back_before_one_that_is_only_popular() -> None:
    popular = used(*(600.0 * i for i in range(60)))
    assert used(60 * 600.0).per_s(60 * 600.0 + 5.0) > popular.per_s(60 * 600.0 + 5.0)


def test_a_burst_is_forgotten_before_a_model_that_is_used_all_day() -> None:
    all_day = used(*(600.0 * i for i in range(144)))
    burst = used(*(22 * HOUR_S + i for i in range(30)))
    assert burst.per_s(22 * HOUR_S + 60.0) > all_day.per_s(22 * HOUR_S + 60.0)
    assert burst.per_s(26 * HOUR_S) < all_day.per_s(26 * HOUR_S)


def test_on_no_scale_does_a_clock_that_goes_back_make_a_rate_rise() -> None:
    assert used(100.0).per_s(50.0) <= used(100.0).per_s(100.0)


def test_a_model_that_always_comes_back_after_hours_is_not_expected_within_seconds() -> None:
    crawled = used(*(3 * HOUR_S * i for i in range(6)))
    unknown = used(15 * HOUR_S)
    assert crawled.per_s(15 * HOUR_S + 20.0) < 0.3 * unknown.per_s(15 * HOUR_S + 20.0)
    assert crawled.per_s(18 * HOUR_S) > unknown.per_s(18 * HOUR_S)


def test_a_model_that_is_used_in_sessions_is_expected_to_go_on() -> None:
    sessions = used(*(HOUR_S * i + 10.0 * k for i in range(6) for k in range(8)))
    moment_s = 5 * HOUR_S + 75.0
    assert sessions.per_s(moment_s) > sessions.per_s(moment_s + 300.0) * 5


def test_what_scales_count_adds_up_whatever_came() -> None:
    for moments in ((0.0, 0.0, 0.0), (0.0, 1e9), tuple(range(1000)), (5.0, 4.0, 3.0)):
        reuse = used(*map(float, moments))
        assert abs(sum(reuse.shares) - 1.0) < 1e-9
        assert all(share > 0.0 for share in reuse.shares)


def test_the_lasting_rate_is_the_mean_of_the_rates_to_come() -> None:
    reuse = used(*(100.0 * i for i in range(20)))
    steps = [reuse.per_s(1900.0 + AHEAD_S * (i + 0.5) / 1000) for i in range(1000)]
    assert abs(reuse.lasting_per_s(1900.0) / (sum(steps) / 1000) - 1.0) < 1e-3

"""The policy with sleepers: who sleeps, who leaves host memory, who wakes where, and who hands over."""

from __future__ import annotations

from dataclasses import replace

from tests.orchestrator.test_policy import asleep, cluster, holder, planned, want


def test_a_victim_sleeps_where_host_memory_has_room_and_leaves_where_it_has_none() -> None:
    victim = holder("a", 100, sleep_bytes=30)
    assert planned(cluster(victim, sleep=40), want(50)).sleep == ("a",)
    assert planned(cluster(victim, sleep=20), want(50)).evict == ("a",)


def test_an_older_sleeper_leaves_host_memory_for_one_that_is_worth_more() -> None:
    old = asleep("old", sleep_bytes=30, uses_per_s=0.0001)
    answer = planned(cluster(holder("a", 100, sleep_bytes=30, uses_per_s=0.1), old, sleep=40), want(50))
    assert (answer.sleep, answer.evict) == (("a",), ("old",))


def test_a_sleeper_is_woken_rather_than_loaded_anew() -> None:
    mine = asleep("w1", sleep_bytes=5)
    view = cluster(replace(mine, model="new"), sleep=40)
    answer = planned(view, want(50, load_s=10.0))
    assert (answer.wake, answer.expected_s) == ("w1", 0.5)
    assert "wakes on gpu0" in answer.reason


def test_a_sleeper_that_can_wake_elsewhere_only_is_given_up_for_a_load_where_there_is_room() -> None:
    mine = replace(asleep("w1", sleep_bytes=5), model="new", wakes_on=frozenset({"gpu0"}))
    view = cluster(mine, holder("pinned", 90, pinned=True), devices=(100, 100), sleep=40)
    answer = planned(view, want(50, load_s=10.0))
    assert (answer.parts[0].device, answer.wake, answer.evict) == ("gpu1", "", ("w1",))


def test_a_sleeper_hands_over_to_a_device_of_its_node_that_it_cannot_wake_on() -> None:
    mine = replace(asleep("w1", sleep_bytes=5), model="new", wakes_on=frozenset({"gpu0"}), hand_over_s=3.0)
    view = cluster(mine, holder("pinned", 90, pinned=True), devices=(100, 100), sleep=40)
    answer = planned(view, want(50, load_s=10.0))
    assert (answer.parts[0].device, answer.wake, answer.take_over, answer.evict) == ("gpu1", "", "w1", ())
    assert answer.expected_s == 3.0
    assert "goes to gpu1 from host memory" in answer.reason
    elsewhere = replace(view, devices=tuple(replace(d, node="far") for d in view.devices))
    answer = planned(elsewhere, want(50, load_s=10.0))
    assert (answer.take_over, answer.evict, answer.expected_s) == ("", ("w1",), 10.0)


def test_a_cheap_hand_over_spares_others_the_wake() -> None:
    mine = replace(asleep("w1", sleep_bytes=5), model="new", wakes_on=frozenset({"gpu0"}), hand_over_s=1.0)
    rare = holder("rare", 90, uses_per_s=0.02, sleep_bytes=30)
    demand = want(50, load_s=10.0, uses_per_s=0.01)
    answer = planned(cluster(mine, rare, devices=(100, 100), sleep=40), demand)
    assert (answer.parts[0].device, answer.take_over, answer.sleep) == ("gpu1", "w1", ())
    dear = replace(mine, hand_over_s=9.0)
    answer = planned(cluster(dear, rare, devices=(100, 100), sleep=40), demand)
    assert (answer.parts[0].device, answer.wake, answer.sleep) == ("gpu0", "w1", ("rare",))


def test_in_host_memory_the_next_minutes_count_not_the_last_moment() -> None:
    old = replace(asleep("old", sleep_bytes=30, uses_per_s=0.001), lasting_per_s=0.001)
    crawled = replace(holder("crawled", 100, sleep_bytes=30, uses_per_s=0.02), lasting_per_s=0.0001)
    answer = planned(cluster(crawled, old, sleep=40), want(50))
    assert (answer.sleep, answer.evict) == ((), ("crawled",))
    again = replace(crawled, lasting_per_s=0.01)
    answer = planned(cluster(again, old, sleep=40), want(50))
    assert (answer.sleep, answer.evict) == (("crawled",), ("old",))


def test_a_sleeper_is_woken_at_others_cost_where_that_costs_less_than_a_load_where_there_is_room() -> None:
    mine = replace(asleep("w1", sleep_bytes=5), model="new", wakes_on=frozenset({"gpu0"}))
    rare = holder("rare", 90, uses_per_s=0.001, sleep_bytes=30)
    demand = want(50, load_s=10.0, uses_per_s=0.01)
    answer = planned(cluster(mine, rare, devices=(100, 100), sleep=40), demand)
    assert (answer.parts[0].device, answer.wake, answer.sleep) == ("gpu0", "w1", ("rare",))
    often = replace(rare, uses_per_s=9.0)
    answer = planned(cluster(mine, often, devices=(100, 100), sleep=40), demand)
    assert (answer.parts[0].device, answer.wake, answer.sleep, answer.evict) == ("gpu1", "", (), ("w1",))

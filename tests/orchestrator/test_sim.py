"""The placement simulator: it does as the real scheduler does, and the policy keeps its goal on two traces."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from orchestrator.models import demand
from orchestrator.policy.room import least_bytes
from tests.sim.bound import least_reload_s
from tests.sim.catalog import CATALOG, agents, bursty, make, workstation
from tests.sim.figures import Result, measure
from tests.sim.hardware import GB, Hardware, PageCache
from tests.sim.ollama import OllamaWorld
from tests.sim.picture import picture
from tests.sim.real import RULES, RealRun
from tests.sim.report import BEGIN, END, as_markdown, write_into
from tests.sim.strategies import Hostler, LeastRecentlyUsed
from tests.sim.traces import Asked, Served, Trace
from tests.sim.world import World

SHORT = ("hostler", "LRU", "clairvoyant")


def small(*asked: tuple[float, str, float], device_gb: float = 10.0, host_gb: float = 0.0) -> Trace:
    """Return a trace of models a, b and c, 7 GB each."""
    models = tuple(Served(name, 7.0) for name in "abc")
    return Trace("small", "", (device_gb,), host_gb, models, tuple(Asked(*one) for one in asked))


# ------------------------------------------------------------ the goal


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [measure(which, (21,), SHORT) for which in (workstation, bursty)]


def test_the_policy_reloads_little_and_nobody_waits_longer_than_under_lru(results: list[Result]) -> None:
    for result in results:
        assert result.reloads_little, result
        assert result.waits_no_longer, result
        assert result.bound_s <= result.by_strategy["clairvoyant"].reload_s


# ------------------------------------------------------------ is it like the real thing?


@pytest.mark.parametrize("which", [workstation, agents])
def test_the_real_scheduler_loads_and_wakes_as_the_simulator_says(which: object) -> None:
    trace = make(which, 3)  # type: ignore[arg-type]
    trace = replace(trace, asked=trace.asked[:150])
    real = RealRun(trace)
    real.run()
    said = World(trace, Hostler(), rules=RULES).run()
    assert real.num_served == len(said.waits_s) == 150
    assert real.effects.reload_s == pytest.approx(said.reload_s, rel=0.05)
    assert abs(real.effects.num_loads - said.num_loads) <= 2
    assert abs(real.effects.num_hand_overs - said.num_hand_overs) <= 2
    assert real.effects.num_hand_overs > 0 or len(trace.device_gb) == 1


class Watched(World):
    """Sees to it that no device ever holds more than it has."""

    def place_waiting(self) -> None:
        super().place_waiting()
        for device, usable_bytes in self.usable.items():
            assert self.occupied_bytes(device) <= usable_bytes


def test_no_device_ever_holds_more_than_it_has_and_everybody_is_answered() -> None:
    trace = make(workstation, 4)
    trace = replace(trace, asked=trace.asked[:200])
    for strategy in (Hostler(), LeastRecentlyUsed()):
        outcome = Watched(trace, strategy).run()
        assert len(outcome.waits_s) + outcome.num_failed == 200


def test_a_busy_model_is_not_cut_off_for_another() -> None:
    outcome = World(small((0, "a", 20.0), (1, "b", 1.0)), Hostler()).run()
    load_s = Hardware().load_s(7 * GB, cached=False)
    assert outcome.waits_s == pytest.approx([load_s, load_s + 20.0 + 0.5 + load_s - 1.0])


def test_a_model_that_sleeps_is_woken_and_one_that_is_gone_comes_from_the_page_cache() -> None:
    turns = small((0, "a", 1.0), (100, "b", 1.0), (200, "a", 1.0), host_gb=20.0)
    hardware = Hardware()
    cold_s = 2 * hardware.load_s(7 * GB, cached=False)
    asleep, gone = World(turns, Hostler()).run(), World(turns, LeastRecentlyUsed()).run()
    assert (asleep.num_loads, asleep.num_wakes) == (2, 1)
    assert asleep.reload_s == pytest.approx(cold_s + hardware.wake_s(7 * GB))
    assert gone.reload_s == pytest.approx(cold_s + hardware.load_s(7 * GB, cached=True))


def test_under_ollamas_rule_those_behind_one_who_waits_for_room_wait_too() -> None:
    trace = small((0, "a", 30.0), (10, "b", 1.0), (11, "a", 1.0))
    ollama, hostler = OllamaWorld(trace).run(), World(trace, Hostler()).run()
    assert ollama.num_loads == 3
    assert hostler.num_loads == 2
    assert sorted(hostler.waits_s)[0] == 0.0


def test_the_page_cache_forgets_what_was_read_longest_ago() -> None:
    cache = PageCache(10)
    assert [cache.read(name, 5) for name in ("a", "b", "a", "c", "a", "b")] == [False, False, True, False, True, False]


# ------------------------------------------------------------ the bound and the traces


def test_the_least_is_what_can_be_reckoned_by_hand() -> None:
    load_s = Hardware().load_s(7 * GB, cached=False)
    turns = tuple((100.0 * i, "abab"[i], 1.0) for i in range(4))
    both = least_reload_s(small(*turns, device_gb=20.0))
    assert both == pytest.approx(2 * load_s)
    # 3 GB beside the one that is asked for hold 39% of the other: one 7.7 GB with its least KV cache.
    held = (10.0 - 7.65) / 7.65
    assert least_reload_s(small(*turns)) == pytest.approx(4 * load_s - 2 * held * load_s, rel=0.01)


def test_a_trace_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    for which in (workstation, bursty, agents):
        once, again, other = make(which, 7), make(which, 7), make(which, 8)
        assert once == again != other
        assert all(one.at_s <= following.at_s for one, following in zip(once.asked, once.asked[1:], strict=False))


def test_every_trace_has_some_thousand_requests_and_no_model_that_fits_nowhere() -> None:
    for which in CATALOG:
        trace = make(which, 5)
        assert 1000 <= len(trace.asked) <= 10_000
        for model in trace.models:
            assert least_bytes(demand(model.spec, model.located)) <= max(trace.device_gb) * GB


# ------------------------------------------------------------ what is shown


def test_the_picture_and_the_table_show_every_trace(results: list[Result], tmp_path: object) -> None:
    figures = results[0].by_strategy["LRU"]
    names = ("LRU, sleeping", "LFU", "Ollama")
    full = [replace(r, by_strategy={**r.by_strategy, **dict.fromkeys(names, figures)}) for r in results]
    words = [element.text for element in ElementTree.fromstring(picture(full)).iter()]
    readme = tmp_path / "README.md"  # type: ignore[operator]
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(readme, as_markdown(full, [], (21,)))
    for result in results:
        assert result.trace in words
        assert f"| {result.trace} |" in readme.read_text()
    assert "old" not in readme.read_text()
    assert readme.read_text().endswith("after\n")

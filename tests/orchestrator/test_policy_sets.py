"""Properties of splitting and of the search for victims, over clusters in which models stand on several devices."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy import plan
from orchestrator.policy.hosts import Hosts
from orchestrator.policy.room import Room, least_bytes
from orchestrator.policy.split import share_of
from orchestrator.policy.victims import cheapest
from orchestrator.views import (
    ClusterView,
    Demand,
    DeviceView,
    HolderState,
    HolderView,
    NodeView,
    Obstacle,
    Part,
    Plan,
    Refusal,
    Rules,
)

NOW_S = 1000.0
RULES = Rules(min_residency_s=5, max_wait_s=30)
EMPTY_VIEW = ClusterView((), (), (), NOW_S)


@st.composite
def split_views(draw: st.DrawFn) -> ClusterView:
    """Two nodes of three devices each; holders on one to three devices of a node; host memory for a few."""
    devices = [DeviceView(f"{n}{i}", draw(st.integers(20, 100)), n) for n in ("a", "b") for i in range(3)]
    left = {device.id: device.usable_bytes for device in devices}
    sleep_left = {"a": draw(st.integers(0, 60)), "b": 0}
    nodes = tuple(NodeView(name, num_bytes) for name, num_bytes in sleep_left.items())
    holders = []
    for index in range(draw(st.integers(0, 8))):
        node = draw(st.sampled_from(("a", "b")))
        asleep = draw(st.booleans()) and draw(st.booleans())
        sleep_bytes = draw(st.integers(0, 30))
        if asleep:
            sleep_bytes = min(sleep_bytes, sleep_left[node])
            sleep_left[node] -= sleep_bytes
        on = draw(st.lists(st.sampled_from([f"{node}{i}" for i in range(3)]), min_size=1, max_size=3, unique=True))
        size = 0 if asleep else draw(st.integers(0, min(left[device] for device in on)))
        for device in on:
            left[device] -= size
        holders.append(
            HolderView(
                id=f"w{index}",
                model="new" if asleep and draw(st.booleans()) else f"m{index}",
                parts=tuple(Part(device, size) for device in on) if size else (),
                state=HolderState.ASLEEP if asleep else draw(st.sampled_from((HolderState.READY, HolderState.COMING))),
                busy=draw(st.booleans()),
                pinned=draw(st.integers(0, 3)) == 0,
                last_used_s=NOW_S - draw(st.integers(0, 100)),
                ready_since_s=NOW_S - draw(st.integers(3, 20)),
                spare_bytes=draw(st.integers(0, size)) if len(on) == 1 else 0,
                sleep_bytes=draw(st.sampled_from((None, sleep_bytes))) if not asleep else sleep_bytes,
                load_s=draw(st.integers(1, 30)),
                wake_s=draw(st.integers(0, 2)),
                uses_per_s=draw(st.sampled_from((0.0, 0.001, 0.1))),
                node=node,
                wakes_on=frozenset(on) if asleep else None,
            )
        )
    return ClusterView(tuple(devices), tuple(holders), nodes, NOW_S)


@st.composite
def split_demands(draw: st.DrawFn) -> Demand:
    floor = draw(st.integers(0, 20))
    context = floor + draw(st.integers(0, 20))
    return Demand(
        "new",
        None,
        draw(st.integers(60, 260)),
        floor,
        context,
        context + draw(st.integers(0, 50)),
        max_parts=draw(st.integers(1, 4)),
        waited_s=draw(st.sampled_from((0.0, 40.0))),
        load_s=20.0,
    )


def free_after(view: ClusterView, answer: Plan, spared: str = "") -> dict[str, int]:
    """Return what is free on each device once everybody but `spared` has given way, the model not yet there."""
    gone = {*answer.sleep, *answer.evict} - {spared}
    shrink = dict(answer.shrink)
    return {
        device.id: device.usable_bytes
        - sum(
            h.bytes_on(device.id) - (shrink.get(h.id, 0) if h.bytes_on(device.id) else 0)
            for h in view.holders
            if h.id not in gone
        )
        for device in view.devices
    }


def could_when_empty(view: ClusterView, demand: Demand) -> bool:
    for num_parts in range(1, demand.max_parts + 1):
        share = demand if num_parts == 1 else share_of(demand, num_parts)
        for node in {device.node for device in view.devices}:
            fit = [d for d in view.devices if d.node == node and least_bytes(share) <= d.usable_bytes]
            if len(fit) >= num_parts:
                return True
    return False


@settings(max_examples=600)
@given(split_views(), split_demands())
def test_every_part_fits_its_device_and_all_parts_stand_on_one_node(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan):
        return
    free = free_after(view, answer)
    assert all(part.num_bytes <= free[part.device] for part in answer.parts)
    assert len({part.device for part in answer.parts}) == len(answer.parts) <= demand.max_parts
    nodes = {device.id: device.node for device in view.devices}
    assert len({nodes[part.device] for part in answer.parts}) == 1
    assert answer.needed_bytes >= demand.base_bytes + answer.kv_cache_bytes
    assert answer.kv_cache_bytes >= demand.kv_floor_bytes


@settings(max_examples=600)
@given(split_views(), split_demands())
def test_host_memory_holds_everybody_who_is_sent_there_beside_the_one_that_wakes(
    view: ClusterView, demand: Demand
) -> None:
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan):
        return
    for node in view.nodes:
        there = [h for h in view.holders if h.node == node.id]
        asleep = [h for h in there if h.state is HolderState.ASLEEP and h.id not in answer.evict]
        to_sleep = [h for h in there if h.id in answer.sleep]
        assert not to_sleep or sum(h.sleep_bytes or 0 for h in (*asleep, *to_sleep)) <= node.sleep_bytes
    sleepers = {h.id: h for h in view.holders if h.state is HolderState.ASLEEP}
    assert not any(sleepers[i].pinned and sleepers[i].model != "new" for i in answer.evict if i in sleepers)


@settings(max_examples=600)
@given(split_views(), split_demands())
def test_never_is_said_exactly_when_no_empty_device_nor_devices_could_hold_it(
    view: ClusterView, demand: Demand
) -> None:
    answer = plan(view, demand, RULES)
    never = isinstance(answer, Refusal) and answer.obstacle is Obstacle.NEVER
    assert never == (not could_when_empty(view, demand))


@settings(max_examples=600)
@given(split_views(), split_demands())
def test_a_refusal_for_now_becomes_a_plan_when_nobody_but_pinned_models_is_there(
    view: ClusterView, demand: Demand
) -> None:
    answer = plan(view, demand, RULES)
    if isinstance(answer, Refusal) and answer.obstacle is not Obstacle.NEVER:
        rest = tuple(h for h in view.holders if h.pinned and h.state is not HolderState.COMING)
        later = plan(replace(view, holders=rest), demand, RULES)
        assert isinstance(later, Plan) == (answer.obstacle is not Obstacle.PINNED)
        assert answer.obstacle is not Obstacle.SOON or 0 < answer.retry_in_s <= 60


@settings(max_examples=600)
@given(split_views(), split_demands())
def test_nobody_leaves_a_device_needlessly_when_a_model_is_split(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan) or len(answer.parts) < 2:
        return
    share = share_of(demand, len(answer.parts))
    awake = [h.id for h in view.holders if h.state is HolderState.READY]
    for spared in (i for i in (*answer.sleep, *answer.evict) if i in awake):
        free = free_after(view, answer, spared)
        assert any(free[part.device] < share.base_bytes + share.kv_context_bytes for part in answer.parts)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 10), st.integers(0, 9), st.booleans()), min_size=1, max_size=8
    ),
    st.integers(1, 120),
)
def test_no_other_set_of_models_would_free_enough_at_less_loss(
    sizes: list[tuple[int, int, int, bool]], lacking: int
) -> None:
    holders = [
        HolderView(f"w{i}", f"m{i}", (Part("d", size),), spare_bytes=min(size, spare), uses_per_s=use, busy=busy)
        for i, (size, spare, use, busy) in enumerate(sizes)
    ]
    room = Room(DeviceView("d", 1000), holders, sum(h.reserved_bytes for h in holders))
    leaving = [h for h in holders if not h.busy]
    hosts = Hosts(EMPTY_VIEW, "new")

    def freed(gone: tuple[HolderView, ...]) -> int:
        return sum(h.reserved_bytes if h in gone else h.spare_bytes for h in holders)

    enough = [
        sum(hosts.loss_of(h) for h in gone)
        for n in range(len(leaving) + 1)
        for gone in combinations(leaving, n)
        if freed(gone) >= lacking
    ]
    found = cheapest(room, leaving, lacking, hosts.loss_of)
    assert (found is None) == (not enough)
    if found is not None:
        assert found.freed_bytes >= lacking
        assert sum(hosts.loss_of(h) for h in found.victims) <= min(enough) * (1 + 1e-9)


def test_a_model_that_needs_two_busy_devices_waits_and_is_not_refused_for_good() -> None:
    devices = (DeviceView("g0", 100), DeviceView("g1", 100))
    held = tuple(HolderView(f"w{i}", f"m{i}", (Part(f"g{i}", 90),), busy=True) for i in range(2))
    answer = plan(ClusterView(devices, held, (), NOW_S), Demand("new", None, 150, 0, 0, 0, max_parts=2), RULES)
    assert isinstance(answer, Refusal)
    assert answer.obstacle is Obstacle.BUSY
    assert "m0, m1 on g0, g1" in answer.reason


def test_a_holder_of_both_devices_gives_way_once_and_its_neighbour_stays() -> None:
    devices = (DeviceView("g0", 100), DeviceView("g1", 100))
    both = HolderView("both", "both", (Part("g0", 60), Part("g1", 60)), uses_per_s=0.02, load_s=5)
    small = HolderView("small", "small", (Part("g1", 30),), uses_per_s=0.01, load_s=5)
    view = ClusterView(devices, (both, small), (), NOW_S)
    answer = plan(view, Demand("new", None, 125, 0, 0, 0, max_parts=2), RULES)
    assert isinstance(answer, Plan)
    assert answer.evict == ("both",)


def test_a_split_model_wakes_on_the_devices_it_fell_asleep_on() -> None:
    devices = tuple(DeviceView(f"g{i}", 100) for i in range(4))
    mine = HolderView(
        "w", "new", (), state=HolderState.ASLEEP, sleep_bytes=10, wakes_on=frozenset({"g2", "g3"}), wake_s=0.5
    )
    view = ClusterView(devices, (mine,), (NodeView("", 50),), NOW_S)
    answer = plan(view, Demand("new", None, 150, 0, 0, 0, max_parts=2, load_s=60, uses_per_s=0.1), RULES)
    assert isinstance(answer, Plan)
    assert (answer.wake, {part.device for part in answer.parts}) == ("w", {"g2", "g3"})


def test_a_model_that_finds_no_host_memory_counts_as_loaded_anew() -> None:
    """Equal but for host memory: the one whose node has no room to sleep is the dearer one to send away."""
    devices = (DeviceView("a0", 100, "a"), DeviceView("b0", 100, "b"))
    held = tuple(
        HolderView(f"w{n}", f"m{n}", (Part(f"{n}0", 100),), sleep_bytes=40, load_s=30, uses_per_s=0.1, node=n)
        for n in ("a", "b")
    )
    worth_more = HolderView("z", "z", (), state=HolderState.ASLEEP, sleep_bytes=40, load_s=90, uses_per_s=0.1, node="a")
    view = ClusterView(devices, (*held, worth_more), (NodeView("a", 40), NodeView("b", 40)), NOW_S)
    answer = plan(view, Demand("new", None, 50, 0, 0, 0), RULES)
    assert isinstance(answer, Plan)
    assert answer.sleep == ("wb",)


def test_half_of_a_kv_cache_and_one_cheap_model_go_rather_than_two_models() -> None:
    hot = HolderView("hot", "hot", (Part("g0", 60),), spare_bytes=20, busy=True, uses_per_s=2.0)
    cold = HolderView("cold", "cold", (Part("g0", 20),), uses_per_s=0.001)
    warm = HolderView("warm", "warm", (Part("g0", 20),), uses_per_s=0.1)
    view = ClusterView((DeviceView("g0", 100),), (hot, cold, warm), (), NOW_S)
    answer = plan(view, Demand("new", None, 35, 0, 0, 0), RULES)
    assert isinstance(answer, Plan)
    assert (answer.evict, answer.shrink) == (("cold",), (("hot", 15),))

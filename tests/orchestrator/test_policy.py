"""The placement policy, as properties over arbitrary clusters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy import (
    ClusterView,
    Demand,
    DeviceView,
    HolderView,
    Obstacle,
    Plan,
    Refusal,
    in_words,
    needed_on,
    plan,
)

DEVICES = ("cpu", "cuda:0", "cuda:1")


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    devices = tuple(DeviceView(name, draw(st.integers(0, 100))) for name in DEVICES[: draw(st.integers(1, 3))])
    left = {d.id: d.usable_bytes for d in devices}
    holders = []
    for index in range(draw(st.integers(0, 8))):
        device = draw(st.sampled_from(devices)).id
        size = draw(st.integers(0, left[device]))
        left[device] -= size
        holders.append(
            HolderView(
                id=f"w{index}",
                model=f"m{index}",
                device=device,
                reserved_bytes=size,
                busy=draw(st.booleans()),
                pinned=draw(st.booleans()),
                last_used_s=draw(st.integers(0, 20)),
            )
        )
    return ClusterView(devices, tuple(holders))


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    floor = draw(st.integers(0, 20))
    context = floor + draw(st.integers(0, 20))
    want = context + draw(st.integers(0, 50))
    device = draw(st.sampled_from((None, None, *DEVICES)))
    return Demand("new", device, draw(st.integers(0, 80)), floor, context, want, draw(st.integers(0, 3)))


def free_bytes(view: ClusterView, device: str, without: tuple[str, ...] = ()) -> int:
    usable = next(d.usable_bytes for d in view.devices if d.id == device)
    return usable - sum(h.reserved_bytes for h in view.holders if h.device == device and h.id not in without)


@given(views(), demands())
def test_a_plan_fits_its_device_once_its_victims_are_gone(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Plan):
        assert answer.needed_bytes == demand.base_bytes + answer.kv_cache_bytes
        assert answer.needed_bytes <= free_bytes(view, answer.device, answer.evict)
        assert demand.kv_floor_bytes <= answer.kv_cache_bytes <= demand.kv_want_bytes


@given(views(), demands())
def test_busy_and_pinned_models_are_never_evicted(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Plan):
        evicted = [h for h in view.holders if h.id in answer.evict]
        assert not any(h.busy or h.pinned for h in evicted)
        assert {h.device for h in evicted} <= {answer.device}


@given(views(), demands())
def test_a_pinned_device_is_respected(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Plan) and demand.device is not None:
        assert answer.device == demand.device


@given(views(), demands())
def test_nobody_is_evicted_when_the_model_fits_beside_them(view: ClusterView, demand: Demand) -> None:
    devices = [d for d in view.devices if demand.device in (None, d.id)]
    able = [d for d in devices if demand.base_bytes + demand.kv_floor_bytes <= d.usable_bytes]
    answer = plan(view, demand)
    if any(needed_on(d, demand) <= free_bytes(view, d.id) for d in able):
        assert isinstance(answer, Plan)
        assert answer.evict == ()


@given(views(), demands())
def test_no_victim_is_needless(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Plan):
        device = next(d for d in view.devices if d.id == answer.device)
        for spared in answer.evict:
            rest = tuple(v for v in answer.evict if v != spared)
            assert free_bytes(view, answer.device, rest) < needed_on(device, demand)


@given(views(), demands())
def test_a_spared_idle_model_of_equal_size_was_used_later_than_every_victim(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Plan):
        evicted = [h for h in view.holders if h.id in answer.evict]
        for spared in view.holders:
            idle = not (spared.busy or spared.pinned) and spared.device == answer.device
            if idle and spared.id not in answer.evict:
                for victim in evicted:
                    if victim.reserved_bytes == spared.reserved_bytes:
                        assert victim.last_used_s <= spared.last_used_s


@given(views(), demands())
def test_never_means_that_no_eligible_device_could_hold_it_even_empty(view: ClusterView, demand: Demand) -> None:
    devices = [d for d in view.devices if demand.device in (None, d.id)]
    least = demand.base_bytes + demand.kv_floor_bytes
    answer = plan(view, demand)
    never = isinstance(answer, Refusal) and answer.obstacle is Obstacle.NEVER
    assert never == all(d.usable_bytes < least for d in devices)
    if never and devices:
        assert isinstance(answer, Refusal)
        assert answer.lacking_bytes == least - max(d.usable_bytes for d in devices)


@given(views(), demands())
def test_a_model_that_waits_could_be_placed_once_everybody_unpinned_is_idle(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand)
    if isinstance(answer, Refusal) and answer.obstacle is not Obstacle.NEVER:
        idle = tuple(
            HolderView(h.id, h.model, h.device, h.reserved_bytes, False, h.pinned, h.last_used_s) for h in view.holders
        )
        later = plan(ClusterView(view.devices, idle), demand)
        assert isinstance(later, Plan) == (answer.obstacle is Obstacle.BUSY)


@given(views(), demands())
def test_every_answer_says_why(view: ClusterView, demand: Demand) -> None:
    assert plan(view, demand).reason


def test_the_emptiest_device_is_chosen() -> None:
    view = ClusterView((DeviceView("cuda:0", 50), DeviceView("cuda:1", 60)), ())
    answer = plan(view, Demand("m", None, 20, 0, 0, 0))
    assert isinstance(answer, Plan)
    assert answer.device == "cuda:1"


def test_the_kv_cache_takes_a_fair_share_when_other_models_are_to_come() -> None:
    view = ClusterView((DeviceView("cpu", 100),), ())
    answer = plan(view, Demand("m", None, 20, 5, 10, 1000, num_others=3))
    assert isinstance(answer, Plan)
    assert answer.kv_cache_bytes == 20


def test_a_context_larger_than_the_device_shrinks_to_what_is_left() -> None:
    answer = plan(ClusterView((DeviceView("cpu", 100),), ()), Demand("m", None, 20, 5, 1000, 1000))
    assert isinstance(answer, Plan)
    assert answer.kv_cache_bytes == 80


def test_sizes_are_told_in_words() -> None:
    assert [in_words(n) for n in (5, 2048, 3 * 2**20, 3 * 2**29)] == ["5 B", "2.0 KiB", "3.0 MiB", "1.5 GiB"]

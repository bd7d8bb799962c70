"""The placement policy: properties over arbitrary clusters, then what it is expected to choose."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy import plan
from orchestrator.policy.room import least_bytes
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
    in_words,
)

DEVICES = (DeviceView("cpu", 0), DeviceView("cuda:0", 0), DeviceView("cuda:1", 0), DeviceView("far/cpu", 0, "far"))
NOW_S = 1000.0
RULES = Rules(min_residency_s=5, max_wait_s=30)


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    devices = [replace(d, usable_bytes=draw(st.integers(0, 100))) for d in DEVICES[: draw(st.integers(1, 4))]]
    left = {d.id: d.usable_bytes for d in devices}
    sleep_left = {"": draw(st.integers(0, 60)), "far": 20}
    nodes = tuple(NodeView(name, num_bytes) for name, num_bytes in sleep_left.items())
    holders = []
    for index in range(draw(st.integers(0, 9))):
        device = draw(st.sampled_from(devices))
        state = draw(st.sampled_from(HolderState))
        sleep_bytes = draw(st.one_of(st.none(), st.integers(0, 20)))
        size = 0 if state is HolderState.ASLEEP else draw(st.integers(0, left[device.id]))
        if state is HolderState.ASLEEP:
            sleep_bytes = min(sleep_bytes or 0, sleep_left[device.node])
            sleep_left[device.node] -= sleep_bytes
        left[device.id] -= size
        holders.append(
            HolderView(
                id=f"w{index}",
                model=draw(st.sampled_from(("new", "m", "n"))) if state is HolderState.ASLEEP else f"m{index}",
                parts=(Part(device.id, size),) if size else (),
                state=state,
                busy=state is HolderState.COMING or draw(st.booleans()),
                pinned=draw(st.booleans()),
                last_used_s=NOW_S - draw(st.integers(0, 100)),
                ready_since_s=NOW_S - draw(st.integers(0, 20)),
                spare_bytes=draw(st.integers(0, size)) if state is HolderState.READY else 0,
                sleep_bytes=sleep_bytes,
                load_s=draw(st.integers(1, 30)),
                wake_s=draw(st.integers(0, 1)),
                uses_per_s=draw(st.sampled_from((0.0, 0.001, 0.1, 2.0))),
                group=draw(st.sampled_from(("", "g"))),
                batch=draw(st.booleans()),
                node=device.node,
            )
        )
    return ClusterView(tuple(devices), tuple(holders), nodes, NOW_S, draw(st.sampled_from((frozenset(), {"g"}))))  # type: ignore[arg-type]


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    floor = draw(st.integers(0, 20))
    context = floor + draw(st.integers(0, 20))
    return Demand(
        model="new",
        device=draw(st.sampled_from((None, None, None, "cpu", "cuda:1"))),
        base_bytes=draw(st.integers(1, 120)),
        kv_floor_bytes=floor,
        kv_context_bytes=context,
        kv_want_bytes=context + draw(st.integers(0, 50)),
        num_others=draw(st.integers(0, 3)),
        max_parts=draw(st.sampled_from((1, 1, 2, 3))),
        waited_s=draw(st.sampled_from((0.0, 10.0, 40.0))),
        batch=draw(st.booleans()),
        replica=draw(st.booleans()),
        group=draw(st.sampled_from(("", "g"))),
    )


def after(view: ClusterView, answer: Plan) -> dict[str, int]:
    """Return what is held on each device once the plan has been carried out."""
    gone = {*answer.sleep, *answer.evict}
    held = {d.id: sum(h.bytes_on(d.id) for h in view.holders if h.id not in gone) for d in view.devices}
    by_id = {h.id: h for h in view.holders}
    for holder_id, num_bytes in answer.shrink:
        held[by_id[holder_id].parts[0].device] -= num_bytes
    for part in answer.parts:
        held[part.device] += part.num_bytes
    return held


@settings(max_examples=400)
@given(views(), demands())
def test_a_plan_keeps_every_device_and_the_host_memory_within_their_budgets(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan):
        return
    held = after(view, answer)
    for device in view.devices:
        if any(part.device == device.id for part in answer.parts):
            assert held[device.id] <= device.usable_bytes
    by_id = {h.id: h for h in view.holders}
    for node in view.nodes:
        asleep = [h for h in view.holders if h.state is HolderState.ASLEEP and h.node == node.id]
        before = sum(h.sleep_bytes or 0 for h in asleep)
        slept = [by_id[i] for i in answer.sleep if by_id[i].node == node.id]
        total = sum(h.sleep_bytes or 0 for h in [*(h for h in asleep if h.id not in answer.evict), *slept])
        assert total <= max(node.sleep_bytes, before)
        assert not slept or total <= node.sleep_bytes


@settings(max_examples=400)
@given(views(), demands())
def test_nobody_who_must_stay_gives_way(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan):
        return
    by_id = {h.id: h for h in view.holders}
    turn = demand.waited_s >= RULES.max_wait_s and not demand.batch
    for holder in (by_id[i] for i in {*answer.sleep, *answer.evict}):
        assert holder.state is not HolderState.COMING
        if holder.state is HolderState.ASLEEP:
            continue
        assert not holder.pinned
        assert turn or not holder.busy
        assert turn or NOW_S - holder.ready_since_s >= RULES.min_residency_s
        if demand.batch:
            assert holder.batch or NOW_S - holder.last_used_s >= RULES.max_wait_s
    for holder_id, num_bytes in answer.shrink:
        assert 0 < num_bytes <= by_id[holder_id].spare_bytes
        assert by_id[holder_id].state is HolderState.READY
    if demand.replica:
        assert (answer.sleep, answer.evict, answer.shrink, answer.wake) == ((), (), (), "")


@settings(max_examples=300)
@given(views(), demands())
def test_nobody_gives_way_needlessly(view: ClusterView, demand: Demand) -> None:
    """With any one of the named holders left in peace, the model would not fit with one full context."""
    answer = plan(view, demand, RULES)
    if not isinstance(answer, Plan) or len(answer.parts) != 1:
        return
    (part,) = answer.parts
    by_id = {h.id: h for h in view.holders}
    held = after(view, answer)[part.device] - part.num_bytes
    usable = next(d.usable_bytes for d in view.devices if d.id == part.device)
    apart = bool(demand.group) and demand.group in view.apart
    for holder in (by_id[i] for i in (*answer.sleep, *answer.evict)):
        if holder.state is HolderState.READY and not (apart and holder.group == demand.group):
            assert held + holder.bytes_on(part.device) + demand.base_bytes + demand.kv_context_bytes > usable
    if answer.shrink and not (answer.sleep or answer.evict):
        given = sum(num_bytes for _, num_bytes in answer.shrink)
        assert held + given + demand.base_bytes + demand.kv_context_bytes > usable


@settings(max_examples=300)
@given(views(), demands())
def test_never_is_said_exactly_when_no_empty_device_could_hold_it(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, replace(demand, max_parts=1), RULES)
    candidates = [d for d in view.devices if demand.device in (None, d.id)]
    could = any(least_bytes(demand) <= d.usable_bytes for d in candidates)
    assert (isinstance(answer, Refusal) and answer.obstacle is Obstacle.NEVER) == (not could)
    if isinstance(answer, Refusal):
        assert answer.reason
        assert answer.obstacle not in (Obstacle.NEVER, Obstacle.PINNED) or answer.advice


@given(views(), demands())
def test_what_fits_disturbs_nobody(view: ClusterView, demand: Demand) -> None:
    need = demand.base_bytes + demand.kv_context_bytes
    apart = demand.group in view.apart
    room = any(
        need <= d.usable_bytes - sum(h.bytes_on(d.id) for h in view.holders)
        for d in view.devices
        if demand.device in (None, d.id)
    )
    answer = plan(view, demand, RULES)
    if room and not apart:
        assert isinstance(answer, Plan)
        if answer.wake and (answer.shrink or answer.sleep or answer.evict):
            return  # Woken where it sleeps, rather than loaded anew where there is room.
        assert (answer.shrink, answer.sleep) == ((), ())
        assert all(h.model == "new" for h in view.holders if h.id in answer.evict)


@given(views(), demands())
def test_models_of_a_group_apart_never_share_a_device(view: ClusterView, demand: Demand) -> None:
    answer = plan(view, demand, RULES)
    if isinstance(answer, Plan) and demand.group and demand.group in view.apart:
        gone = {*answer.sleep, *answer.evict}
        for part in answer.parts:
            on = [h for h in view.holders if h.bytes_on(part.device) and h.id not in gone]
            assert all(h.group != demand.group or h.model == demand.model for h in on)


@given(views(), demands())
def test_the_same_question_has_the_same_answer(view: ClusterView, demand: Demand) -> None:
    assert plan(view, demand, RULES) == plan(view, demand, RULES)


# ------------------------------------------------------------ what it chooses


def holder(name: str, num_bytes: int, device: str = "gpu0", **fields: object) -> HolderView:
    values: dict[str, object] = {"last_used_s": 900.0, "ready_since_s": 0.0, "load_s": 10.0, "wake_s": 0.5}
    return HolderView(name, name, (Part(device, num_bytes),), **(values | fields))  # type: ignore[arg-type]


def asleep(name: str, **fields: object) -> HolderView:
    return replace(holder(name, 1, **fields), parts=(), state=HolderState.ASLEEP)


def cluster(*holders: HolderView, devices: tuple[int, ...] = (100,), sleep: int = 0) -> ClusterView:
    named = tuple(DeviceView(f"gpu{i}", size) for i, size in enumerate(devices))
    return ClusterView(named, holders, (NodeView("", sleep),), NOW_S)


def want(num_bytes: int, **fields: object) -> Demand:
    return Demand("new", None, num_bytes, 0, 0, 0, **fields)  # type: ignore[arg-type]


def planned(view: ClusterView, demand: Demand, rules: Rules = RULES) -> Plan:
    answer = plan(view, demand, rules)
    assert isinstance(answer, Plan), answer
    return answer


def test_of_two_free_devices_the_one_with_fewer_busy_models_is_taken() -> None:
    view = cluster(holder("a", 10, busy=True), holder("b", 40, "gpu1"), devices=(100, 100))
    assert planned(view, want(50)).parts[0].device == "gpu1"


def test_a_small_model_does_not_break_up_the_largest_hole() -> None:
    view = cluster(holder("a", 60, "gpu1"), devices=(100, 100))
    assert planned(view, want(30)).parts[0].device == "gpu1"


def test_a_kv_cache_shrinks_before_anybody_leaves() -> None:
    view = cluster(holder("a", 60, spare_bytes=30, busy=True), holder("b", 40))
    answer = planned(view, want(25))
    assert (answer.shrink, answer.evict) == ((("a", 25),), ())
    assert "KV cache of a gives room" in answer.reason


def test_the_model_that_is_least_likely_to_be_missed_goes() -> None:
    view = cluster(holder("hot", 50, uses_per_s=0.1, last_used_s=990), holder("cold", 50, uses_per_s=0.001))
    assert planned(view, want(40)).evict == ("cold",)


def test_a_rare_model_that_loads_for_minutes_stays_before_a_frequent_one_that_loads_at_once() -> None:
    view = cluster(holder("huge", 50, uses_per_s=0.01, load_s=200), holder("tiny", 50, uses_per_s=0.05, load_s=1))
    assert planned(view, want(40)).evict == ("tiny",)


def test_two_cheap_models_go_rather_than_one_dear_one() -> None:
    dear = holder("dear", 50, uses_per_s=0.5)
    view = cluster(dear, holder("a", 25, uses_per_s=0.01), holder("b", 25, uses_per_s=0.01))
    assert set(planned(view, want(50)).evict) == {"a", "b"}


def test_what_was_just_brought_up_stays_for_a_while() -> None:
    view = cluster(holder("a", 100, ready_since_s=NOW_S - 2))
    answer = plan(view, want(50), RULES)
    assert isinstance(answer, Refusal)
    assert (answer.obstacle, answer.retry_in_s) == (Obstacle.SOON, 3.0)


def test_whoever_has_waited_long_enough_gets_a_turn_at_a_busy_models_cost() -> None:
    view = cluster(holder("a", 100, busy=True))
    before = plan(view, want(50, waited_s=29.0), RULES)
    assert isinstance(before, Refusal)
    assert before.obstacle is Obstacle.BUSY
    assert "its turn comes in 1 s" in before.reason
    assert planned(view, want(50, waited_s=30.0)).evict == ("a",)
    assert isinstance(plan(view, want(50, waited_s=99.0, batch=True), RULES), Refusal)


def test_an_idle_model_goes_before_a_busy_one_even_when_it_is_a_turn() -> None:
    view = cluster(holder("busy", 50, busy=True, uses_per_s=0.0), holder("idle", 50, uses_per_s=9.0))
    assert planned(view, want(50, waited_s=60.0)).evict == ("idle",)


def test_a_model_too_large_for_one_device_is_split_over_the_fewest_of_one_node() -> None:
    view = cluster(devices=(100, 100, 100))
    answer = planned(view, want(150, max_parts=4))
    assert [part.device for part in answer.parts] == ["gpu0", "gpu1"]
    assert all(75 <= part.num_bytes <= 100 for part in answer.parts)
    far = ClusterView((DeviceView("gpu0", 100), DeviceView("far/gpu0", 100, "far")), ())
    assert isinstance(plan(far, want(150, max_parts=4), RULES), Refusal)


def test_a_model_that_one_device_can_hold_waits_for_it_rather_than_being_split() -> None:
    demand = want(75, max_parts=4)
    busy = cluster(holder("a", 50, busy=True), holder("b", 50, "gpu1", busy=True), devices=(100, 100))
    refusal = plan(busy, demand, RULES)
    assert isinstance(refusal, Refusal)
    assert refusal.obstacle is Obstacle.BUSY
    # What is pinned will not go: there is no other way then.
    pinned = cluster(holder("a", 50, pinned=True), holder("b", 50, "gpu1", pinned=True), devices=(100, 100))
    assert len(planned(pinned, demand).parts) == 2


def test_a_refusal_for_good_says_what_is_lacking_and_what_would_help() -> None:
    demand = Demand("new", None, 110, 20, 30, 40, quantized_bytes=(("int8", 60), ("int4", 35)))
    answer = plan(cluster(), demand, RULES)
    assert isinstance(answer, Refusal)
    assert (answer.obstacle, answer.needed_bytes, answer.lacking_bytes) == (Obstacle.NEVER, 130, 30)
    assert answer.advice == ("With quantize: int8 it would need 80 B.",)
    small = plan(cluster(), Demand("new", None, 90, 20, 30, 40), RULES)
    assert isinstance(small, Refusal)
    assert "max_context_tokens" in small.advice[0]


def test_pinned_models_in_the_way_are_named() -> None:
    answer = plan(cluster(holder("a", 100, pinned=True)), want(50), RULES)
    assert isinstance(answer, Refusal)
    assert (answer.obstacle, answer.advice) == (Obstacle.PINNED, ("Unpin one: hostler unpin a.",))


def test_sizes_are_told_for_people() -> None:
    assert [in_words(n) for n in (0, 1023, 1536, 3 * 2**20, 5 * 2**30)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB",
    ]  # fmt: skip

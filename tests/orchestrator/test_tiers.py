"""Sleep, wake, resize, blanks, replicas, keep-alive, foreign memory: the scheduler's ways to use memory well.

The policy's choices are scripted here where they are not the point. Fake effects, manual clock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from hostler.errors import InvalidRequest, ModelNeverFits, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events, policy
from orchestrator.devices import Device
from orchestrator.effects import FoundWorker, Memory, Placement
from orchestrator.models import Footprint
from orchestrator.views import ClusterView, Demand, Part, Plan, Refusal, Rules
from tests.orchestrator.conftest import MB, FakeEffects, FakeWorker, Rig

Start = Callable[..., Awaitable[Rig]]
Choice = Callable[[ClusterView, Demand], Plan | Refusal]
GB = 1000 * MB


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Choice], None]:
    """Return a function that makes the policy's choice for one model the test's."""
    choices: dict[str, Choice] = {}
    real = policy.plan

    def plan(view: ClusterView, demand: Demand, rules: Rules = Rules()) -> Plan | Refusal:
        return choices[demand.model](view, demand) if demand.model in choices else real(view, demand, rules)

    monkeypatch.setattr(policy, "plan", plan)
    return choices.__setitem__


def instead_of(victim: str, how: str) -> Choice:
    """Place the model where `victim` is, which is to "sleep" or be "evict"ed."""

    def choice(view: ClusterView, demand: Demand) -> Plan | Refusal:
        holders = [h for h in view.holders if h.model == victim and h.parts]
        asleep = next((h.id for h in view.holders if h.model == demand.model and not h.parts), "")
        part = Part("cpu", demand.base_bytes)
        named = {how: tuple(h.id for h in holders)}
        return replace(Plan(demand.model, (part,), 0, f"in place of {victim}", wake=asleep), **named)  # type: ignore[arg-type]

    return choice


async def two_in_turn(start: Start, choose: Callable[[str, Choice], None]) -> Rig:
    """One device for one of two models; b has just taken the place of a, which sleeps."""
    choose("b", instead_of("a", "sleep"))
    choose("a", instead_of("b", "sleep"))
    rig = await start("a", "b", budget=60 * MB, sleep=GB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    caller = await rig.ensure("b")
    assert caller.ready is not None
    return rig


async def test_a_model_that_makes_room_sleeps_and_wakes_in_its_old_process(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
    assert rig.worker("a").asleep
    await rig.advance_heard(3)
    caller = await rig.ensure("a")
    assert caller.ready is not None
    assert caller.ready.generation == 1
    assert "wake" in caller.stages
    assert effects.calls.count("load:a") == 1
    assert (await rig.routes())["b"].state == pb.MODEL_STATE_ASLEEP


async def test_the_next_model_waits_until_the_sleeper_has_freed_the_device(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    choose("b", instead_of("a", "sleep"))
    rig = await start("a", "b", budget=60 * MB, sleep=GB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    gate = effects.hold("sleep")
    caller = await rig.ensure("b")
    assert caller.ready is None
    assert (await rig.routes())["a"].replicas == []
    assert "load:b" not in effects.calls
    gate.set()
    await rig.settle()
    assert caller.ready is not None


async def test_a_caller_of_a_model_that_is_falling_asleep_waits_and_wakes_it(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    choose("b", instead_of("a", "sleep"))
    choose("a", instead_of("nobody", "sleep"))
    rig = await start("a", "b", budget=100 * MB, sleep=GB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    gate = effects.hold("sleep")
    await rig.ensure("b")
    caller = await rig.ensure("a")
    assert caller.ready is None
    gate.set()
    await rig.settle()
    assert caller.ready is not None
    assert caller.ready.generation == 1
    assert effects.calls.count("load:a") == 1


async def test_one_that_cannot_sleep_is_sent_away_instead(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    choose("b", instead_of("a", "sleep"))
    rig = await start("a", "b", budget=60 * MB, sleep=GB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    effects.sleep_error = InvalidRequest("this engine cannot")
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert rig.worker("a").killed
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED


async def test_a_sleeper_that_dies_just_goes(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    rig.worker("a").break_stream()
    await rig.settle()
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED
    assert effects.calls.count("load:a") == 1
    assert (await rig.ensure("a")).ready is not None
    assert effects.calls.count("load:a") == 2


async def test_sleepers_go_when_other_programs_need_the_host_memory(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    effects.host_spare_bytes = 0
    await rig.advance_heard(3)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
    effects.host_spare_bytes = -1
    await rig.advance_heard(3)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED
    assert (await rig.routes())["b"].state == pb.MODEL_STATE_READY
    told = [e.why async for e in rig.scheduler.watch_events(0, past_only=True) if e.kind == pb.EVENT_KIND_EVICTED]
    assert len(told) == 1
    assert "other programs need the host memory" in told[0]


async def test_no_more_sleepers_go_than_are_needed(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    for name, victim in (("a", "none"), ("b", "a"), ("c", "b")):
        choose(name, instead_of(victim, "sleep"))
    rig = await start("a", "b", "c", budget=60 * MB, sleep=GB)
    for name in "abc":
        await rig.ensure(name)
        await rig.advance_heard(3)
    effects.host_spare_bytes = -1
    for _ in range(12):  # a measurement, and several ticks before the next
        await rig.advance(0.25)
        if effects.calls[-1].startswith("kill"):
            effects.host_spare_bytes = 0
    asleep = [name for name, route in (await rig.routes()).items() if route.state == pb.MODEL_STATE_ASLEEP]
    assert len(asleep) == 1


async def test_nobody_goes_to_sleep_where_other_programs_left_no_room(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    held = rig.scheduler._cluster.sleep_used_bytes("")
    for spare, room in ((None, GB), (10 * GB, GB), (5 * MB, held + 5 * MB), (-2 * held, 0)):
        effects.host_spare_bytes = spare
        await rig.scheduler._inventory._measure_hosts()
        await rig.settle()
        assert rig.scheduler._cluster.sleep_room_bytes("") == room
        assert [node.sleep_bytes for node in rig.scheduler._cluster.view(0.0).nodes] == [room]


async def test_one_that_cannot_wake_is_replaced_by_a_load(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    effects.wake_errors = [WorkerLost("it froze")]
    await rig.advance_heard(3)
    caller = await rig.ensure("a")
    await rig.advance_heard(2)
    assert caller.ready is not None
    assert caller.ready.generation > 2
    assert effects.calls.count("load:a") == 2


async def test_a_neighbour_shrinks_its_kv_cache_and_the_load_waits_for_it(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    def choice(view: ClusterView, demand: Demand) -> Plan | Refusal:
        (a,) = view.holders
        if a.bytes_on("cpu") == 60 * MB:
            return Plan("b", (Part("cpu", 40 * MB),), 0, "beside a", shrink=((a.id, 20 * MB),))
        assert a.bytes_on("cpu") == 40 * MB
        return Plan("b", (Part("cpu", 40 * MB),), 0, "beside a")

    choose("b", choice)
    effects.stored["a"] = Footprint(20 * MB)
    rig = await start({"name": "a", "kv_cache": 40 * MB}, "b", budget=80 * MB)
    await rig.ensure("a")
    gate = effects.hold("resize")
    caller = await rig.ensure("b")
    assert caller.ready is None
    gate.set()
    await rig.settle()
    assert caller.ready is not None
    assert rig.worker("a").kv_cache_bytes == 20 * MB
    status = await rig.scheduler.status()
    assert status.devices[0].reserved_bytes == 80 * MB


async def test_a_plan_whose_room_does_not_come_is_made_anew(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    asked: list[int] = []

    def choice(view: ClusterView, demand: Demand) -> Plan | Refusal:
        (a,) = view.holders
        asked.append(a.bytes_on("cpu"))
        if len(asked) == 1:
            return Plan("b", (Part("cpu", 40 * MB),), 0, "beside a", shrink=((a.id, 20 * MB),))
        return Plan("b", (Part("cpu", 30 * MB),), 0, "smaller, beside a")

    choose("b", choice)
    effects.stored["a"] = Footprint(20 * MB)
    effects.resized_at_least = 30 * MB
    rig = await start({"name": "a", "kv_cache": 40 * MB}, "b", budget=80 * MB)
    await rig.ensure("a")
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert asked == [60 * MB, 50 * MB]


async def test_a_lost_device_takes_its_workers_along_and_they_come_back_elsewhere(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "a", "device": None}, "b")
    two = (Device("cpu", "cpu", "CPU", 0, 100 * MB), Device("far/cpu", "cpu", "CPU", 0, 100 * MB, node="far"))
    rig.scheduler.post(events.DevicesChanged(two, "a node joined", {"": 0, "far": 0}))
    await rig.settle()
    await rig.ensure("a")
    await rig.ensure("b")
    nodes = {w.request.model: w.node for w in effects.by_id.values() if w.request}
    assert sorted(nodes.values()) == ["", "far"]
    lost, kept = (name for name, _ in sorted(nodes.items(), key=lambda item: item[1], reverse=True))
    rig.scheduler.post(events.DevicesChanged(two[:1], "the node far is gone", {"": 0}))
    await rig.settle()
    route = (await rig.routes())[lost]
    assert [r.generation for r in route.replicas] == [3]
    assert rig.worker(lost).node == ""
    assert not rig.worker(kept).killed


async def test_a_sleeping_worker_is_adopted_asleep_and_a_blank_one_as_a_blank(
    start: Start, effects: FakeEffects
) -> None:
    sleeper, blank = FakeWorker("old1", 5), FakeWorker("old2", 0)
    sleeper.request, sleeper.asleep = life.LoadRequest(model="a"), True
    effects.by_id = {"old1": sleeper, "old2": blank}
    asleep = life.WatchResponse(
        state=life.WORKER_STATE_ASLEEP, generation=5, pid=7, info=life.ModelInfo(model="a"), host_bytes=3 * MB
    )
    placement = Placement("old1", 5, "a", (), 0, "it slept", 5)
    effects.found = (
        FoundWorker("old1", asleep, placement),
        FoundWorker("old2", life.WatchResponse(state=life.WORKER_STATE_BLANK, pid=8)),
    )
    effects.memory = Memory(5, (placement,))
    rig = await start("a", "b", sleep=GB, warm_workers=1)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert caller.ready.id == "old2"


async def test_events_tell_what_happened_and_why(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    rig = await two_in_turn(start, choose)
    told = [event async for event in rig.scheduler.watch_events(0, past_only=True)]
    assert [(pb.EventKind.Name(e.kind).removeprefix("EVENT_KIND_"), e.model) for e in told] == [
        ("PLACED", "a"), ("READY", "a"), ("ASLEEP", "a"), ("PLACED", "b"), ("READY", "b"),
    ]  # fmt: skip
    assert "in place of a" in told[2].why
    last = [event.number async for event in rig.scheduler.watch_events(2, past_only=True)]
    assert last == [4, 5]


async def test_what_can_never_fit_is_told_with_advice(
    start: Start, effects: FakeEffects, choose: Callable[[str, Choice], None]
) -> None:
    from orchestrator.views import Obstacle

    choose("a", lambda view, demand: Refusal(Obstacle.NEVER, 9, 3, "a needs 9 B", advice=("Try quantize: int8.",)))
    rig = await start("a")
    caller = await rig.ensure("a")
    assert isinstance(caller.error, ModelNeverFits)
    assert "Try quantize: int8." in caller.error.message

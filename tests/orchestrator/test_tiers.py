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


async def test_a_blank_worker_stands_ready_and_the_next_load_claims_it(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", "c", budget=400 * MB, warm_workers=1)
    await rig.ensure("a")
    await rig.advance_heard(0.5)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1
    blank = next(w for w in effects.by_id.values() if not w.generation)
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert caller.ready.id == blank.id
    await rig.advance_heard(0.5)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1


async def test_no_blank_is_kept_once_every_model_is_up(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=400 * MB, warm_workers=2)
    await rig.ensure("a")
    await rig.advance_heard(1)
    await rig.ensure("b")
    await rig.advance_heard(2)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 0
    assert all(w.generation or w.killed for w in effects.by_id.values())


async def test_a_blank_that_dies_is_replaced_after_a_while(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", warm_workers=1)
    await rig.advance(1)
    (blank,) = effects.by_id.values()
    blank.break_stream()
    await rig.advance(1)
    assert blank.killed
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 0
    await rig.advance(6)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1


async def test_a_queue_brings_a_second_replica_and_quiet_takes_it_away(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "max_replicas": 2, "max_running": 2})
    await rig.ensure("a")
    first = rig.worker("a")
    for step in range(8):
        first.say(num_running=2, num_queued=1, num_steps=step)
        await rig.settle()
        await rig.advance(0.5)
    route = (await rig.routes())["a"]
    assert [r.generation for r in route.replicas] == [1, 2]
    await rig.advance_heard(70)
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [1]


async def test_a_second_replica_takes_only_free_room(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "max_replicas": 2, "max_running": 2}, "b", budget=90 * MB)
    await rig.ensure("b")
    await rig.ensure("a")
    for step in range(12):
        rig.worker("a").say(num_running=2, num_queued=1, num_steps=step)
        rig.worker("b").say(num_steps=0)
        await rig.settle()
        await rig.advance(0.5)
    routes = await rig.routes()
    assert [r.generation for r in routes["a"].replicas] == [2]
    assert routes["b"].state == pb.MODEL_STATE_READY
    assert routes["a"].failure == ""


async def test_an_idle_model_goes_to_sleep_after_its_keep_alive_and_later_for_good(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "a", "keep_alive": "10s"}, sleep=GB)
    await rig.ensure("a")
    await rig.advance_heard(9)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_READY
    await rig.advance_heard(2)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
    await rig.advance_heard(95)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED
    assert rig.worker("a").killed


async def test_a_request_may_ask_for_another_keep_alive(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "keep_alive": "1h"}, sleep=GB)
    await rig.ensure("a")
    rig.worker("a").say(num_steps=0)
    await rig.settle()
    rig.worker("a").say(num_steps=1, keep_alive_ms=4000)
    await rig.settle()
    for _ in range(10):
        rig.worker("a").say(num_steps=1, keep_alive_ms=4000)
        await rig.settle()
        await rig.advance(0.5)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP


async def test_without_host_memory_a_keep_alive_ends_in_unloading(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "keep_alive": "10s"})
    await rig.ensure("a")
    await rig.advance_heard(11)
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED


async def test_an_operator_puts_a_model_to_sleep(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", sleep=GB)
    await rig.ensure("a")
    assert await rig.scheduler.sleep("a") == 1
    await rig.settle()
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_ASLEEP
    status = await rig.scheduler.status()
    assert status.devices[0].reserved_bytes == 0
    assert status.nodes[0].sleep_used_bytes == MB


async def test_without_host_memory_sleep_is_refused_with_the_reason(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    with pytest.raises(InvalidRequest, match="sleep_memory"):
        await rig.scheduler.sleep("a")
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_READY


async def test_unloading_a_sleeper_ends_its_process(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", sleep=GB)
    await rig.ensure("a")
    await rig.scheduler.sleep("a")
    await rig.settle()
    assert await rig.scheduler.unload("a") == 1
    assert rig.worker("a").killed


async def test_a_load_that_is_less_than_half_done_goes_with_its_last_waiter(start: Start, effects: FakeEffects) -> None:
    effects.stored["a"] = Footprint(40 * MB)
    rig = await start("a")
    effects.hold("spawn")
    caller = await rig.ensure("a")
    await caller.leave()
    await rig.settle()
    effects.gates["spawn"].set()
    await rig.settle()
    assert "load:a" not in effects.calls
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED


async def test_a_worker_that_holds_more_than_it_was_given_pays_with_its_kv_cache_and_the_next_load_knows(
    start: Start, effects: FakeEffects
) -> None:
    effects.stored["a"] = Footprint(20 * MB)
    rig = await start({"name": "a", "kv_cache": 40 * MB})
    await rig.ensure("a")
    rig.worker("a").say(device_bytes=45 * MB, peak_device_bytes=45 * MB, kv_allocated_bytes=10 * MB)
    await rig.settle()
    assert rig.worker("a").kv_cache_bytes == 25 * MB
    assert (await rig.scheduler.status()).devices[0].reserved_bytes == 60 * MB
    assert "learned" in effects.calls
    await rig.scheduler.unload("a")
    assert (await rig.scheduler.plan("a")).needed_bytes == 75 * MB


async def test_a_full_kv_cache_grows_into_free_room(start: Start, effects: FakeEffects) -> None:
    effects.stored["a"] = Footprint(20 * MB, kv_bytes_per_token=1000, max_context_tokens=50_000)
    rig = await start({"name": "a", "max_running": 2}, "b", budget=130 * MB)
    await rig.ensure("b")
    await rig.ensure("a")
    before = rig.worker("a").kv_cache_bytes
    await rig.scheduler.unload("b")
    for step in range(14):
        rig.worker("a").say(kv_allocated_bytes=before, num_steps=step)
        await rig.settle()
        await rig.advance(0.5)
    assert before < rig.worker("a").kv_cache_bytes <= 100 * MB
    status = await rig.scheduler.status()
    assert status.devices[0].reserved_bytes <= status.devices[0].budget_bytes


async def test_what_other_programs_take_is_paid_by_kv_caches_then_by_idle_models(
    start: Start, effects: FakeEffects
) -> None:
    effects.stored["a"] = Footprint(20 * MB, kv_bytes_per_token=1000, max_context_tokens=5_000)
    rig = await start("a", "b", budget=180 * MB, sleep=GB)
    scheduler = rig.scheduler
    scheduler._cluster.devices["cpu"] = Device("cpu", "cuda", "GPU", 200 * MB, 180 * MB)
    await rig.ensure("a")
    await rig.ensure("b")
    await rig.advance_heard(3)
    scheduler.post(events.ForeignMeasured({"cpu": 110 * MB}))
    await rig.settle()
    scheduler._cluster.foreign_bytes = {"cpu": 110 * MB}
    for _ in range(3):
        for worker in effects.workers.values():
            worker.say()
        await rig.settle()
        scheduler.post(events.ForeignMeasured({"cpu": 110 * MB}))
        scheduler.post(events.Tick())
        await rig.settle()
    status = await scheduler.status()
    assert status.devices[0].reserved_bytes <= 90 * MB
    assert "resize:a" in effects.calls
    kinds = [event.kind async for event in scheduler.watch_events(0, past_only=True)]
    assert pb.EVENT_KIND_FOREIGN_MEMORY in kinds


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

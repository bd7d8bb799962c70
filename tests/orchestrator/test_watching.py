"""Watching workers: frozen, hung, crashed, stale, adopted. Fake effects, manual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hostler.errors import ModelLoadFailed, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.effects import FoundWorker, Memory, Placement
from tests.orchestrator.conftest import MB, FakeEffects, FakeWorker, Rig

Start = Callable[..., Awaitable[Rig]]


async def test_a_silent_worker_is_fenced_killed_and_replaced(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    silent = rig.worker("a")
    silent.say()
    await rig.settle()
    effects.hold("load:a")
    await rig.advance(20.5)
    assert silent.killed
    assert (await rig.routes())["a"].replicas == []
    effects.gates["load:a"].set()
    await rig.settle()
    route = (await rig.routes())["a"]
    assert [r.generation for r in route.replicas] == [2]


async def test_a_fenced_worker_leaves_the_routes_before_it_is_dead(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", budget=60 * MB)
    await rig.ensure("a")
    effects.hold("kill")
    rig.worker("a").break_stream(WorkerLost("connection reset"))
    await rig.settle()
    assert (await rig.routes())["a"].replicas == []
    assert not rig.worker("a").killed


async def test_a_worker_whose_end_fails_in_an_unforeseen_way_is_replaced_all_the_same(
    start: Start, effects: FakeEffects
) -> None:
    """A past bug: the effect's own exception left the dead worker in the ledger, and its model away for good."""
    rig = await start("a", budget=60 * MB)
    await rig.ensure("a")
    effects.kill_error = AssertionError("from a library")
    rig.worker("a").break_stream(WorkerLost("connection reset"))
    await rig.settle()
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [2]


async def test_an_eviction_goes_on_when_its_drain_fails_in_an_unforeseen_way(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    effects.drain_error = AssertionError("from a library")
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert rig.worker("a").killed


async def test_a_watch_that_fails_in_an_unforeseen_way_ends_like_one_that_breaks(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a")
    await rig.ensure("a")
    rig.worker("a").break_stream(AssertionError("from a library"))
    await rig.settle()
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [2]


async def test_a_thawed_worker_cannot_rejoin(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    old = rig.worker("a")
    await rig.advance(20.5)
    before = await rig.routes()
    rig.scheduler.post(events.Reported(1, life.WatchResponse(state=life.WORKER_STATE_READY, generation=1)))
    rig.scheduler.post(events.LoadDone(1, life.ModelInfo(model="a")))
    rig.scheduler.post(events.WatchEnded(1, "late"))
    await rig.settle()
    assert old.killed
    assert await rig.routes() == before
    assert [r.generation for r in before["a"].replicas] == [2]


async def test_a_report_of_another_generation_does_not_count_as_a_heartbeat(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    first = rig.worker("a")
    for _ in range(41):
        first.say(generation=99)
        await rig.advance(0.5)
    assert first.killed


async def test_a_crashed_worker_is_replaced_at_once(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    rig.worker("a").break_stream()
    await rig.settle()
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [2]


async def test_a_busy_worker_without_a_step_is_hung(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", step_budget_s=10)
    await rig.ensure("a")
    hung = rig.worker("a")
    for _ in range(24):
        hung.say(num_running=1, num_steps=7)
        await rig.advance(0.5)
    assert hung.killed


async def test_a_busy_worker_that_steps_is_left_alone(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", step_budget_s=10)
    await rig.ensure("a")
    for step in range(60):
        rig.worker("a").say(num_running=1, num_steps=step)
        await rig.advance(0.5)
    assert rig.worker("a").generation == 1


async def test_an_idle_worker_may_stand_still_for_ever(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", step_budget_s=2)
    await rig.ensure("a")
    await rig.advance_heard(30)
    assert rig.worker("a").generation == 1


async def test_a_worker_that_says_it_failed_is_replaced(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    rig.worker("a").say(life.WORKER_STATE_FAILED, failure="CUDA context is poisoned")
    await rig.settle()
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [2]


async def test_a_model_that_dies_three_times_in_a_minute_rests_until_asked_for(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a")
    await rig.ensure("a")
    for _ in range(3):
        rig.worker("a").break_stream()
        await rig.settle()
        await rig.advance_heard(3)
    route = (await rig.routes())["a"]
    assert route.state == pb.MODEL_STATE_FAILED
    assert "died 3 times" in route.failure
    assert effects.calls.count("load:a") == 3
    assert (await rig.ensure("a")).ready is not None


async def test_our_own_stall_is_not_the_workers_silence(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    await rig.advance(30, step_s=30)
    assert not rig.worker("a").killed
    await rig.advance_heard(5)
    assert rig.worker("a").generation == 1


async def test_a_silent_worker_is_noticed_even_when_every_tick_is_late(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    await rig.advance(60, step_s=1.2)
    assert rig.effects.workers[1].killed


async def test_a_talking_worker_is_left_alone_when_every_tick_is_late(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    for _ in range(10):
        rig.worker("a").say()
        await rig.advance(1.2, step_s=1.2)
    assert rig.worker("a").generation == 1


async def test_a_worker_lost_while_loading_keeps_its_waiters(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    gate = effects.hold("load:a")
    caller = await rig.ensure("a")
    rig.worker("a").break_stream(WorkerLost("killed"))
    await rig.settle()
    gate.set()
    await rig.advance_heard(2)
    assert caller.ready is not None
    assert caller.ready.generation == 2


async def test_a_worker_that_holds_its_interpreter_lock_for_seconds_is_left_alone(
    start: Start, effects: FakeEffects
) -> None:
    """A past bug: the first reply that followed a grammar cost its worker's life on a slow machine."""
    rig = await start("a")
    await rig.ensure("a")
    await rig.advance(10)
    assert not rig.worker("a").killed


async def test_a_loading_worker_may_be_silent_for_seconds(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    gate = effects.hold("load:a")
    caller = await rig.ensure("a")
    await rig.advance(10)
    assert not rig.worker("a").killed
    gate.set()
    await rig.settle()
    assert caller.ready is not None


def living(effects: FakeEffects, model: str, generation: int, state: int = life.WORKER_STATE_READY) -> FoundWorker:
    worker_id = f"old{generation}"
    worker = effects.by_id[worker_id] = FakeWorker(worker_id, generation)
    worker.request = life.LoadRequest(model=model)
    report = life.WatchResponse(
        state=state,  # type: ignore[arg-type]
        generation=generation,
        pid=77,
        info=life.ModelInfo(model=model),
        max_running=4,
    )
    return FoundWorker(
        worker_id, report, Placement(worker_id, generation, model, (("cpu", 40 * MB),), 0, "because", loaded_unix_ms=5)
    )


def remembered(*found: FoundWorker) -> Memory:
    return Memory(
        max(f.placement.generation for f in found if f.placement), tuple(f.placement for f in found if f.placement)
    )


async def test_a_living_worker_is_adopted_without_a_load(start: Start, effects: FakeEffects) -> None:
    effects.found = (living(effects, "a", 7),)
    effects.memory = remembered(*effects.found)
    rig = await start({"name": "a", "preload": True})
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [7]
    assert "load:a" not in effects.calls
    status = await rig.scheduler.status()
    assert status.replicas[0].reserved_bytes == 40 * MB
    assert status.replicas[0].reason == "because"
    effects.workers[7].break_stream()
    await rig.settle()
    assert [r.generation for r in (await rig.routes())["a"].replicas] == [8]


async def test_routes_are_held_back_until_it_is_known_who_lives(start: Start, effects: FakeEffects) -> None:
    effects.found = (living(effects, "a", 7),)
    effects.memory = remembered(*effects.found)
    gate = effects.hold("find")
    rig = await start({"name": "a", "preload": True})
    table = asyncio.ensure_future(rig.routes())
    caller = await rig.ensure("a")
    assert not table.done()
    assert effects.calls == ["list"]
    gate.set()
    await rig.settle()
    assert (await table)["a"].state == pb.MODEL_STATE_READY
    assert caller.ready is not None
    assert caller.ready.generation == 7


async def test_workers_that_cannot_be_adopted_are_ended(start: Start, effects: FakeEffects) -> None:
    loading = living(effects, "a", 3, life.WORKER_STATE_LOADING)
    unknown = living(effects, "forgotten", 4)
    older, newer = living(effects, "b", 5), living(effects, "b", 6)
    silent = FoundWorker("mute", None)
    effects.found = (loading, unknown, older, newer, silent)
    effects.memory = remembered(loading, unknown, older, newer)
    rig = await start("a", "b")
    kills = {call.removeprefix("kill:") for call in effects.calls if call.startswith("kill")}
    assert kills == {"old3", "old4", "old5", "mute"}
    routes = await rig.routes()
    assert routes["a"].state == pb.MODEL_STATE_UNLOADED
    assert [r.generation for r in routes["b"].replicas] == [6]
    caller = await rig.ensure("a")
    assert caller.ready is not None
    assert caller.ready.generation == 7


async def test_a_worker_that_an_earlier_orchestrator_was_just_starting_is_kept_once_it_is_up(
    start: Start, effects: FakeEffects
) -> None:
    """A past bug: nobody knew of it for ever, or it was ended while it started."""
    effects.found = (FoundWorker("late", None, started=False),)
    effects.memory = Memory(3)
    rig = await start("a", warm_workers=1)
    await rig.advance(1)
    assert "kill:late" not in effects.calls
    effects.by_id["late"] = FakeWorker("late")
    effects.found = (FoundWorker("late", life.WatchResponse(state=life.WORKER_STATE_BLANK, pid=8)),)
    await rig.advance(5)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1


async def test_what_never_answers_is_ended_in_the_end(start: Start, effects: FakeEffects) -> None:
    effects.found = (FoundWorker("mute", None, started=False),)
    rig = await start("a")
    await rig.advance(60)
    assert "kill:mute" not in effects.calls
    await rig.advance(15)
    assert effects.calls.count("kill:mute") == 1


async def test_stop_drains_every_worker_and_refuses_newcomers(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    gate = effects.hold("drain")
    rig.scheduler.post(events.Stop())
    await rig.settle()
    assert rig.worker("a").draining
    assert not rig.task.done()
    late = await rig.ensure("a")
    assert late.error is not None
    assert late.error.reason == "unavailable"
    gate.set()
    await asyncio.wait_for(rig.task, 1)
    assert rig.worker("a").unloaded
    assert effects.memory.placements == ()


async def test_versions_of_the_route_table_rise(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    watch = rig.scheduler.watch_routes()
    first = await anext(watch)
    await rig.ensure("a")
    second = await anext(watch)
    assert second.version > first.version


async def test_the_last_failure_is_a_named_error(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    effects.load_errors = [ModelLoadFailed("bad shapes")]
    caller = await rig.ensure("a")
    with pytest.raises(ModelLoadFailed, match="bad shapes"):
        raise caller.error or AssertionError

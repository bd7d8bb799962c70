"""Blank workers, replicas, keep-alive, measured memory, other programs: the scheduler's care for room.

Fake effects, manual clock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hostler.errors import InvalidRequest
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.devices import Device
from orchestrator.models import Footprint
from orchestrator.pool import CALM_S, PATIENCE_S
from orchestrator.views import ClusterView, Demand, Plan, Refusal
from tests.orchestrator.conftest import MB, FakeEffects, Rig

Start = Callable[..., Awaitable[Rig]]
Choice = Callable[[ClusterView, Demand], Plan | Refusal]
GB = 1000 * MB


async def test_a_blank_worker_stands_ready_and_the_next_load_claims_it(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", "c", budget=400 * MB, warm_workers=1)
    await rig.ensure("a")
    await rig.advance_heard(CALM_S + 0.5)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1
    blank = next(w for w in effects.by_id.values() if not w.generation)
    caller = await rig.ensure("b")
    assert caller.ready is not None
    assert caller.ready.id == blank.id
    await rig.advance_heard(CALM_S - 0.5)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 0
    await rig.advance_heard(1.0)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 1


async def test_no_blank_is_kept_once_every_model_is_up(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=400 * MB, warm_workers=2)
    await rig.ensure("a")
    await rig.advance_heard(1)
    await rig.ensure("b")
    await rig.advance_heard(2)
    assert (await rig.scheduler.status()).nodes[0].num_blank_workers == 0
    assert all(w.generation or w.killed for w in effects.by_id.values())


async def test_a_blank_is_started_when_nobody_is_served_or_has_been_for_long_enough(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a", "b", budget=400 * MB, warm_workers=1)
    assert (await rig.ensure("a")).ready is not None

    async def served_for(seconds: float) -> int:
        for _ in range(round(seconds / 0.5)):
            rig.worker("a").say(num_running=1)
            await rig.settle()
            await rig.advance(0.5)
        return (await rig.scheduler.status()).nodes[0].num_blank_workers

    rig.worker("a").say(num_running=1)
    await rig.settle()
    assert await served_for(PATIENCE_S - 1) == 0
    assert await served_for(2) == 1


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


async def test_a_load_that_is_given_up_leaves_the_worker_that_starts_to_the_next_one(
    start: Start, effects: FakeEffects
) -> None:
    """Ray holds the next start up when one that starts is killed."""
    rig = await start("a", "b", warm_workers=0)
    gate = effects.hold("spawn")
    first = await rig.ensure("a")
    await first.leave()
    await rig.settle()
    second = await rig.ensure("b")
    gate.set()
    await rig.settle()
    assert second.ready is not None
    assert not any(call.startswith("kill") for call in effects.calls)
    assert [worker.request.model for worker in effects.by_id.values() if worker.request] == ["b"]
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED


async def test_a_worker_that_starts_for_nobody_is_ended_once_it_is_up(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", warm_workers=0)
    gate = effects.hold("spawn")
    await (await rig.ensure("a")).leave()
    await rig.settle()
    assert not any(call.startswith("kill") for call in effects.calls)
    gate.set()
    await rig.advance(1)
    assert [worker.killed for worker in effects.by_id.values()] == [True]


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


async def test_what_a_first_load_left_behind_is_paid_for_but_not_asked_of_later_loads(
    start: Start, effects: FakeEffects
) -> None:
    effects.stored["a"] = Footprint(20 * MB)
    rig = await start({"name": "a", "kv_cache": 40 * MB})
    await rig.ensure("a")
    rig.worker("a").say(device_bytes=45 * MB, kv_allocated_bytes=10 * MB, loads_lighter=True)
    await rig.settle()
    assert rig.worker("a").kv_cache_bytes == 25 * MB
    await rig.scheduler.unload("a")
    assert (await rig.scheduler.plan("a")).needed_bytes == 60 * MB


async def test_what_a_split_model_holds_is_not_what_it_would_hold_whole(start: Start, effects: FakeEffects) -> None:
    effects.stored["a"] = Footprint(20 * MB)
    rig = await start({"name": "a", "kv_cache": 40 * MB})
    await rig.ensure("a")
    (worker,) = rig.scheduler._cluster.workers.values()
    worker.home = frozenset({"cpu", "cpu1"})
    rig.worker("a").say(device_bytes=95 * MB, kv_allocated_bytes=10 * MB)
    await rig.settle()
    await rig.scheduler.unload("a")
    assert (await rig.scheduler.plan("a")).needed_bytes == 60 * MB


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


async def test_a_model_that_takes_more_of_a_gpu_than_of_a_cpu_is_counted_as_where_it_goes(
    start: Start, effects: FakeEffects
) -> None:
    effects.stored["a"], effects.on_gpu["a"] = Footprint(40 * MB), Footprint(70 * MB)
    rig = await start({"name": "a", "device": None}, budget=100 * MB)
    assert (await rig.scheduler.plan("a")).needed_bytes == 40 * MB
    gpu = Device("cuda:0", "cuda", "GPU", 0, 100 * MB, uuid="GPU-0")
    rig.scheduler.post(events.DevicesChanged((gpu,), "a GPU", {"": 1000 * MB}))
    await rig.settle()
    assert (await rig.scheduler.plan("a")).needed_bytes == 70 * MB

"""Bringing models up: one load shared by all, eviction, attempts, cancellation. Fake effects, manual clock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hostler.config import ModelConfig
from hostler.errors import InvalidRequest, ModelLoadFailed, ModelNeverFits, ModelNotFound, Unavailable, WorkerLost
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator.effects import Memory, Placement
from orchestrator.experience import Experience, key_of
from orchestrator.models import Footprint, Located, ModelSpec, from_config, recipe
from tests.orchestrator.conftest import MB, FakeEffects, Rig

Start = Callable[..., Awaitable[Rig]]


async def test_a_model_comes_up_for_its_first_caller(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    caller = await rig.ensure("a")
    assert caller.ready is not None
    assert caller.ready.state == pb.MODEL_STATE_READY
    assert caller.ready.generation == 1
    route = (await rig.routes())["a"]
    assert route.state == pb.MODEL_STATE_READY
    assert [r.id for r in route.replicas] == [caller.ready.id]


async def test_all_who_wait_share_one_load_and_see_its_progress(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    gate = effects.hold("load:a")
    callers = [await rig.ensure("a") for _ in range(5)]
    assert all(c.stages[-1] == "read" for c in callers)
    assert callers[0].progress[-1].total_bytes == 10
    gate.set()
    await rig.settle()
    assert effects.calls.count("load:a") == 1
    assert len({c.ready.id for c in callers if c.ready}) == 1


async def test_a_ready_model_is_given_at_once(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    again = await rig.ensure("a")
    assert again.ready is not None
    assert again.stages == []
    assert effects.calls.count("load:a") == 1


async def test_an_alias_means_its_model(start: Start) -> None:
    rig = await start({"name": "a", "aliases": ["gpt-4"]})
    assert (await rig.ensure("gpt-4")).ready is not None


async def test_an_unknown_name_is_refused_with_the_nearest(start: Start, effects: FakeEffects) -> None:
    rig = await start("smollm")
    caller = await rig.ensure("smolm")
    assert isinstance(caller.error, ModelNotFound)
    assert "'smollm'" in caller.error.message
    assert not any(call.startswith("fetch") for call in effects.calls)


async def test_an_unknown_name_is_looked_up_in_the_store_once_more(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    effects.stored["pulled"] = Footprint(MB)
    effects.listed = (ModelSpec("pulled", "org/pulled", configured=False),)
    caller = await rig.ensure("pulled")
    assert caller.ready is not None
    route = (await rig.routes())["pulled"]
    assert (route.state, route.owned_by) == (pb.MODEL_STATE_READY, "org")


async def test_a_model_that_somebody_waits_for_is_not_forgotten_when_it_leaves_the_store(
    start: Start, effects: FakeEffects
) -> None:
    # Something is remembered, so living workers are looked for before anything is loaded.
    effects.memory = Memory(1, (Placement("w", 1, "a", (("cpu", MB),), 0, "", 0),))
    looking = effects.hold("find")
    rig = await start("a")
    effects.stored["pulled"] = Footprint(MB)
    effects.listed = (ModelSpec("pulled", "org/pulled", configured=False),)
    caller = await rig.ensure("pulled")
    assert caller.ready is None
    effects.listed = ()
    rig.scheduler._requests.rescan()
    await rig.settle()
    looking.set()
    await rig.settle()
    assert caller.ready is not None


async def test_a_configured_model_that_is_not_here_is_fetched_with_progress(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    del effects.stored["a"]
    gate = effects.hold("fetch:a")
    caller = await rig.ensure("a")
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_FETCHING
    assert caller.progress[-1].done_bytes == 1
    gate.set()
    await rig.settle()
    assert caller.ready is not None


async def test_a_failed_fetch_is_told_and_remembered_for_a_while(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    del effects.stored["a"]
    effects.fetch_error = Unavailable("no route to the hub")
    first = await rig.ensure("a")
    assert isinstance(first.error, ModelLoadFailed)
    assert "no route to the hub" in first.error.message
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_FAILED
    second = await rig.ensure("a")
    assert isinstance(second.error, ModelLoadFailed)
    assert effects.calls.count("fetch:a") == 1
    effects.fetch_error = None
    await rig.advance(6)
    assert (await rig.ensure("a")).ready is not None


async def test_an_operator_may_try_again_at_once(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    effects.load_errors = [ModelLoadFailed("corrupt")]
    assert (await rig.ensure("a")).error is not None
    assert (await rig.ensure("a", explicit=True)).ready is not None


async def test_the_least_recently_used_idle_model_makes_room(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", "c")
    await rig.ensure("a")
    await rig.advance_heard(3)
    await rig.ensure("b")
    await rig.advance_heard(3)
    caller = await rig.ensure("c")
    assert caller.ready is not None
    assert "evict" in caller.stages
    assert rig.worker("a").draining
    assert rig.worker("a").unloaded
    assert not rig.worker("b").draining
    states = {name: route.state for name, route in (await rig.routes()).items()}
    assert states == {"a": pb.MODEL_STATE_UNLOADED, "b": pb.MODEL_STATE_READY, "c": pb.MODEL_STATE_READY}


async def test_a_load_waits_until_the_evicted_process_is_gone(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    gate = effects.hold("kill")
    caller = await rig.ensure("b")
    assert effects.calls.count("spawn:w2") == 0
    assert (await rig.routes())["a"].replicas == []
    gate.set()
    await rig.settle()
    assert caller.ready is not None


async def test_a_busy_model_is_never_evicted_and_the_caller_waits_for_it(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    rig.worker("a").say(num_running=1, num_steps=1)
    await rig.settle()
    caller = await rig.ensure("b")
    assert caller.stages[-1] == "queue"
    assert "a" in caller.progress[-1].detail
    assert not rig.worker("a").draining
    rig.worker("a").say(num_running=0, num_steps=2)
    await rig.settle()
    assert caller.ready is not None


async def test_a_fresh_replica_is_not_evicted_before_its_callers_reach_it(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    caller = await rig.ensure("b")
    assert not rig.worker("a").draining
    await rig.advance_heard(3)
    assert caller.ready is not None


async def test_a_pinned_model_stays_and_the_refusal_names_it(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "pinned": True}, "b", budget=60 * MB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    caller = await rig.ensure("b")
    assert isinstance(caller.error, ModelLoadFailed)
    assert "(a)" in caller.error.message
    await rig.scheduler.pin("a", pinned=False)
    assert (await rig.ensure("b", explicit=True)).ready is not None


async def test_a_model_that_can_never_fit_is_refused_with_what_is_lacking(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", budget=30 * MB)
    caller = await rig.ensure("a")
    assert isinstance(caller.error, ModelNeverFits)
    assert "9.5 MiB too little" in caller.error.message


async def test_two_loads_never_take_the_same_room(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=60 * MB)
    gate = effects.hold("load:a")
    first = await rig.ensure("a")
    second = await rig.ensure("b")
    assert effects.calls.count("spawn:w2") == 0
    status = await rig.scheduler.status()
    assert status.devices[0].reserved_bytes <= status.devices[0].budget_bytes
    gate.set()
    await rig.settle()
    assert first.ready is not None
    assert second.ready is None


async def test_a_worker_that_is_lost_while_loading_is_replaced_twice_then_the_load_fails(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a")
    effects.load_errors = [WorkerLost("gone"), WorkerLost("gone"), WorkerLost("gone again")]
    caller = await rig.ensure("a")
    await rig.advance_heard(5)
    assert isinstance(caller.error, ModelLoadFailed)
    assert "3 attempts" in caller.error.message
    assert "gone again" in caller.error.message
    assert effects.calls.count("load:a") == 3
    assert all(w.killed for w in effects.workers.values())
    assert (await rig.scheduler.status()).devices[0].reserved_bytes == 0


async def test_waiters_stay_through_a_failed_attempt(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    effects.spawn_errors = [WorkerLost("no process")]
    caller = await rig.ensure("a")
    await rig.advance_heard(2)
    assert caller.ready is not None
    assert caller.ready.generation == 2


@pytest.mark.parametrize("error", [InvalidRequest("unknown architecture"), ModelLoadFailed("damaged weights")])
async def test_what_can_never_succeed_is_not_tried_again(
    start: Start, effects: FakeEffects, error: InvalidRequest | ModelLoadFailed
) -> None:
    rig = await start("a")
    effects.load_errors = [error]
    caller = await rig.ensure("a")
    assert caller.error is not None
    assert error.message in caller.error.message
    assert effects.calls.count("load:a") == 1


async def test_the_last_waiter_of_a_load_that_has_not_started_takes_it_along(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    rig.worker("a").say(num_running=1, num_steps=1)
    one, two = await rig.ensure("b"), await rig.ensure("b")
    await one.leave()
    await rig.settle()
    assert (await rig.routes())["b"].state == pb.MODEL_STATE_LOADING
    await two.leave()
    await rig.settle()
    assert (await rig.routes())["b"].state == pb.MODEL_STATE_UNLOADED
    rig.worker("a").say(num_running=0, num_steps=2)
    await rig.settle()
    assert not rig.worker("a").draining


async def test_a_download_that_nobody_waits_for_is_cancelled(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    del effects.stored["a"]
    effects.hold("fetch:a")
    caller = await rig.ensure("a")
    await caller.leave()
    await rig.settle()
    assert effects.cancelled == ["fetch:a"]


async def test_a_load_that_has_started_is_finished_without_waiters(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    gate = effects.hold("load:a")
    caller = await rig.ensure("a")
    await caller.leave()
    gate.set()
    await rig.settle()
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_READY


async def test_unload_during_a_load_kills_it_and_tells_the_waiters(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    effects.hold("load:a")
    caller = await rig.ensure("a")
    assert await rig.scheduler.unload("a") == 1
    await rig.settle()
    assert isinstance(caller.error, Unavailable)
    assert rig.worker("a").killed
    assert (await rig.routes())["a"].state == pb.MODEL_STATE_UNLOADED


async def test_unload_drains_first_and_answers_when_the_worker_is_gone(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await rig.ensure("a")
    assert await rig.scheduler.unload("a") == 1
    assert rig.worker("a").draining
    assert rig.worker("a").unloaded
    assert rig.worker("a").killed
    assert await rig.scheduler.unload("a") == 0


async def test_a_preloaded_model_is_loaded_without_being_asked_for(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "preload": True}, "b")
    states = {name: route.state for name, route in (await rig.routes()).items()}
    assert states == {"a": pb.MODEL_STATE_READY, "b": pb.MODEL_STATE_UNLOADED}


async def test_a_scripted_model_needs_no_files(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "echo", "engine": "scripted", "kv_cache": "20MB"})
    assert (await rig.ensure("echo")).ready is not None
    assert "locate:echo" not in effects.calls
    request = rig.worker("echo").request
    assert request is not None
    assert (request.engine, request.kv_cache_bytes) == (life.ENGINE_KIND_SCRIPTED, 20 * MB)


async def test_the_configured_quantization_reaches_the_worker_the_routes_and_the_plan(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "small", "quantize": "int4"}, "plain")
    assert (await rig.scheduler.plan("small")).quantize == "int4"
    for name, quantize in (("small", "int4"), ("plain", "")):
        await rig.ensure(name)
        request = rig.worker(name).request
        assert request is not None
        assert request.quantize == quantize
        assert (await rig.routes())[name].quantize == quantize
        assert (await rig.scheduler.plan(name)).quantize == quantize


async def test_the_configured_beams_reach_the_worker(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "hearer", "beams": 5}, "plain")
    for name, beams in (("hearer", 5), ("plain", 1)):
        await rig.ensure(name)
        request = rig.worker(name).request
        assert request is not None
        assert request.beams == beams


def test_a_load_with_other_beams_is_another_and_what_it_held_says_nothing_about_this_one() -> None:
    located = Located("", Footprint(weight_bytes=100 * MB))
    plain, wide = (from_config(ModelConfig(name="a", beams=beams)) for beams in (1, 5))
    assert recipe(plain) != recipe(wide)
    experience = Experience()
    experience.learn(plain, located, "cpu", own_bytes=123 * MB)
    assert experience.of(wide, located, "cpu").own_bytes == 0
    assert experience.of(plain, located, "cpu").own_bytes == 123 * MB
    assert "beams" not in key_of(plain, located.footprint, "cpu")


async def test_a_plan_says_what_would_happen_and_changes_nothing(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b", budget=60 * MB)
    await rig.ensure("a")
    await rig.advance_heard(3)
    answer = await rig.scheduler.plan("b")
    assert (answer.feasible, answer.parts[0].device, list(answer.evict_models)) == (True, "cpu", ["a"])
    assert "idle for 3 s" in answer.reason
    assert not rig.worker("a").draining
    with pytest.raises(ModelNotFound):
        await rig.scheduler.plan("nonesuch")


async def test_the_same_generation_is_never_given_twice_across_lives(start: Start, effects: FakeEffects) -> None:
    first = await start("a")
    await first.ensure("a")
    await first.scheduler.unload("a")
    second = await start("a")
    caller = await second.ensure("a")
    assert caller.ready is not None
    assert caller.ready.generation == 2


async def test_an_adapter_means_its_model_which_is_loaded_with_all_its_adapters(start: Start) -> None:
    rig = await start({"name": "a", "adapters": {"bot": "/lora/bot", "poet": "/lora/poet"}}, "b")
    caller = await rig.ensure("poet")
    assert caller.ready is not None
    request = rig.worker("a").request
    assert request is not None
    assert [(adapter.name, adapter.path) for adapter in request.adapters] == [
        ("bot", "/lora/bot"), ("poet", "/lora/poet"),
    ]  # fmt: skip
    assert {name: list(route.adapters) for name, route in (await rig.routes()).items()} == {
        "a": ["bot", "poet"],
        "b": [],
    }

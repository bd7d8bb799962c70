"""A changed configuration: models that are new, changed or gone, while others run. Fake effects, manual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hostler.config import HostlerConfig, build, stamp_of, write_resolved
from hostler.errors import ModelNotFound
from hostler.lifecycle.v1 import lifecycle_pb2 as life
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator import events
from orchestrator.__main__ import ConfigFile
from orchestrator.effects import FoundWorker, Memory
from orchestrator.models import Footprint, ModelSpec
from tests.orchestrator.conftest import MB, FakeEffects, Rig

Start = Callable[..., Awaitable[Rig]]


async def reconfigure(rig: Rig, *models: str | dict[str, Any], **config: Any) -> None:
    entries = [{"name": m} if isinstance(m, str) else m for m in models]
    for entry in entries:
        rig.effects.stored.setdefault(entry["name"], Footprint(40 * MB))
    values = {"models": entries, "min_residency": 0, "warm_workers": 0} | config
    rig.scheduler.post(events.Reconfigured(build(values)))
    await rig.settle()


async def test_a_new_model_is_served_and_one_to_preload_comes_up(start: Start, effects: FakeEffects) -> None:
    rig = await start("a")
    await reconfigure(rig, "b", {"name": "c", "preload": True}, "a")
    assert list(await rig.routes()) == ["b", "c", "a"]
    assert (await rig.routes())["c"].state == pb.MODEL_STATE_READY
    assert (await rig.ensure("b")).ready is not None


async def test_a_model_that_is_gone_leaves_the_routes_at_once_and_its_worker_when_it_is_idle(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "a", "aliases": ["x"], "preload": True, "pinned": True}, "b")
    worker, gate = rig.worker("a"), effects.hold("drain")
    await reconfigure(rig, "b")
    assert list(await rig.routes()) == ["b"]
    assert worker.draining
    assert not worker.killed
    for name in ("a", "x"):
        assert isinstance((await rig.ensure(name)).error, ModelNotFound)
    await rig.advance(5)  # Whatever looks at workers now and then finds their model.
    gate.set()
    await rig.settle()
    assert worker.killed
    assert list(await rig.routes()) == ["b"]
    await reconfigure(rig, "b", "a")
    assert (await rig.ensure("a")).ready is not None


async def test_what_is_configured_no_more_but_in_the_store_is_served_as_all_that_is_there(
    start: Start, effects: FakeEffects
) -> None:
    effects.listed = (ModelSpec("a", "a", configured=False), ModelSpec("b", "b", configured=False))
    rig = await start({"name": "a", "preload": True, "aliases": ["x"]}, {"name": "b", "aliases": ["y"]})
    gate = effects.hold("drain")
    await reconfigure(rig, "c")
    assert list(await rig.routes()) == ["c", "b"]
    gate.set()
    await rig.settle()
    assert list(await rig.routes()) == ["c", "b", "a"]
    assert (await rig.ensure("a")).ready is not None
    assert isinstance((await rig.ensure("x")).error, ModelNotFound)


async def test_one_that_comes_back_while_its_worker_leaves_is_served_by_another(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "a", "preload": True})
    old, gate = rig.worker("a"), effects.hold("drain")
    await reconfigure(rig, "b")
    await reconfigure(rig, "b", "a")
    caller = await rig.ensure("a")
    assert caller.ready is not None
    assert caller.ready.id != old.id
    gate.set()
    await rig.settle()
    assert old.killed
    assert list(await rig.routes()) == ["b", "a"]


async def test_a_model_that_changed_is_loaded_anew_and_the_old_worker_may_finish(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start({"name": "a", "preload": True}, "b")
    await rig.ensure("b")
    old, other = rig.worker("a"), rig.worker("b")
    gate = effects.hold("drain")
    await reconfigure(rig, {"name": "a", "preload": True, "max_running": 3}, {"name": "b", "keep_alive": 5})
    assert old.draining
    assert not old.killed
    assert not other.draining  # What only says when it goes needs no other worker.
    gate.set()
    await rig.settle()
    assert old.killed
    new = rig.worker("a")
    assert new.request is not None
    assert (new.id == old.id, new.request.max_running) == (False, 3)
    await rig.advance_heard(7)
    assert other.draining


async def test_who_waits_for_a_load_of_the_old_configuration_gets_the_new_one(
    start: Start, effects: FakeEffects
) -> None:
    rig = await start("a", "b")
    gate = effects.hold("load:a")
    caller, other_gate = await rig.ensure("a"), effects.hold("load:b")
    other = await rig.ensure("b")
    first = rig.worker("a")
    await reconfigure(rig, {"name": "a", "quantize": "int8"}, "b")
    gate.set()
    other_gate.set()
    await rig.settle()
    assert caller.ready is not None
    assert first.killed
    assert caller.ready.id != first.id
    assert (rig.worker("a").request or life.LoadRequest()).quantize == "int8"
    assert other.ready is not None
    assert effects.calls.count("load:b") == 1


async def test_who_waits_for_a_model_that_is_taken_out_is_told(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", "b")
    effects.hold("load:a")
    caller = await rig.ensure("a")
    await reconfigure(rig, "b")
    assert isinstance(caller.error, ModelNotFound)
    assert rig.worker("a").killed
    assert list(await rig.routes()) == ["b"]


async def test_an_operators_pin_outlives_a_reload_that_does_not_speak_of_it(start: Start) -> None:
    rig = await start({"name": "a", "preload": True}, "b")
    await rig.scheduler.pin("a", pinned=True)
    await reconfigure(rig, {"name": "a", "preload": True, "keep_alive": 1}, "b")
    await rig.advance_heard(3)
    assert not rig.worker("a").draining
    await reconfigure(rig, {"name": "a", "preload": True, "keep_alive": 1, "pinned": True}, "b")
    await reconfigure(rig, {"name": "a", "preload": True, "keep_alive": 1, "pinned": False}, "b")
    await rig.advance_heard(3)
    assert rig.worker("a").draining


async def test_a_worker_of_another_configuration_is_adopted_only_to_finish(start: Start, effects: FakeEffects) -> None:
    first = await start({"name": "a", "preload": True}, {"name": "b", "preload": True})
    await first.settle()
    memory = effects.memory
    first.task.cancel()
    await asyncio.gather(first.task, return_exceptions=True)
    reports = {
        name: life.WatchResponse(
            state=life.WORKER_STATE_READY,
            generation=first.worker(name).generation,
            pid=7,
            info=life.ModelInfo(model=name),
        )
        for name in "ab"
    }
    by_model = {placement.model: placement for placement in memory.placements}
    effects.found = tuple(FoundWorker(by_model[n].worker_id, reports[n], by_model[n]) for n in "ab")
    effects.memory = Memory(memory.generation, memory.placements)
    gate = effects.hold("drain")
    second = await start({"name": "a", "preload": True, "max_running": 2}, {"name": "b", "preload": True})
    old = effects.by_id[by_model["a"].worker_id]
    assert old.draining
    assert not effects.by_id[by_model["b"].worker_id].draining
    gate.set()
    await second.settle()
    assert old.killed
    assert (second.worker("a").request or life.LoadRequest()).max_running == 2


async def test_the_policy_follows_the_new_rules(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "preload": True}, "b", "c", budget=50 * MB, min_residency=3600)
    waiting = await rig.ensure("b")
    assert waiting.ready is None
    await reconfigure(rig, {"name": "a", "preload": True}, "b", "c", min_residency=0)
    await rig.advance_heard(3)
    assert waiting.ready is not None


def test_the_file_is_read_again_only_when_it_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_resolved(build({"drain_s": 1}), path)
    file = ConfigFile(path, tmp_path / "taken")
    assert file.read().drain_s == 1
    assert file.changed() is None
    write_resolved(build({"drain_s": 2}), path)
    assert (file.changed() or HostlerConfig()).drain_s == 2
    file.tell_taken()
    assert (tmp_path / "taken").read_text() == stamp_of(path)
    assert file.changed() is None
    path.write_text("{", encoding="utf-8")
    assert file.changed() is None

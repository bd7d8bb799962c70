"""Models on several machines: placed elsewhere, lost with their machine, back with it. Fake effects, manual clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hostler.errors import UnsupportedParameter
from hostler.placement.v1 import placement_pb2 as pb

from orchestrator.devices import Device
from orchestrator.models import Footprint
from orchestrator.nodes import NodesSeen

from .conftest import MB, FakeEffects, Rig

Start = Callable[..., Any]


def box2(budget: int = 100 * MB) -> NodesSeen:
    device = Device("box2/cpu", "cpu", "CPU", 0, budget, node="box2", num_cores=7)
    return NodesSeen((device,), {"box2": 0}, joined=("box2",), why="box2 joined with cpu")


GONE = NodesSeen(left=("box2",), why="box2 is gone: it does not answer")


async def until_ready(rig: Rig, model: str) -> pb.ReplicaStatus:
    await rig.settle()
    (found,) = [r for r in (await rig.scheduler.status()).replicas if r.model == model]
    assert found.replica.state == pb.MODEL_STATE_READY
    return found


async def test_a_model_goes_to_another_machine_and_its_files_with_it(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "device": "box2/cpu"})
    effects.nodes.put_nowait(box2())
    await rig.settle()
    await rig.ensure("a")
    placed = await until_ready(rig, "a")
    assert (placed.node, placed.parts[0].device) == ("box2", "box2/cpu")
    assert "bring:a:box2" in effects.calls
    request = rig.worker("a").request
    assert request is not None
    assert request.path == "/box2/models/a"
    assert request.environment["OMP_NUM_THREADS"] == "7"


async def test_a_lost_machines_model_comes_back_elsewhere(start: Start, effects: FakeEffects) -> None:
    rig = await start("a", budget=300 * MB)
    effects.nodes.put_nowait(box2(50 * MB))
    await rig.settle()
    await rig.ensure("a")
    assert (await until_ready(rig, "a")).node == "box2"
    effects.nodes.put_nowait(GONE)
    placed = await until_ready(rig, "a")
    assert (placed.node, placed.parts[0].device) == ("", "cpu")
    assert [d.id for d in (await rig.scheduler.status()).devices] == ["cpu"]


async def test_a_model_without_another_place_comes_back_with_its_machine(start: Start, effects: FakeEffects) -> None:
    rig = await start({"name": "a", "device": "box2/cpu"})
    effects.nodes.put_nowait(box2())
    await rig.settle()
    await rig.ensure("a")
    await until_ready(rig, "a")
    effects.nodes.put_nowait(GONE)
    await rig.settle()
    assert not (await rig.scheduler.status()).replicas
    effects.nodes.put_nowait(box2())
    assert (await until_ready(rig, "a")).node == "box2"


async def test_in_a_cluster_nothing_is_placed_before_its_machines_are_known(start: Start, effects: FakeEffects) -> None:
    gate = effects.hold("find")
    rig = await start({"name": "a", "preload": True, "device": "box2/cpu"}, ray_address="10.0.0.1:6399")
    assert effects.calls.count("spawn") == 0
    effects.nodes.put_nowait(box2())
    await rig.settle()
    gate.set()
    assert (await until_ready(rig, "a")).node == "box2"


async def test_a_worker_that_can_never_be_resized_is_asked_once(
    start: Start, effects: FakeEffects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A past bug: it was planned on, asked, and planned on again, hundreds of times a second."""
    asked: list[str] = []

    async def refuse(worker_id: str, generation: int, kv_cache_bytes: int) -> int:
        asked.append(worker_id)
        raise UnsupportedParameter("This model has no KV cache, so there is nothing to resize.")

    monkeypatch.setattr(effects, "resize", refuse)
    effects.stored["a"] = effects.stored["b"] = Footprint(20 * MB)
    rig = await start({"name": "a", "kv_cache": 60 * MB}, {"name": "b", "kv_cache": 20 * MB}, budget=100 * MB)
    await rig.ensure("a")
    await rig.advance_heard(10)
    await rig.ensure("b")
    await rig.advance_heard(3)
    assert len(asked) <= 1
    assert (await until_ready(rig, "b")).parts[0].device == "cpu"
